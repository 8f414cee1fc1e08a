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
