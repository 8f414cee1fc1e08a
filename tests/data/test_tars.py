"""Tar files as people write them: one image of each sample, whatever stands beside it."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_equissl.data import ImageSource, ImageSourceError, decode_image, load_images

from .image_files import encode, picture, write_members


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tar(path: Path, members: dict[str, bytes | int]) -> Path:
    """A tar file; a number stands for the picture of that number, in the format of the name."""
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
    made = {
        name: encode(picture(content), kinds[name.rpartition(".")[2].lower()]) if isinstance(content, int) else content
        for name, content in members.items()
    }
    return write_members(path, list(made.items()))


def good_images(source: ImageSource) -> int:
    count = 0
    for row in source.dataset:
        try:
            count += decode_image(source.content(row)).size == (40, 32)
        except ValueError:
            continue
    return count


both = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


@both
def test_images_of_every_type_are_read(streaming: bool, tmp_path: Path) -> None:
    names = [*(f"img{n:03d}.jpg" for n in range(28)), *(f"img{n:03d}.png" for n in range(28, 36)), "a.JPG", "b.Jpeg"]
    members = dict(zip(names, range(38), strict=True)) | {"c.webp": 38}
    source = load_images(tar(tmp_path / "a.tar", members), streaming=streaming)
    assert good_images(source) == len(list(source.dataset)) == 39
    expected = np.asarray(picture(30))
    rows = {source.item_name(row, 0).split(" ")[0]: row for row in source.dataset}
    np.testing.assert_array_equal(np.asarray(decode_image(source.content(rows["img030.png"]))), expected)


@both
def test_what_lies_beside_is_passed_over(streaming: bool, tmp_path: Path) -> None:
    members: dict[str, bytes | int] = {"README.md": b"# Photos", "README": b"x", "LICENSE.txt": b"x"}
    for number in range(8):
        members[f"{number}.jpg"] = number
        if number % 3 == 0:
            members[f"{number}.json"] = b'{"broken'
        members[f"{number}.cls"] = str(number % 2).encode() if number != 5 else b"?"
    for order in (members, dict(reversed(members.items()))):
        source = load_images(tar(tmp_path / f"{len(list(tmp_path.iterdir()))}.tar", order), streaming=streaming)
        assert (source.image_column, source.label_column) == ("jpg", "cls")
        assert good_images(source) == len(list(source.dataset)) == 8


@both
def test_a_sample_without_its_image_is_a_row_that_is_missing(streaming: bool, tmp_path: Path) -> None:
    members: dict[str, bytes | int] = {}
    for number in range(12):
        if number % 4:
            members[f"{number:02d}.jpg"] = number
        members[f"{number:02d}.cls"] = b"1"
    members["12.raw"] = b"camera"
    source = load_images(tar(tmp_path / "a.tar", members), streaming=streaming)
    rows = list(source.dataset)
    assert (len(rows), good_images(source)) == (13, 9)
    bad = [row for row in rows if not row["jpg"]["bytes"]]
    assert [source.item_name(row, 7).split(" (")[:2] for row in bad][::3] == [["00", "cls)"], ["12", "raw)"]]
    with pytest.raises(ValueError, match="holds no image"):
        source.content(bad[0])


@both
def test_names_with_more_dots(streaming: bool, tmp_path: Path) -> None:
    dotted = {f"2024.05.{number:02d}_cam.jpg": number for number in range(12)}
    with pytest.raises(
        ImageSourceError, match=r"key '2024'.*ends at the first dot of its name, and these names have more"
    ):
        load_images(tar(tmp_path / "a.tar", dotted), streaming=streaming)
    apart = {f"n{number}.left.jpg": number for number in range(4)}
    assert good_images(load_images(tar(tmp_path / "b.tar", apart), streaming=streaming)) == 4
    pairs = {f"n{number // 2}.{'ab'[number % 2]}.jpg": number for number in range(8)}
    source = load_images(tar(tmp_path / "c.tar", pairs), streaming=streaming, column="b.jpg")
    assert good_images(source) == len(list(source.dataset)) == 4


@both
def test_the_cause_is_named(streaming: bool, tmp_path: Path) -> None:
    def fails(members: dict[str, bytes | int], message: str) -> None:
        with pytest.raises(ImageSourceError, match=message):
            load_images(tar(tmp_path / f"{len(list(tmp_path.iterdir()))}.tar", members), streaming=streaming)

    fails({"a.jpg": 0, "a.png": 1}, "several columns hold images: jpg, png. Choose one: --image_column")
    fails({"a.json": b"{}", "b.raw": b"x"}, "no image among the first 2 samples.*json, raw")
    with pytest.raises(ImageSourceError, match="expected png"):
        load_images(tar(tmp_path / "x.tar", {"a.jpg": 0}), streaming=streaming, column="png")
    twice = write_members(tmp_path / "twice.tar", [("a.jpg", b"abc")] * 2)
    with pytest.raises(ImageSourceError, match=r"holds 'a\.jpg' twice"):
        load_images(twice, streaming=streaming)


@both
def test_text_classes_and_names_with_signs_of_patterns(streaming: bool, tmp_path: Path) -> None:
    members: dict[str, bytes | int] = {}
    for number in range(4):
        members |= {f"{number}.jpg": number, f"{number}.cls": b"cat" if number % 2 else b"dog"}
    path = tar(tmp_path / "a[1]{x}*.tar", members)
    source = load_images(path, streaming=streaming)
    assert good_images(source) == 4
    if not streaming:
        assert source.dataset.features["cls"].names == ["cat", "dog"]
