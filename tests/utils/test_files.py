"""Files that are whole or absent, also when the power goes."""

from __future__ import annotations

import os
import stat
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
    synced_file, replaced_by = (step.split()[1] for step in done)
    assert [step.split()[0] for step in done] == ["fsync", "replace"]
    assert synced_file == replaced_by != "a.json"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture(params=["file", "nowhere"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("theirs")
    (tmp_path / "a.json").symlink_to(tmp_path / "theirs" / request.param)
    return tmp_path / "a.json"


def test_a_link_is_neither_followed_nor_replaced(link: Path) -> None:
    with pytest.raises(FileExistsError, match=r"a\.json is a link and would be replaced"):
        files.write_text(link, "ours")
    assert link.is_symlink()
    assert [path.name for path in link.parent.iterdir() if path.name.startswith(".")] == []
    assert (link.parent / "theirs" / "file").read_text() == "theirs"
    assert len(list((link.parent / "theirs").iterdir())) == 1


def test_what_lies_under_the_names_of_intermediate_files_stays(tmp_path: Path) -> None:
    for name in (".a.json.tmp", ".saving-encoder", ".old-encoder"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("theirs")
    (tmp_path / "encoder").mkdir()
    files.write_text(tmp_path / "a.json", "ours")
    with files.staging_folder(tmp_path / "encoder") as staging:
        (staging / "new").touch()
        files.move_into_place(staging, tmp_path / "encoder")
    assert (tmp_path / "encoder" / "new").exists()
    assert (tmp_path / "theirs" / "file").read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 6
    (tmp_path / "elsewhere").symlink_to(tmp_path / "theirs")
    with files.staging_folder(tmp_path / "elsewhere") as staging, pytest.raises(FileExistsError, match="is a link"):
        files.move_into_place(staging, tmp_path / "elsewhere")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_rights_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with files.staging_folder(tmp_path / "model") as staging:
            (staging / "deeper").mkdir()
            for path in (staging / "a.safetensors", staging / "deeper" / "b.safetensors"):
                path.touch(mode=0o600)  # as safetensors does
            files.move_into_place(staging, tmp_path / "model")
        files.write_text(tmp_path / "model" / "a.json", "{}")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask


def test_rights_that_a_file_system_keeps_to_itself_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    files.write_text(tmp_path / "a.json", "{}")
    with files.staging_folder(tmp_path / "model") as staging:
        (staging / "a").touch(mode=0o600)
        files.move_into_place(staging, tmp_path / "model")
    assert (tmp_path / "a.json").read_text() == "{}"
    assert (tmp_path / "model" / "a").is_file()
