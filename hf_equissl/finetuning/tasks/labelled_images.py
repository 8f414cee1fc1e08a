"""From a source of images to what tasks read: two splits of samples; for classification, with the same classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...data import ImageSource
from ...data.labels import match_classes
from ...data.splits import SourceSplits, load_splits
from ..settings import FineTuningSettings
from .base import Samples, Splits


class SourceSamples(Samples):
    """Images of a source with what else its rows hold: ``image`` (RGB), ``label``, and each of ``source.more``."""

    def __init__(self, source: ImageSource) -> None:
        self.source, self.name = source, source.name

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def read(self, index: int) -> dict[str, Any]:
        """Decode one image."""
        row = self.source.row(index)
        more = {name: row[column] for name, column in self.source.more.items()}
        return {"image": self.source.decode(self.source.content(row)), "label": self.source.label(row), **more}

    def item_name(self, index: int) -> str:
        """Return the path of an image, or the source and the row."""
        return self.source.item_name(self.source.row(index), index)


def load_sources(settings: FineTuningSettings, more_columns: Mapping[str, Sequence[str]] | None = None) -> SourceSplits:
    """Open both splits of ``settings.data``; without a test split, a tenth is held out.

    Args:
        settings: Names source, splits and columns.
        more_columns: As in ``load_images``.

    Raises:
        ValueError: source, split or column do not exist.
    """
    return load_splits(
        settings.data,
        settings.train_split,
        settings.test_split,
        settings.train_images,
        settings.test_images,
        {**settings.source_options, "more_columns": more_columns},
    )


def load_labelled_images(settings: FineTuningSettings) -> Splits:
    """Open both splits for classification; labels are 0 to the number of classes - 1, numbered over the training split.

    Raises:
        ValueError: as ``load_sources``; a split has no labels or unlabelled images; the test split has a class that the
            training split does not have; fewer than two classes; none of the first images decodes.
    """
    sources = load_sources(settings)
    sources = replace(sources, test=match_classes(sources.test, sources.train.classes, sources.train.name))
    classes = _classes(sources.train, sources.test)
    found = sources.limit(settings.train_images, settings.test_images)
    train, test = SourceSamples(found.train), SourceSamples(found.test)
    return Splits(train, test, found.train_split, found.test_split, classes, found.remarks())


def labels_of(source: ImageSource) -> np.ndarray:
    """Read the labels (n,), int64, without touching the images.

    Raises:
        ValueError: there are none, or images without one.
    """
    values = source.labels()
    if values is None:
        raise ValueError(
            f"{source.name} has no labels, which fine-tuning needs. "
            + (
                source.label_hint
                or "Name the column with --label_column, or give a folder with one sub-folder per class."
            )
        )
    labels = np.array([-1 if value is None else int(value) for value in values])
    if (missing := int((labels < 0).sum())) > 0:
        raise ValueError(
            f"{missing} of {len(labels)} images in {source.name} are unlabelled (-1). Give a split that is labelled "
            "throughout; the test split of many public data sets is not."
        )
    return labels


def _classes(train: ImageSource, test: ImageSource) -> tuple[str, ...]:
    """Find the names of the classes, by their numbers in both splits."""
    labels, judged = labels_of(train), labels_of(test)
    names = train.classes or test.classes or tuple(str(number) for number in range(int(labels.max()) + 1))
    if (largest := int(max(labels.max(), judged.max()))) >= len(names):
        raise ValueError(
            f"{train.name} has the classes 0 to {len(names) - 1}, but there is a label {largest}. "
            "Labels count from 0, and every class occurs in the training images."
        )
    if len(names) < 2:
        raise ValueError(f"{train.name} has {len(names)} class; a classifier needs two or more.")
    return names
