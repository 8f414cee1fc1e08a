"""From a source of images to what fine-tuning reads: two labelled splits with the same classes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from ..data import ImageDecodeError, ImageSource, decode_image, load_images
from ..encoders.base_image import base_image
from ..evaluation.data import HELD_OUT, load_test_split
from .settings import FineTuningSettings

logger = logging.getLogger(__name__)
# The label of an image that does not decode: losses and metrics pass over it.
NO_LABEL = -100
SUBSET_SEED = 0  # as for the probes: the same images are held out and chosen


@dataclass(frozen=True)
class LabelledImages:
    """Images to train on and images to judge by.

    Attributes:
        train, test: Sources, not streamed; labels are 0 to the number of classes - 1.
        train_split, test_split: What they are called, for records.
        classes: Names, in the order of the labels.
    """

    train: ImageSource
    test: ImageSource
    train_split: str
    test_split: str
    classes: tuple[str, ...]


def load_labelled_images(settings: FineTuningSettings) -> LabelledImages:
    """Both splits of ``settings.data``, checked.

    Raises:
        ValueError: source, split or column do not exist; a split has no labels, unlabelled images or other classes than
            the other; fewer than two classes; none of the first images decodes.
    """
    options: dict[str, Any] = {
        "column": settings.image_column,
        "label_column": settings.label_column,
        "config_name": settings.config_name,
    }
    train = load_images(settings.data, split=settings.train_split, **options)
    train_split = settings.train_split
    found = load_test_split(settings.data, settings.train_split, settings.test_split, options)
    if found is not None:
        test, test_split = found
    else:
        train, test = _hold_out(train, settings)
        train_split, test_split = f"{train_split} (without held-out)", f"{train_split} (held-out)"
    classes = _classes(train, test)
    train, test = _subset(train, settings.train_images), _subset(test, settings.test_images)
    for source in (train, test):
        source.check()
    return LabelledImages(train, test, train_split, test_split, classes)


def _hold_out(source: ImageSource, settings: FineTuningSettings) -> tuple[ImageSource, ImageSource]:
    total = len(source)
    count = settings.test_images or max(1, round(HELD_OUT * total))
    if count >= total:
        raise ValueError(
            f"--test_images {count}: {source.name} has {total} images and no test split, so nothing would be left to "
            "train on. Hold fewer out, or name a test split (--test_split)."
        )
    order = np.random.default_rng(SUBSET_SEED).permutation(total)
    return _rows(source, np.sort(order[count:])), _rows(source, np.sort(order[:count]))


def _subset(source: ImageSource, limit: int | None) -> ImageSource:
    if limit is None or limit >= len(source):
        return source
    return _rows(source, np.sort(np.random.default_rng(SUBSET_SEED).permutation(len(source))[:limit]))


def _rows(source: ImageSource, rows: np.ndarray) -> ImageSource:
    if not isinstance(source.dataset, datasets.Dataset):
        raise TypeError(f"{source.name} is streamed.")
    return replace(source, dataset=source.dataset.select(rows))


def labels_of(source: ImageSource) -> np.ndarray:
    """Labels (n,) int64, read without touching the images.

    Raises:
        ValueError: there are none, or images without one.
    """
    if source.label_column is None:
        raise ValueError(
            f"{source.name} has no labels, which fine-tuning needs. Name the column with --label_column, or give a "
            "folder with one sub-folder per class."
        )
    values = source.dataset.select_columns([source.label_column])[:][source.label_column]
    labels = np.array([-1 if value is None else int(value) for value in values])
    if (missing := int((labels < 0).sum())) > 0:
        raise ValueError(
            f"{missing} of {len(labels)} images in {source.name} are unlabelled (-1). Give a split that is labelled "
            "throughout; the test split of many public data sets is not."
        )
    return labels


def _classes(train: ImageSource, test: ImageSource) -> tuple[str, ...]:
    """Names of the classes that both splits have."""
    labels, judged = labels_of(train), labels_of(test)
    names, others = _names(train), _names(test)
    if names is not None and others is not None and names != others:
        sides = ((set(names) - set(others), train.name), (set(others) - set(names), test.name))
        only = [f"{', '.join(sorted(extra)[:5])} only in {where}" for extra, where in sides if extra]
        raise ValueError(
            f"{train.name} and {test.name} have different classes ({len(names)} and {len(others)}): "
            f"{'; '.join(only) or 'the same names in another order'}. A label must mean the same in both."
        )
    if names is None:
        names = others or [str(number) for number in range(int(labels.max()) + 1)]
    if (largest := int(max(labels.max(), judged.max()))) >= len(names):
        raise ValueError(
            f"{train.name} has the classes 0 to {len(names) - 1}, but there is a label {largest}. "
            "Labels count from 0, and every class occurs in the training images."
        )
    if len(names) < 2:
        raise ValueError(f"{train.name} has {len(names)} class; a classifier needs two or more.")
    return tuple(names)


def _names(source: ImageSource) -> list[str] | None:
    feature = (source.dataset.features or {}).get(source.label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


class EvaluationImages(Dataset[dict[str, Any]]):
    """Base images of a source for judging: uint8 pixels (3, S, S) and labels.

    An image that does not decode has the label ``NO_LABEL`` and black pixels; one warning names it.
    """

    def __init__(self, source: ImageSource, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        """Images."""
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample."""
        row = self.source.row(index)
        try:
            pixels = base_image(decode_image(self.source.content(row)), self.size)
        except ImageDecodeError as error:
            logger.warning("Skipped %s: %s", self.source.item_name(row, index), error)
            return {"pixels": torch.zeros(3, self.size, self.size, dtype=torch.uint8), "labels": NO_LABEL}
        return {"pixels": pixels, "labels": int(self.source.label(row) or 0)}
