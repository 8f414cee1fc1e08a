"""Rows that are missing, broken or unlike the first one: found, counted, and named one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_equissl.data import (
    ImageSourceError,
    SkippedImage,
    SkippedImages,
    StreamingViewDataset,
    TooManyBadImages,
    load_images,
)
from hf_equissl.evaluation.data import image_set
from hf_equissl.views.needs import Needs
from hf_equissl.views.pipelines import ViewPipeline, build_pipeline

from .image_files import encode, picture, write_folder

BROKEN = encode(picture())[:200]
IMAGES = {"image": datasets.Image(decode=False)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def pipeline() -> ViewPipeline:
    return build_pipeline(
        "vicreg", image_size=8, transformation=None, needs=Needs(), image_mean=(0.5,) * 3, image_std=(0.5,) * 3
    )


def parquet(path: Path, columns: dict[str, list[Any]], features: dict[str, Any] | None = None) -> str:
    path.parent.mkdir(exist_ok=True)
    Dataset.from_dict(columns, features=Features(features) if features else None).to_parquet(path)
    return str(path)


def encoded(count: int, bad: set[int] = frozenset(), missing: set[int] = frozenset()) -> list[bytes | None]:
    contents = [BROKEN if number in bad else encode(picture(number)) for number in range(count)]
    return [None if number in missing else content for number, content in enumerate(contents)]


# ---- streams ----


def train_on(source: Any, pipeline: ViewPipeline, steps: int, batch: int = 4) -> SkippedImages:
    """What a run of so many steps does with bad files."""
    health = SkippedImages(0.01)
    samples = iter(StreamingViewDataset(source, pipeline, seed=0, shuffle_buffer=8))
    for _ in range(steps):
        drawn = [next(samples) for _ in range(batch)]
        health.update([item for sample in drawn for item in sample["skipped"]], seen=batch)
    return health


@pytest.mark.parametrize(
    ("column", "features"),
    [
        ([{"bytes": content, "path": None} for content in encoded(40, set(range(0, 40, 4)))], IMAGES),
        ([{"bytes": content, "path": "a.jpg"} for content in encoded(40, set(range(0, 40, 4)))], IMAGES),
        ([{"bytes": content, "path": "/abs/a.jpg"} for content in encoded(40, set(range(0, 40, 4)))], IMAGES),
        (encoded(40, set(range(1, 40, 4))), None),
        (encoded(40, missing=set(range(1, 40, 4))), None),
    ],
    ids=["no path", "one path", "one absolute path", "binary", "null rows"],
)
def test_bad_images_of_a_stream_are_counted_one_by_one(
    column: list[Any], features: Any, tmp_path: Path, pipeline: ViewPipeline
) -> None:
    source = load_images(parquet(tmp_path / "a.parquet", {"image": column}, features), streaming=True)
    with pytest.raises(TooManyBadImages, match=r"(?s)10 of .*a\.parquet, row \d+"):
        train_on(source, pipeline, steps=30)


def test_few_bad_images_of_a_short_stream_are_judged_when_they_come_again(
    tmp_path: Path, pipeline: ViewPipeline
) -> None:
    source = load_images(parquet(tmp_path / "a.parquet", {"image": encoded(24, {3, 9, 12, 20})}), streaming=True)
    with pytest.raises(TooManyBadImages, match=r"4 of [23]\d images"):
        train_on(source, pipeline, steps=20)
    fine = load_images(parquet(tmp_path / "b.parquet", {"image": encoded(120, {3})}), streaming=True)
    assert train_on(fine, pipeline, steps=70).count == 1


def test_ranks_tell_each_other_that_a_file_came_again() -> None:
    ranks = [SkippedImages(0.01) for _ in range(2)]

    def exchange() -> list[bool]:
        own = [(dict(rank._untold), rank._seen_untold, rank._came_again) for rank in ranks]
        stopped = []
        for rank in ranks:
            try:
                rank.exchange(lambda _: own)
                stopped.append(False)
            except TooManyBadImages:
                stopped.append(True)
        return stopped

    ranks[0].update([SkippedImage("a", "truncated")], seen=9, judge=False)
    ranks[1].update([], seen=10, judge=False)
    assert exchange() == [False, False]
    ranks[0].update([], seen=10, judge=False)
    ranks[1].update([SkippedImage("a", "truncated")], seen=9, judge=False)
    assert exchange() == [True, True]


# ---- columns ----


def test_a_named_column_is_trusted(tmp_path: Path) -> None:
    contents = encoded(40, missing={0})
    source = load_images(parquet(tmp_path / "a.parquet", {"img": contents, "id": list(range(40))}), column="img")
    assert len(source.check(40)) == 39
    odd = [None, *["https://server/image?id=7"] * 20]
    for number, values in enumerate((contents, odd, [b"", *contents[1:]], ["photo-without-suffix"] * 4, [None] * 20)):
        named = load_images(parquet(tmp_path / f"{number}.parquet", {"x": values}), column="x")
        assert named.image_column == "x"


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    "values",
    [
        encoded(20, missing={0, 1, 2}),
        [b"", *encoded(19)],
        [BROKEN[:0] or b"no image", *encoded(19)],
        [None, *[f"https://server/{n}.jpg?X-Signature=a.b&n=1" for n in range(19)]],
        [None, *[{"bytes": content, "path": "a", "height": 3} for content in encoded(19)]],
        [None, *[{"path": f"{n}.jpg", "caption": "a cat"} for n in range(19)]],
    ],
    ids=["null", "empty", "broken", "signed", "struct with more", "struct of path"],
)
def test_several_rows_are_looked_at(values: list[Any], streaming: bool, tmp_path: Path) -> None:
    columns = {"text": ["see photo.jpg", *["nothing to see"] * (len(values) - 1)], "x": values}
    assert load_images(parquet(tmp_path / "a.parquet", columns), streaming=streaming).image_column == "x"


# ---- labels ----


def labelled(tmp_path: Path, labels: list[Any], kind: Any = None, **options: Any) -> Any:
    columns = {"image": encoded(len(labels)), "label": labels}
    features = {"image": Value("binary"), "label": kind} if kind else None
    return load_images(parquet(tmp_path / "a.parquet", columns, features), **options)


def test_classes_of_every_kind(tmp_path: Path) -> None:
    texts = labelled(tmp_path / "a", ["dog", "cat", None, "dog"])
    assert texts.dataset.features["label"].names == ["cat", "dog"]
    assert (texts.num_classes, [texts.label(row) for row in texts.dataset]) == (2, [1, 0, None, 1])
    assert image_set(texts, "a", "train").labels.tolist() == [1, 0, -1, 1]
    whole = labelled(tmp_path / "b", [1.0, 0.0, None, 2.0])
    assert [whole.label(row) for row in whole.dataset] == [1, 0, None, 2]
    flags = labelled(tmp_path / "c", [True, False, True])
    assert [flags.label(row) for row in flags.dataset] == [1, 0, 1]
    assert [row["image"][:2] for row in texts.dataset] == [b"\xff\xd8"] * 4


def test_labels_that_cannot_be_classes_are_explained(tmp_path: Path) -> None:
    fractions = labelled(tmp_path / "a", [0.25, 1.0])
    assert fractions.label_column is None
    assert "holds 0.25: classes are integers or names" in fractions.label_hint
    with pytest.raises(ImageSourceError, match=r"holds 0\.25"):
        labelled(tmp_path / "b", [0.25, 1.0], label_column="label")
    stream = labelled(tmp_path / "c", ["cat", "dog"], streaming=True)
    assert stream.label_column is None
    assert "a stream cannot number" in stream.label_hint
    with pytest.raises(ImageSourceError, match="a stream cannot number"):
        labelled(tmp_path / "d", ["cat", "dog"], streaming=True, label_column="label")


def test_several_columns_of_classes_are_named(tmp_path: Path) -> None:
    columns = {"image": encoded(2), "fine": [0, 1], "coarse": [0, 0]}
    classes = {"image": Value("binary"), "fine": ClassLabel(names=["a", "b"]), "coarse": ClassLabel(names=["c"])}
    path = parquet(tmp_path / "a.parquet", columns, classes)
    source = load_images(path)
    assert source.label_column is None
    assert "fine, coarse. Choose one: --label_column" in source.label_hint
    with pytest.raises(ValueError, match=r"fine, coarse\. Choose one"):
        image_set(source, "a", "train").require_labels("This probe")
    assert load_images(path, label_column="coarse").num_classes == 1


def test_one_broken_row_does_not_change_the_columns(tmp_path: Path) -> None:
    assert load_images(write_folder(tmp_path / "set", ["a.jpg", "b.jpg"])).label_hint == ""
