"""Splits of one data set: classes mean the same in all, and the same images are chosen wherever some are."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_equissl.data import ImageSource, ImageSourceError, Subset, load_images
from hf_equissl.data.labels import match_classes
from hf_equissl.data.splits import hold_out
from hf_equissl.data.subsets import apportion, choose_rows

from .image_files import encode, picture, write_folder, write_members

# The test split lacks the first class, and names the others in another order.
SPLITS = {"train": ["ant", "bee", "cat", "bee"], "test": ["cat", "bee"]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def text_columns(folder: Path, split: str, names: list[str]) -> None:
    images = [encode(picture(number)) for number in range(len(names))]
    Dataset.from_dict({"image": images, "label": names}).to_parquet(folder / f"{split}.parquet")


def class_columns(folder: Path, split: str, names: list[str]) -> None:
    order = list(dict.fromkeys(names)) if split == "test" else sorted(set(names))
    features = Features({"image": Value("binary"), "label": ClassLabel(names=order)})
    rows = {"image": [encode(picture(number)) for number in range(len(names))], "label": names}
    Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def class_folders(folder: Path, split: str, names: list[str]) -> None:
    write_folder(folder, [f"{split}/{name}/{number}.jpg" for number, name in enumerate(names)])


def tars(folder: Path, split: str, names: list[str]) -> None:
    members = [(f"{number}.jpg", encode(picture(number))) for number in range(len(names))]
    members += [(f"{number}.cls", name.encode()) for number, name in enumerate(names)]
    write_members(folder / f"{split}.tar", sorted(members))


def metadata(folder: Path, split: str, names: list[str]) -> None:
    write_folder(folder / split, [f"{number}.jpg" for number in range(len(names))])
    lines = [json.dumps({"file_name": f"{number}.jpg", "label": name}) for number, name in enumerate(names)]
    (folder / split / "metadata.jsonl").write_text("\n".join(lines))


def names_of(source: ImageSource) -> list[str]:
    return sorted(source.classes[source.label(row)] for row in source.dataset)


@pytest.mark.parametrize(
    ("write", "streaming"),
    [
        (text_columns, False),
        (class_columns, False),
        (class_columns, True),
        (class_folders, False),
        (class_folders, True),
        (tars, False),
        (metadata, False),
    ],
)
def test_classes_of_a_test_split_have_the_numbers_of_the_training_split(write, streaming: bool, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, names in SPLITS.items():
        write(folder, split, names)
    train, test = (load_images(folder, split=split, streaming=streaming) for split in SPLITS)
    assert test.classes != train.classes == ("ant", "bee", "cat")
    same = match_classes(test, train.classes, train.name)
    assert (same.classes, same.num_classes) == (train.classes, 3)
    assert sorted(same.label(row) for row in same.dataset) == [1, 2]
    for source in (train, test, same):
        assert names_of(source) == sorted(SPLITS["train" if source is train else "test"])
    assert len(same.check()) == 2
    with pytest.raises(ImageSourceError, match=r"1 class that .* does not have: 'ant' \(1 image\)\. What is fitted"):
        list(match_classes(train, test.classes, test.name).dataset)


def test_unlabelled_images_stay_unlabelled_and_classes_without_names_stay_as_they_are(tmp_path: Path) -> None:
    features = Features({"image": Value("binary"), "label": ClassLabel(names=["b", "unused", "a"])})
    rows = {"image": [encode(picture())] * 4, "label": [0, None, -1, 2]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    source = load_images(tmp_path / "train.parquet")
    same = match_classes(source, ["a", "b"], "others")
    assert [same.label(row) for row in same.dataset] == [1, None, -1, 0]
    assert match_classes(source, (), "numbers alone") is source


def test_kinds_of_labels_may_differ_between_metadata_files(tmp_path: Path) -> None:
    for split, names in (("train", ["01", "x", "2"]), ("test", ["2", "01"])):
        write_folder(tmp_path / "set" / split, [f"{number}.jpg" for number in range(len(names))])
        lines = ["file_name,label", *(f"{number}.jpg,{name}" for number, name in enumerate(names))]
        (tmp_path / "set" / split / "metadata.csv").write_text("\n".join(lines))
    train, test = (load_images(tmp_path / "set", split=split) for split in ("train", "test"))
    same = match_classes(test, train.classes, train.name)
    assert [train.classes[same.label(row)] for row in same.dataset] == ["2", "01"]


# ---- subsets ----


def test_chosen_rows_are_fixed_and_named_by_their_numbers_in_the_whole(tmp_path: Path) -> None:
    rows = {"image": [encode(picture(number)) for number in range(40)]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    source = load_images(tmp_path / "train.parquet")
    chosen = choose_rows(40, 10)
    assert len(set(chosen.tolist())) == 10
    assert chosen.tolist() == sorted(chosen)
    np.testing.assert_array_equal(chosen, choose_rows(40, 10))
    assert choose_rows(40, 10, seed=1).tolist() != chosen.tolist()
    assert choose_rows(40, 50).tolist() == list(range(40))
    part = source.take(chosen).take(np.array([2, 5]))
    for place, number in enumerate((chosen[2], chosen[5])):
        assert part.content(part.row(place)) == source.content(source.row(int(number)))
        assert part.item_name(part.row(place), place).endswith(f"row {number}")
    kept, held_out = hold_out(source, None, None)
    assert (len(kept), len(held_out)) == (36, 4)
    assert not set(kept.tolist()) & set(held_out.tolist())
    assert set(hold_out(source, 8, None)[0].tolist()) < set(kept.tolist())
    with pytest.raises(ValueError, match=r"is 31, but .* 40 images .* 9 would be left to fit on"):
        hold_out(source, None, 31)
    with pytest.raises(ValueError, match="streamed and has no test split"):
        hold_out(load_images(tmp_path / "train.parquet", streaming=True), None, None)
    with pytest.raises(ImageSourceError, match="cannot be chosen by number"):
        load_images(tmp_path / "train.parquet", streaming=True, subset={"share": 0.5})


def test_a_subset_and_its_rest_are_the_whole(tmp_path: Path) -> None:
    names = ["ant"] * 30 + ["bee"] * 10
    text_columns(tmp_path, "train", names)
    whole = load_images(tmp_path / "train.parquet")
    for given in ({"share": 0.8}, {"images": 32}, {"share": 0.8, "stratified": True}, {"share": 0.8, "seed": 3}):
        first, rest = (load_images(tmp_path / "train.parquet", subset={**given, "part": p}) for p in ("first", "rest"))
        assert (len(first), len(rest)) == (32, 8)
        numbers = sorted([*first.numbers.tolist(), *rest.numbers.tolist()])
        assert numbers == list(range(40))
        assert [row["image"] for row in first.dataset] == [whole.content(whole.row(n)) for n in first.numbers.tolist()]
        counts = [[part.label(row) for row in part.dataset].count(1) for part in (first, rest)]
        assert sum(counts) == 10
        assert counts == [8, 2] or "stratified" not in given
    np.testing.assert_array_equal(
        load_images(tmp_path / "train.parquet", subset={"images": 7}).numbers, choose_rows(40, 7)
    )
    assert first.fingerprint() != rest.fingerprint()
    assert "0.8 of the images, seed 3" in first.name
    assert len(load_images(tmp_path / "train.parquet", subset={"images": 90})) == 40
    with pytest.raises(ImageSourceError, match="no image of 40 is left"):
        load_images(tmp_path / "train.parquet", subset={"images": 90, "part": "rest"})
    write_folder(tmp_path / "flat", ["a.jpg", "b.jpg"])
    with pytest.raises(ImageSourceError, match="stratified needs the classes"):
        load_images(tmp_path / "flat", subset={"share": 0.5, "stratified": True})


@pytest.mark.parametrize(
    ("given", "total"),
    [({"images": 15}, 15), ({"images": 5}, 5), ({"images": 250}, 100), ({"share": 0.05}, 5), ({"share": 0.45}, 45)],
)
def test_a_stratified_subset_has_as_many_images_as_were_asked_for(given: dict[str, float], total: int) -> None:
    labels = [number % 10 for number in range(100)]
    first, rest = (Subset(**given, stratified=True, part=part).rows(100, labels) for part in ("first", "rest"))
    assert sorted([*first, *rest]) == list(range(100))
    assert len(first) == total
    counts = np.bincount(first % 10, minlength=10)
    assert set(counts) <= {total // 10, -(-total // 10)}
    np.testing.assert_array_equal(first, Subset(**given, stratified=True).rows(100, labels))


def test_apportionment_by_largest_remainders() -> None:
    assert apportion(10, [53, 24, 23]) == [5, 3, 2]  # 5.3, 2.4, 2.3
    assert apportion(1, [1, 1, 1]) == [1, 0, 0]
    assert apportion(0, [4, 5]) == [0, 0]
    assert apportion(9, [4, 5]) == [4, 5]
    assert apportion(0, [0]) == [0]
    assert Subset(images=15, stratified=True).describe() == "15 images in proportion to the classes, seed 0"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either share or images"),
        ({"share": 0.5, "images": 3}, "either share or images"),
        ({"share": 1.5}, "share: expected a number between 0 and 1, got 1.5"),
        ({"images": 0}, "images: expected 1 or more"),
        ({"share": 0.5, "part": "second"}, "part: expected first or rest, got 'second'"),
        ({"share": 0.5, "seed": -1}, "seed: expected 0 or more"),
    ],
)
def test_subsets_that_mean_nothing(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subset(**given)
