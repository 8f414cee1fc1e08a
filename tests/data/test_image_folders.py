"""Folders as people have them: files of other types, metadata beside images, and names of every kind."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_equissl.data import ImageSourceError, list_remarks, load_images

from .image_files import encode, write_folder, write_tiff


def test_files_of_other_types_are_counted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", [f"{n}.jpg" for n in range(8)])
    assert load_images(folder).notes == ()
    for number in range(8):
        (folder / f"{number}.CR2").write_bytes(b"raw")
    (note,) = load_images(folder).notes
    assert "8 files of other types (.CR2) are left out" in note
    for path in folder.glob("*.CR2"):
        path.rename(path.with_suffix(".HEIC"))
    heif = find_spec("pillow_heif") is not None
    (note,) = load_images(folder).notes or ("read",)
    assert note == "read" if heif else "8 files of other types (.HEIC) are left out (pip install 'hf-equissl[" in note
    for path in folder.glob("*.HEIC"):
        path.rename(path.with_suffix(".CR2"))
    (folder / "scan").write_bytes(b"no suffix")
    (folder / "a.txt").write_text("text")
    (note,) = load_images(folder, streaming=True).notes
    assert re.fullmatch(
        r"10 files of other types \(8 \.CR2, 1 (no suffix, 1 \.txt|\.txt, 1 no suffix)\) are left out", note
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.CR2").write_bytes(b"raw")
    with pytest.raises(ImageSourceError, match=r"1 file of other types \(\.CR2\) are left out"):
        load_images(tmp_path / "other")


def metadata_folder(folder: Path, lines: list[str], name: str = "metadata.csv") -> Path:
    write_folder(folder, [f"{n}.jpg" for n in range(4)])
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def test_labels_of_metadata(tmp_path: Path) -> None:
    numbers = load_images(metadata_folder(tmp_path / "a", ["file_name,label", *(f"{n}.jpg,{n % 2}" for n in range(4))]))
    assert [numbers.label(row) for row in numbers.dataset] == [0, 1, 0, 1]
    assert numbers.notes == ()
    lines = [json.dumps({"file_name": f"{n}.jpg", "label": "cat" if n % 2 else "dog"}) for n in range(3)]
    texts = load_images(metadata_folder(tmp_path / "b", lines, "metadata.jsonl"))
    assert [texts.label(row) for row in texts.dataset] == [1, 0, 1, None]
    assert "does not name 1 of the images" in texts.notes[0]
    other = metadata_folder(tmp_path / "c", ["file_name,species", *(f"{n}.jpg,s{n % 2}" for n in range(4))])
    assert "--label_column (species)" in load_images(other).notes[0]
    assert load_images(other, label_column="species").num_classes == 2


def test_metadata_in_folders_of_splits(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        lines = ["file_name,label", *(f"{n}.jpg,{n % 2}" for n in range(count))]
        folder = metadata_folder(tmp_path / "set" / split, lines)
        for number in range(count, 4):
            (folder / f"{number}.jpg").unlink()
    source = load_images(tmp_path / "set", split="test")
    assert [source.label(row) for row in source.dataset] == [0, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["name,label", "0.jpg,1"], r"no column file_name \(name, label\)"),
        (["file_name,label", "0.jpg,1,2,3"], "it cannot be read"),
        (["file_name,label", "9.jpg,1"], r"names 1 files that are not there, such as 9\.jpg"),
    ],
)
def test_metadata_that_is_not_used_is_named(lines: list[str], message: str, tmp_path: Path) -> None:
    source = load_images(metadata_folder(tmp_path / "a", lines))
    assert len(source) == 4
    assert any(re.search(message, note) for note in source.notes)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_names_of_every_kind(streaming: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a[1] {x}*?", ["b[2].jpg", "c*.png", "é.jpg"])
    shutil.copy(folder / "c*.png", os.fsencode(folder) + b"/n\xff\xfe.png")
    source = load_images(folder, streaming=streaming)
    rows = list(source.dataset)
    assert len(rows) == 4
    assert all(source.decode(source.content(row)).size == (40, 32) for row in rows)
    names = [source.item_name(row, number) for number, row in enumerate(rows)]
    assert any(name.endswith("n\\xff\\xfe.png") for name in names)
    assert "\n".join(names).encode()
    with pytest.raises(ImageSourceError, match="not UTF-8"):
        load_images(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))


def remarks(folder: Path, **options: object) -> str:
    return "\n".join(list_remarks(load_images(folder, **options)))


def one_file(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def test_the_first_images_say_what_is_used_of_them(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    deep = one_file(tmp_path / "deep", "a.png", encode(Image.fromarray(values), "PNG"))
    assert "use only 0 to 4095 of 0 to 65535" in remarks(deep)
    assert "--value_range, or data.value_range of a recipe) to auto" in remarks(deep)
    assert "[0, 4095]" in remarks(deep)
    assert remarks(deep, value_range="auto") == ""
    one_file(deep, "a.png", encode(Image.fromarray(values * 16), "PNG"))
    assert remarks(deep) == ""
    planes = write_tiff(np.stack([values] * 3, axis=-1), planar=True, compress=True)
    assert "use only 0 to 4095" in remarks(one_file(tmp_path / "planes", "a.tif", planes))
    assert remarks(write_folder(tmp_path / "plain", ["a.jpg"])) == ""
    one_file(tmp_path / "plain", "b.HEIC.part", b"")
    assert remarks(tmp_path / "plain") == "note: 1 file of other types (.part) are left out"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (write_tiff(np.full((8, 8, 5), 9, np.uint8)), "5 bands; only red, green and blue are used"),
        (write_tiff(np.full((8, 8, 4), 9, np.uint8)), "4 bands; only red, green and blue are used"),
        (
            write_tiff(np.full((8, 8, 4), 9, np.uint8), extra=2),
            "4 bands, of which the fourth is taken for transparency",
        ),
        (write_tiff(np.full((8, 8, 4), 9, np.uint16), extra=None), "If it is something else, such as near infrared"),
        (encode(Image.new("CMYK", (8, 8)), "TIFF"), "are CMYK: they are converted to RGB"),
        (encode(Image.new("CMYK", (8, 8))), "are CMYK"),
        (encode(Image.new("RGBA", (8, 8)), "PNG"), ""),
    ],
)
def test_more_bands_than_three_are_named_before_training(content: bytes, said: str, tmp_path: Path) -> None:
    found = remarks(one_file(tmp_path / "set", "a.tif", content))
    assert said in found if said else not found


# ---- class folders ----


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("strays", "folders"),
    [
        (["cover.jpg"], ["a", "b"]),
        (["cover.jpg"], ["train/a", "train/b"]),
        (["cover.jpg"], ["train/a", "train/b", "test/a"]),
        (["train/cover.jpg", "train/z.png"], ["train/a", "train/b", "test/a"]),
    ],
    ids=["classes", "split", "splits", "in a split"],
)
def test_images_beside_class_folders_are_named(
    strays: list[str], folders: list[str], streaming: bool, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "set", [*strays, *(f"{name}/{n}.jpg" for name in folders for n in range(2))])
    source = load_images(folder, streaming=streaming)
    assert source.label_column is None
    (note,) = source.notes
    beside = f"{', '.join(strays)} {'lie' if len(strays) > 1 else 'lies'} beside folders, which are therefore not taken"
    assert note.startswith(beside)
    assert source.label_hint.startswith(beside)
    if not streaming:
        with pytest.raises(ImageSourceError, match=beside):
            load_images(folder, subset={"share": 0.5, "stratified": True})
    for stray in strays:
        (folder / stray).unlink()
    source = load_images(folder, streaming=streaming)
    assert (source.notes, source.label_hint, source.classes) == ((), "", ("a", "b"))


def test_flat_folders_and_labels_of_metadata_need_no_class_folders(tmp_path: Path) -> None:
    assert load_images(write_folder(tmp_path / "flat", ["a.jpg", "b.jpg"])).notes == ()
    folder = metadata_folder(tmp_path / "set", ["file_name,label", *(f"{n}.jpg,{n % 2}" for n in range(4))])
    write_folder(folder / "more", ["4.jpg"])
    assert not any("beside folders" in note for note in load_images(folder).notes)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path is too long for the system, which refuses root, too."""
    folder = write_folder(tmp_path / "set", ["a/0.jpg", "b/1.jpg"])
    monkeypatch.chdir(folder / "b")
    for _ in range(20):
        os.mkdir("x" * 250)
        os.chdir("x" * 250)
    with pytest.raises(ImageSourceError, match=r"x+: the folder cannot be listed \(File name too long\)"):
        load_images(folder)
    monkeypatch.undo()
    (folder / "b").rename(folder / ".b")
    assert len(load_images(folder)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_of_another_user_is_named_but_for_what_the_system_keeps(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", ["a/0.jpg", "b/1.jpg"])
    for name in ("lost+found", "b"):
        (folder / name).mkdir(mode=0o000, exist_ok=True)
    assert len(load_images(folder)) == 2
    (folder / "b").chmod(0o000)
    with pytest.raises(ImageSourceError, match=r"b: the folder cannot be listed \(Permission denied\)"):
        load_images(folder)
    (folder / "b").chmod(0o700)


@pytest.mark.parametrize("turn", [1, -1])
def test_links_to_folders_beside_them_do_not_hang_on_the_order_of_the_disk(
    turn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "set", ["train/cat/0.jpg", "train/dog/1.jpg"])
    (folder / "train" / "bear").symlink_to(folder / "train" / "dog")
    (folder / "test").mkdir()
    (folder / "test" / "cat").symlink_to(folder / "train" / "cat")
    (folder / "train" / "dog" / "up").symlink_to(folder / "train")
    scandir = os.scandir

    class Turned:
        """What ``os.scandir`` gives, in another order."""

        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = iter(sorted(entries, key=lambda entry: entry.name)[::turn])

        def __enter__(self) -> Turned:
            return self

        def __exit__(self, *error: object) -> None:
            return

        def __next__(self) -> os.DirEntry[str]:
            return next(self.entries)

        def __iter__(self) -> Turned:
            return self

    monkeypatch.setattr(os, "scandir", Turned)
    source = load_images(folder)
    assert source.classes == ("bear", "cat", "dog")
    assert [row["image"] for row in source.dataset] == ["train/bear/1.jpg", "train/cat/0.jpg", "train/dog/1.jpg"]
    assert load_images(folder, split="test").classes == ("cat",)
    (note,) = source.notes
    assert note.startswith("test/cat and train/cat are one folder, through a link: ")
    assert note.endswith("(1 more folder is so, too)")
