"""Tokens that somebody types are not kept."""

from __future__ import annotations

import sys

import pytest

from hf_equissl.pretraining.run_record import command_line
from hf_equissl.utils.redaction import without_secrets, without_tokens

TOKEN = "hf_" + "a1B2" * 9


@pytest.mark.parametrize(
    "token", [TOKEN, "api_org_" + "a1B2" * 9, "hf_oauth_" + "eyJhbGciOiJFZERTQSJ9.eyJyZWFk-X19.c2ln_bmF0"]
)
def test_every_kind_of_token(token: str) -> None:
    assert without_tokens(f"Bearer {token}, then more") == "Bearer removed, then more"
    assert without_tokens("hf_equissl, hf_hub_download_and_so_on, hf_internal") == (
        "hf_equissl, hf_hub_download_and_so_on, hf_internal"
    )


def test_options_that_are_secrets_go_with_their_values() -> None:
    words = ["--lr", "1", "--hub_token", "abc", "--training.hub_token=abc", "--api_key", "--use_mask_token", "true"]
    assert without_secrets([*words, "--note", f"mine is {TOKEN}"]) == [
        *("--lr", "1", "--use_mask_token", "true", "--note", "mine is removed"),
    ]


def test_a_runs_record_holds_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", TOKEN, "--data", "my photos", TOKEN])
    assert command_line().endswith(" --data 'my photos' removed")
    assert TOKEN not in command_line()
