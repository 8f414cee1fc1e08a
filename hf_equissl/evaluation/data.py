"""From a source of images to what evaluators are given: splits, fixed subsets, labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import torch

from ..data import ImageSource, list_remarks, load_images
from ..data.labels import match_classes
from ..data.splits import load_splits, load_test_split
from ..data.subsets import Subset, choose_rows, take_subset
from .images import ImageSet
from .named_sets import find_set, is_named

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class EvaluationData:
    """What evaluators are given: images to fit probes on, and images to judge them by.

    An evaluator that needs more than images and classes names a subclass as its ``data_type``: one with further fields
    and a ``load`` that fills them.

    Attributes:
        train: What probes are fitted on.
        test: What they are judged by.
        further_tests: Other images to judge the same probes on, e.g. ImageNet-R for those fitted on ImageNet.
        metric: What classifiers are judged by, "top1" or "mean_per_class".
    """

    train: ImageSet
    test: ImageSet
    further_tests: tuple[ImageSet, ...] = ()
    metric: str = "top1"

    @classmethod
    def load(cls, source: str, **options: Any) -> Self:
        """Read the data that the command line names; ``options`` are those of ``load_evaluation_data``."""
        data = load_evaluation_data(source, **options)
        return cls(data.train, data.test, data.further_tests, data.metric)

    @property
    def tests(self) -> tuple[ImageSet, ...]:
        """All test sets, the one to quote first."""
        return (self.test, *self.further_tests)

    @property
    def is_labelled(self) -> bool:
        """Whether every image of every part has a class."""
        return all(part.is_labelled for part in (self.train, *self.tests))

    @property
    def num_classes(self) -> int:
        """Number of classes, by the largest label of any part."""
        labels = torch.cat([part.require_labels("Counting classes") for part in (self.train, *self.tests)])
        return int(labels.max()) + 1


class _SourceImages(Sequence[Any]):
    """Encoded images of a source, read when they are asked for; of a stream, those of its first ``rows``, kept."""

    def __init__(self, source: ImageSource, rows: Any) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: Any) -> Any:
        return self.source.content(self.rows[position])

    def item_name(self, position: int) -> str:
        return self.source.item_name(self.rows[position], position)


def load_evaluation_data(
    source: str,
    *,
    train_split: str = "train",
    test_split: str | None = None,
    train_subset: Mapping[str, Any] | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
    further_tests: Sequence[Sequence[str]] = (),
    subset_seed: int = 0,
    num_workers: int = 0,
    cache_bytes: int = 4 << 30,
    max_bad_share: float = 0.01,
    feature_storage: str = "fp32",
    progress: bool = True,
    **source_options: Any,
) -> EvaluationData:
    """Read training and test images of a source.

    Args:
        source: Whatever ``hf_equissl.data.load_images`` reads: Hub id, parquet, image folder, stream, ...; or a set by
            name, ``set:pets`` or ``set:pets=FOLDER``, with the splits, columns and metric of ``NAMED_SETS``.
        train_split: Split on which probes are fitted.
        test_split: Split on which they are judged; ``None``: the first of test, validation, val that exists, otherwise
            a tenth of the training split is held out.
        train_subset: Fit probes on a part of the training images alone: the fields of a ``Subset``. It is recorded.
        train_images: Use a fixed random subset of this size (of a stream: its first images); ``None``: all.
        test_images: The most images of each test set.
        further_tests: More test sets, each a source, or a source and a split; also by name. Where both name classes,
            labels are those of the training images' classes.
        subset_seed: Seed of the subsets and of what is held out.
        num_workers: Processes that decode; 0: this one.
        cache_bytes: Base images are kept in memory up to this size per split.
        max_bad_share: Share of either split's images that may fail to decode; they are left out.
        feature_storage: In which type features of the images as they are lie in memory: "fp32", "bf16" or "fp16".
        progress: Whether to show bars.
        **source_options: Further arguments of ``load_images``: ``column``, ``label_column``, ``config_name``, ...

    Raises:
        ValueError: if the source, a split or a column does not exist, or if too few images are left.
    """
    for name, count in (("train_images", train_images), ("test_images", test_images)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    for named in further_tests:
        if len(named) not in (1, 2):
            raise ValueError(f"--further_test {' '.join(named)}: expected a source, or a source and a split.")
    shared = {name: value for name, value in source_options.items() if name != "config_name"}
    metric = "top1"
    if is_named(source):
        source, chosen = find_set(source, fitted=True)
        metric, test_split = chosen.metric, test_split or chosen.test_split or None
        source_options = chosen.columns() | source_options
    sources = load_splits(source, train_split, test_split, train_images, test_images, source_options, seed=subset_seed)
    train, fitted = take_train_subset(sources.train, sources.train_split, train_subset)
    _say_remarks(sources.remarks())
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "cache_bytes": cache_bytes,
        "max_bad_share": max_bad_share,
        "feature_storage": feature_storage,
        "progress": progress,
    }
    others = tuple(
        _further_test(sources.train, *named, limit=test_images, subset_seed=subset_seed, load=shared, **options)
        for named in further_tests
    )
    judged = match_classes(sources.test, sources.train.classes, sources.train.name)
    return EvaluationData(
        image_set(train, source, fitted, train_images, subset_seed, **options),
        image_set(judged, source, sources.test_split, test_images, subset_seed, **options),
        others,
        metric,
    )


def take_train_subset(train: ImageSource, split: str, subset: Mapping[str, Any] | None) -> tuple[ImageSource, str]:
    """Take what ``subset`` says of the training images, ``None`` for all; return them and what records call them.

    Raises:
        ValueError: They are a stream, have no classes although the choice needs them, or none is left.
    """
    if subset is None:
        return train, split
    chosen = Subset(**subset)
    return take_subset(train, chosen), f"{split} ({chosen.describe()})"


def _further_test(
    train: ImageSource,
    source: str,
    split: str | None = None,
    *,
    limit: int | None,
    subset_seed: int,
    load: dict[str, Any],
    **options: Any,
) -> ImageSet:
    """Open one more test set, with the labels of the training images' classes where both sides name their classes.

    Raises:
        ValueError: it cannot be read, or has a class that the training images do not have.
    """
    if is_named(source):
        source, chosen = find_set(source)
        load, split = chosen.columns() | load, split or chosen.test_split or None
    named = load_test_split(source, "", split, load)
    images, split = named or (load_images(source, **load), "train")
    _say_remarks(list_remarks(images))
    judged = match_classes(images, train.classes, train.name)
    return image_set(judged, source, split, limit, subset_seed, **options)


def _say_remarks(lines: Sequence[str]) -> None:
    for line in lines:
        logger.info("%s", line)


def image_set(
    images: ImageSource, dataset: str, split: str, limit: int | None = None, subset_seed: int = 0, **options: Any
) -> ImageSet:
    """Make the ``ImageSet`` of a source, or of ``limit`` fixed random images of it (of a stream: the first ones)."""
    rows: Any
    if images.streaming:
        rows = list(islice(iter(images.dataset), limit))
        labels = None if images.label_column is None else [images.label(row) for row in rows]
    else:
        images = images.take(choose_rows(len(images), limit, subset_seed))
        rows, labels = images.dataset, images.labels()
    return ImageSet(
        _SourceImages(images, rows),
        # -1 is the sign for "unlabelled" in public data sets.
        None if labels is None else torch.tensor([-1 if label is None else label for label in labels]),
        dataset,
        split,
        decoding=images.decoding,
        label_hint=images.label_hint,
        **options,
    )
