"""What commands say stands alone on its line."""

from __future__ import annotations

import sys

import pytest
from tqdm.auto import tqdm

from hf_equissl.utils.commands import stop


def test_a_message_does_not_stick_to_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = tqdm(total=4, file=sys.stderr, desc="pretraining", mininterval=0)
    bar.update(1)
    assert stop("the disk is full", code=1) == 1
    bar.update(1)
    bar.refresh()
    del bar
    text = capsys.readouterr().err
    assert text.endswith("\nerror: the disk is full\n")
    assert "| 1/4 [" in text.splitlines()[-2]


def test_what_somebody_pasted_is_not_repeated_in_full_and_a_path_is(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/long" * 150
    assert stop(f"masks.aspect='{'a' * 3000}': expected a number, in {path}", code=2) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: masks.aspect='aaa")
    assert said.endswith(f"… expected a number, in {path}\n")
    assert len(said) < 1000
