"""Secrets that somebody types are neither kept nor repeated, and what only looks like one stays."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from hf_equissl.pretraining.run_record import command_line
from hf_equissl.utils.commands import command_parser, say, stop
from hf_equissl.utils.files import write_text
from hf_equissl.utils.redaction import (
    drop_secrets,
    find_secret,
    find_secret_in,
    redact,
    redact_messages,
    redact_values,
)
from hf_equissl.utils.strict_yaml import dump_yaml, load_yaml

from .secrets import ALL, SECRETS, left_in

TOKEN = "hf_" + "a1B2" * 9
HARMLESS = (
    "hf_equissl, hf_hub_download_and_so_on, hf_internal",
    "abfss://container@account.dfs.core.windows.net/images and hf://datasets/ada/cats@main/a.parquet",
    "https://host:8080/path@revision, zip://a.jpg::https://host/a.zip, mail ada@example.org, git@github.com:a/b",
    "hf://datasets/ada/cats/shard-0000?.tar, https://host/a.tar?download=true&page=12",
    "CLS token: after the norm; use_mask_token=true, key: value, patch_tokens=mean",
    '{"mask_token": "[MASK]", "hub_token": null, "password": ""}',
)

# Removed to be safe, and no reason to refuse a publication.
GAPS = (
    '{"key": "accuracy"}',
    '{"token": "the cat", "sig": "p<5", "api_key": "your-api-key"}',
    'login(token="hf_..."), login(token="YOUR_TOKEN"), login(token="hf_xxxxxxxxxxxxxxxxxxxxxxxx")',
    'api_key="your-api-key" password="my password" client_secret="xxxx" token="<your token>" secret="…"',
    "https://me:your_password@host/a, https://host/a?key=accuracy&token=YOUR_TOKEN",
    "Basic training of a model; Authorization: Basic <base64>; authorization: basic xxxxxxxx",
)


@pytest.mark.parametrize("secret", SECRETS)
def test_every_form_is_removed_and_found(secret: str) -> None:
    text = SECRETS[secret]
    for around in ("{}", "see ({}), then more", '{{"data": "{}", "more": 1}}', "# title\n\n- data: {}\n"):
        clean = redact(around.format(text))
        assert left_in(clean) == []
        assert redact(clean) == clean
        assert find_secret(clean) is None
        before, after = around.format("|").split("|")
        assert clean.startswith(before.rstrip("{"))
        assert clean.endswith(after)
    # What only a stranger could tell from a harmless value is removed, and does not stop a publication.
    assert (find_secret(text) is None) == (secret == "h0neyNamedByNobody")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_none_stays(text: str) -> None:
    assert redact(text) == text
    assert find_secret(text) is None


@pytest.mark.parametrize("text", GAPS)
def test_gaps_to_fill_in_and_names_of_other_things_are_no_secrets(text: str) -> None:
    assert find_secret(text) is None
    if text.startswith("{"):
        assert find_secret_in([json.loads(text)]) is None


@pytest.mark.parametrize(
    "text", ['token="a1b2c3d4"', 'x(pwd="hunter2hunter")', 'password="abcd"', '{"hub_token": "abcd"}']
)
def test_what_is_filled_in_is_found(text: str) -> None:
    assert str(find_secret(text)).startswith("a value called ")


@pytest.mark.parametrize("around", ["Authorization: {}", '{{"Authorization": "{}"}}', "curl -H 'authorization: {}' x"])
def test_a_login_in_a_header(around: str) -> None:
    text = around.format("Basic YWRhOmh1bnRlcg==")
    assert find_secret(text) == "a login in a header"
    assert redact(text) == around.format("Basic removed")
    assert find_secret(redact(text)) is None
    assert find_secret_in({"Authorization": "Basic YWRhOmh1bnRlcjI="}) == "a value called Authorization"
    assert redact_values({"Authorization": "Basic YWRhOmh1bnRlcg=="}) == {}


@pytest.mark.parametrize(
    "token", [TOKEN, "api_org_" + "a1B2" * 9, "hf_oauth_" + "eyJhbGciOiJFZERTQSJ9.eyJyZWFk-X19.c2ln_bmF0"]
)
def test_every_kind_of_token(token: str) -> None:
    assert redact(f"Bearer {token}, then more") == "Bearer removed, then more"


def test_options_that_are_secrets_go_with_their_values() -> None:
    words = ["--lr", "1", "--hub_token", "abc", "--training.hub_token=abc", "--api_key", "--use_mask_token", "true"]
    assert drop_secrets([*words, "--note", f"mine is {TOKEN}"]) == [
        *("--lr", "1", "--use_mask_token", "true", "--note", "mine is removed"),
    ]


def test_a_runs_record_holds_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", TOKEN, "--data", "my photos", TOKEN])
    assert command_line().endswith(" --data 'my photos' removed")
    assert TOKEN not in command_line()


def test_plain_data_and_files_keep_their_form(tmp_path: Path) -> None:
    values = {"notes": list(SECRETS.values()), "password": "x", "deep": {"source": ALL}, "size": 3}
    clean = redact_values(values)
    assert left_in(str(clean)) == []
    assert {"password", *clean} - {*clean} == {"password"}
    assert clean["size"] == 3
    write_text(tmp_path / "a.json", json.dumps(values))
    write_text(tmp_path / "a.yaml", dump_yaml(values))
    assert json.loads((tmp_path / "a.json").read_text())["password"] == "removed"
    assert load_yaml((tmp_path / "a.yaml").read_text(), "a.yaml")["size"] == 3
    assert left_in((tmp_path / "a.json").read_text() + (tmp_path / "a.yaml").read_text()) == []
    assert find_secret_in({"a": [{"client_secret": "abcd"}]}) == "a value called client_secret"
    assert find_secret_in(clean) is None


def test_nothing_is_repeated_to_people(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    before = logging.getLogRecordFactory()
    try:
        redact_messages()
        say(ALL)
        stop(ALL, code=2)
        with pytest.raises(SystemExit):
            command_parser("x.py").parse_args([f"--dta={ALL}"])
        try:
            raise OSError(ALL)
        except OSError as error:
            logging.getLogger("anybody").exception("It is %s", ALL)
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(before)
    said = capsys.readouterr()
    assert "unrecognized arguments" in said.err
    assert "OSError" in said.err
    assert "OSError" in caplog.text
    assert left_in(said.out + said.err + caplog.text) == []


def test_a_wrong_call_of_a_logger_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __str__(self) -> str:
            raise KeyError("no text")

    monkeypatch.setattr(logging, "raiseExceptions", False)
    logger = logging.Logger("somebody")
    logger.addHandler(logging.StreamHandler())
    before = logging.getLogRecordFactory()
    try:
        redact_messages()
        logger.error("It is %s", Broken())
        logger.error("It is %s %s", 1)
        logger.error("It is", exc_info=("no", "error"))  # type: ignore[arg-type]
    finally:
        logging.setLogRecordFactory(before)


def test_long_lines_take_no_long_time() -> None:
    for text in (
        "a" * 10**5,
        "://" * 9999,
        "a.-" * 30000,
        "?a=b&" * 9999,
        "password" * 9999,
        '"' * 30000,
    ):
        assert redact(text) == text
