"""Files that are whole or absent, also when the power goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_equissl.utils import files


def test_text_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("fsync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        done.append("replace " + source.name)
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", renamed)
    files.write_text(tmp_path / "a.json", "{}")
    assert done == ["fsync .a.json.tmp", "replace .a.json.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
