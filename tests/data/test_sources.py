"""The same pictures from every kind of source, and an error that helps for everything that is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_equissl.data import ImageDecodeError, ImageSource, ImageSourceError, decode_image, load_images

from .image_files import encode, picture, write_folder, write_tar

COUNT = 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)


def table(count: int = COUNT) -> Dataset:
    rows = {
        "id": list(range(count)),
        "picture": [{"bytes": encode(picture(number)), "path": None} for number in range(count)],
        "kind": [number % 3 for number in range(count)],
    }
    features = {"id": Value("int64"), "picture": Image(), "kind": ClassLabel(names=["a", "b", "c"])}
    return Dataset.from_dict(rows, features=Features(features))


def make_parquet(folder: Path) -> str:
    (folder / "data").mkdir(parents=True)
    table().to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    table(2).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return str(folder)


def make_arrow(folder: Path) -> str:
    table().save_to_disk(folder / "saved")
    shutil.move(next((folder / "saved").glob("*.arrow")), folder / "rows.arrow")
    return str(folder / "rows.arrow")


def make_saved(folder: Path) -> str:
    table().save_to_disk(folder)
    return str(folder)


def make_saved_dict(folder: Path) -> str:
    datasets.DatasetDict({"train": table(), "test": table(2)}).save_to_disk(folder)
    return str(folder)


def make_classes(folder: Path) -> str:
    return str(write_folder(folder, [f"{'abc'[n % 3]}/{n}.jpg" for n in range(COUNT)]))


def make_splits(folder: Path) -> str:
    write_folder(folder / "train", [f"{'abc'[n % 3]}/{n}.jpg" for n in range(COUNT)])
    return str(write_folder(folder / "val", ["a/8.jpg"]).parent)


def make_flat(folder: Path) -> str:
    write_folder(folder, [f"train_or_test_{n}.JPG" for n in range(COUNT)])
    (folder / "notes.txt").write_text("not an image")
    return str(folder)


def make_shards(folder: Path) -> str:
    folder.mkdir()
    write_tar(folder / "a-000.tar", range(3))
    write_tar(folder / "a-001.tar", range(3, COUNT))
    return str(folder)


SOURCES = [
    (make_parquet, "picture", "kind"),
    (make_arrow, "picture", "kind"),
    (make_saved, "picture", "kind"),
    (make_saved_dict, "picture", "kind"),
    (make_classes, "image", "label"),
    (make_splits, "image", "label"),
    (make_flat, "image", None),
    (make_shards, "jpg", "cls"),
    (lambda folder: make_parquet(folder) + "/data/train-*.parquet", "picture", "kind"),
    (lambda folder: make_parquet(folder) + "/data/train-00000-of-00001.parquet", "picture", "kind"),
    (lambda folder: make_shards(folder) + "/*.tar", "jpg", "cls"),
]


def contents(source: ImageSource) -> list[np.ndarray]:
    images = [np.asarray(decode_image(source.content(row))) for row in source.dataset]
    return sorted(images, key=lambda image: image.tobytes())


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(("make", "column", "label"), SOURCES, ids=lambda value: getattr(value, "__name__", None))
def test_every_source(make, column: str, label: str | None, streaming: bool, tmp_path: Path) -> None:
    source = load_images(make(tmp_path / "set"), streaming=streaming)
    assert (source.image_column, source.label_column, source.streaming) == (column, label, streaming)
    assert source.num_rows == (None if streaming else COUNT)
    assert set(source.dataset.column_names) == {column, label} - {None}
    expected = sorted((np.asarray(decode_image(encode(picture(n)))) for n in range(COUNT)), key=lambda a: a.tobytes())
    np.testing.assert_array_equal(contents(source), expected)
    if label:
        assert sorted(source.label(row) for row in source.dataset) == [0, 0, 1, 1, 2, 2]
    first = source.check(2)
    assert [(info.width, info.height, info.mode) for info in first] == [(40, 32, "RGB")] * 2


@pytest.mark.parametrize(
    ("make", "split", "count"),
    [
        (make_parquet, "test", 2),
        (make_parquet, "train[:50%]", 3),
        (make_saved_dict, "train[1:3]+test", 4),
        (make_splits, "val", 1),
        (make_splits, "validation", 1),
        (make_classes, "train[:4]", 4),
    ],
)
def test_splits(make, split: str, count: int, tmp_path: Path) -> None:
    assert len(load_images(make(tmp_path / "set"), split=split)) == count


def test_relative_path_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_flat(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    source = load_images("set")
    assert source.item_name(source.row(0), 0).endswith("set/train_or_test_0.JPG")
    source = load_images(make_saved(tmp_path / "saved"))
    assert source.item_name(source.row(3), 3).endswith("saved (train), row 3")


def rows(tmp_path: Path, columns: dict, features: dict | None = None) -> str:
    Dataset.from_dict(columns, features=Features(features) if features else None).save_to_disk(tmp_path / "rows")
    return str(tmp_path / "rows")


def test_column_of_bytes_and_column_of_paths(tmp_path: Path) -> None:
    encoded = [encode(picture(n)) for n in range(2)]
    source = load_images(rows(tmp_path / "a", {"blob": encoded, "raw": [b"no image"] * 2}))
    assert source.image_column == "blob"
    assert decode_image(source.content(source.row(1))).size == (40, 32)
    structs = [{"bytes": content, "path": None} for content in encoded]
    assert load_images(rows(tmp_path / "b", {"x": [1, 2], "photo": structs})).image_column == "photo"
    write_folder(tmp_path / "c" / "rows", ["one.png", "two.png"])
    source = load_images(rows(tmp_path / "c", {"file": ["one.png", "two.png"], "caption": ["a cat", "a dog"]}))
    assert source.image_column == "file"
    assert decode_image(source.content(source.row(0))).size == (40, 32)


def test_label_column(tmp_path: Path) -> None:
    source = make_saved(tmp_path / "set")
    assert load_images(source).num_classes == 3
    assert load_images(source, label_column="id").label_column == "id"
    with pytest.raises(ImageSourceError, match=r"'kind'\?"):
        load_images(source, label_column="kin")
    with pytest.raises(ImageSourceError, match="expected ClassLabel or integers"):
        load_images(source, label_column="picture")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_wrong_column(streaming: bool, tmp_path: Path) -> None:
    source = make_parquet(tmp_path / "set")
    with pytest.raises(ImageSourceError, match=r"'pictur'.*Did you mean 'picture'.*id \(int64\).*kind \(ClassLabel\)"):
        load_images(source, column="pictur", streaming=streaming)
    with pytest.raises(ImageSourceError, match="'id' is int64 and holds no images"):
        load_images(source, column="id", streaming=streaming)


def test_no_and_several_image_columns(tmp_path: Path) -> None:
    with pytest.raises(ImageSourceError, match=r"no column holds images.*text \(string\)"):
        load_images(rows(tmp_path / "a", {"text": ["a", "b"]}))
    content = {"bytes": encode(picture()), "path": None}
    two = rows(tmp_path / "b", {"left": [content], "right": [content]}, {"left": Image(), "right": Image()})
    with pytest.raises(ImageSourceError, match=r"left, right.*Choose one"):
        load_images(two)
    assert load_images(two, column="right").image_column == "right"


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("make", [make_parquet, make_saved_dict, make_splits, make_classes, make_saved])
def test_unknown_split(make, streaming: bool, tmp_path: Path) -> None:
    with pytest.raises(ImageSourceError, match=r"no split 'tain'. Did you mean 'train'.*Splits: .*train"):
        load_images(make(tmp_path / "set"), split="tain", streaming=streaming)


def test_stream_cannot_be_sliced(tmp_path: Path) -> None:
    with pytest.raises(ImageSourceError, match="no length to slice"):
        load_images(make_parquet(tmp_path / "set"), split="train[:2]", streaming=True)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_missing_empty_and_broken(streaming: bool, tmp_path: Path) -> None:
    def fails(source: Path | str, message: str) -> None:
        with pytest.raises(ImageSourceError, match=message):
            load_images(source, streaming=streaming)

    fails(tmp_path / "nowhere", "no such file or folder")
    fails("./nowhere.parquet", "no such file or folder")
    fails(str(tmp_path / "*.parquet"), "no file matches")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no images")
    (tmp_path / "empty" / "notes.txt").write_text("text")
    fails(tmp_path / "empty", "holds no images")
    fails(tmp_path / "empty" / "notes.txt", "files of type '.txt'")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    fails(tmp_path / "broken.parquet", "cannot be read")
    whole = Path(make_parquet(tmp_path / "whole")) / "data" / "train-00000-of-00001.parquet"
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:300])
    fails(tmp_path / "cut.parquet", "cannot be read")
    (tmp_path / "broken.tar").write_bytes(b"not a tar")
    fails(tmp_path / "broken.tar", "cannot be read|holds no rows")
    table().select([]).to_parquet(tmp_path / "no_rows.parquet")
    fails(tmp_path / "no_rows.parquet", "no rows|cannot be read")


def test_unknown_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(ImageSourceError, match=r"neither a path.*nor a data set.*Connection.*HF_HUB_OFFLINE is set"):
        load_images("nobody/nothing")


def test_check_reports_broken_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", ["b.jpg"])
    (folder / "a.jpg").write_text("text")
    assert [Path(info.name).name for info in load_images(folder).check()] == ["b.jpg"]
    (folder / "b.jpg").write_text("text")
    with pytest.raises(ImageDecodeError, match=r"none of the first 2.*a\.jpg.*b\.jpg"):
        load_images(folder).check()


def test_a_class_called_train(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "vehicles", ["bus/0.jpg", "car/1.jpg", "train/2.jpg"])
    source = load_images(folder)
    assert (len(source), source.num_classes) == (3, 3)


def test_only_the_first_rank_shows_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    for rank, shown in (("1", False), ("0", True)):
        folder = make_parquet(tmp_path / rank)
        capfd.readouterr()
        monkeypatch.setenv("RANK", rank)
        load_images(folder)
        assert ("Generating" in capfd.readouterr().err) == shown
    assert datasets.is_progress_bar_enabled()


def test_folder_links_and_strays(tmp_path: Path) -> None:
    folder = Path(make_classes(tmp_path / "set"))
    (folder / "a" / "up").symlink_to(folder)
    (folder / "archive.tar").write_bytes(b"")
    (folder / ".hidden").mkdir()
    write_folder(folder / ".hidden", ["x.jpg"])
    assert len(load_images(folder)) == COUNT


def test_public_layouts(shared_data: Path) -> None:
    cifar = load_images(shared_data / "cifar10", split="test")
    assert (cifar.image_column, cifar.label_column, cifar.num_classes) == ("img", "label", 10)
    assert {(info.width, info.height, info.mode) for info in cifar.check(4)} == {(32, 32, "RGB")}
    imagenet = load_images(shared_data / "imagenet-sample", streaming=True)
    assert all(min(info.width, info.height) == 256 for info in imagenet.check(3))
    assert len(load_images(shared_data / "camvid" / "images", split="val")) == 101


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_data_set_is_recognised_wherever_it_lies(streaming: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", [f"{number}.jpg" for number in range(COUNT)])
    before = load_images(folder, streaming=streaming).fingerprint()
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert load_images(moved, streaming=streaming).fingerprint() == before
    changes = {
        "added": lambda: write_folder(moved, ["7.jpg"]),
        "removed": lambda: (moved / "7.jpg").unlink() or (moved / "3.jpg").unlink(),
        "renamed": lambda: (moved / "2.jpg").rename(moved / "3.jpg"),
        "replaced": lambda: [(moved / f"{n}.jpg").write_bytes(encode(picture(n + 50))) for n in (0, 1, 3, 4, 5)],
    }
    seen = {before}
    for change in changes.values():
        change()
        seen.add(load_images(moved, streaming=streaming).fingerprint())
    assert len(seen) == 1 + len(changes)


@pytest.mark.parametrize("name", ["a[1]", "[!x]", "{0..1}", "a*b ?", "train[2]"])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_folders_may_hold_signs_of_patterns(kind: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for shard in range(2):
        if kind == "tar":
            write_tar(folder / f"train-{shard}.tar", range(3 * shard, 3 * shard + 3))
        else:
            images = [encode(picture(number)) for number in range(3)]
            Dataset.from_dict({"image": images}).to_parquet(folder / f"train-{shard}.parquet")
    for streaming in (False, True):
        for below in ("", f"train-0.{kind}", f"train-*.{kind}", f"train-{{0..1}}.{kind}"):
            source = load_images(folder / below, streaming=streaming)
            assert len(source.check(6)) == (3 if below.startswith("train-0") else 6)
    with pytest.raises(ImageSourceError, match="no file matches this pattern"):
        load_images(folder / f"test-*.{kind}")


def test_names_that_readers_take_for_two_addresses_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "a::b", tmp_path / "set" / "a::b"):
        folder.mkdir(parents=True)
        write_tar(folder / "train.tar", range(2))
    for source in (tmp_path / "a::b", tmp_path / "a::b" / "train.tar", tmp_path / "set"):
        with pytest.raises(ImageSourceError, match=r"has .::. in it.*Rename it"):
            load_images(source)
    write_folder(tmp_path / "c::d", ["a.jpg"])
    assert len(load_images(tmp_path / "c::d").check()) == 1
