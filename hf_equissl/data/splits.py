"""What is judged by: the test split of a source, or a part that is held out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .errors import UnknownSplitError
from .remarks import list_remarks
from .sources import ImageSource, load_images
from .subsets import SUBSET_SEED, choose_rows

logger = logging.getLogger(__name__)

TEST_SPLITS = ("test", "validation", "val", "valid", "dev")
# Share of the training images that is held out where there is no test split.
HELD_OUT = 0.1
# A measurement with fewer images than these left to fit on, after some were held out, would be a slip.
FEWEST_TRAIN_IMAGES = 10


@dataclass(frozen=True)
class SourceSplits:
    """What is fitted on, and what is judged by.

    Attributes:
        train, test: The sources.
        train_split, test_split: What they are called, for records.
    """

    train: ImageSource
    test: ImageSource
    train_split: str
    test_split: str

    def remarks(self) -> tuple[str, ...]:
        """List what people should know of the images of both; see ``list_remarks``."""
        return tuple(dict.fromkeys(line for source in (self.train, self.test) for line in list_remarks(source)))

    def limit(self, train_images: int | None, test_images: int | None) -> SourceSplits:
        """Choose fixed random subsets of these sizes, ``None`` for all, and decode the first images of both.

        Raises:
            ImageDecodeError: None of them decodes.
        """
        train, test = (
            source.take(choose_rows(len(source), limit))
            for source, limit in ((self.train, train_images), (self.test, test_images))
        )
        for source in (train, test):
            source.check()
        return replace(self, train=train, test=test)


def load_splits(
    source: str,
    train_split: str,
    test_split: str | None,
    train_images: int | None,
    test_images: int | None,
    options: Mapping[str, Any],
    seed: int = SUBSET_SEED,
) -> SourceSplits:
    """Load both splits of a source; without a test split, a part of the training split is held out.

    Args:
        source: As in ``load_images``.
        train_split, test_split: Names; the latter as in ``load_test_split``.
        train_images, test_images: How many of each there will be, where some are held out, as in ``hold_out``.
        options: Further arguments of ``load_images``.
        seed: Seed of what is held out.

    Raises:
        ValueError: As ``load_images``, ``load_test_split`` and ``hold_out``.
    """
    train = load_images(source, split=train_split, **options)
    test = load_test_split(source, train_split, test_split, options)
    return pair_splits(train, test, train_split, train_images, test_images, seed)


def pair_splits(
    train: ImageSource,
    test: tuple[ImageSource, str] | None,
    train_split: str,
    train_images: int | None,
    test_images: int | None,
    seed: int = SUBSET_SEED,
) -> SourceSplits:
    """Pair the training split with the test split (and its name) or, where there is none, with a part held out of it.

    Raises:
        ValueError: As ``hold_out``.
    """
    if test is not None:
        return SourceSplits(train, test[0], train_split, test[1])
    kept, held_out = (train.take(rows) for rows in hold_out(train, train_images, test_images, seed))
    return SourceSplits(kept, held_out, f"{train_split} (without held-out)", f"{train_split} (held-out)")


def load_test_split(
    source: str, train_split: str, test_split: str | None, options: Mapping[str, Any]
) -> tuple[ImageSource, str] | None:
    """Load the test split; return it with its name, or ``None`` where there is none.

    Args:
        source: As in ``load_images``.
        train_split: Name of the training split, which is not taken.
        test_split: A name, or ``None`` for the first of ``TEST_SPLITS`` that exists.
        options: Further arguments of ``load_images``.

    Raises:
        ValueError: ``test_split`` does not exist, or the source cannot be read.
    """
    if test_split is not None:
        return load_images(source, split=test_split, **options), test_split
    for split in TEST_SPLITS:
        if split != train_split:
            try:
                return load_images(source, split=split, **options), split
            except UnknownSplitError as error:
                logger.debug("No %s split: %s", split, error)
    logger.info("%s has no test split: a part of %s is held out.", source, train_split)
    return None


def hold_out(
    source: ImageSource, train_images: int | None, test_images: int | None, seed: int = SUBSET_SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Divide the rows of a source without a test split into some to fit on and some to judge by, both ascending.

    Args:
        source: The source, not a stream.
        train_images, test_images: How many; ``None``: all that are left, and a tenth.
        seed: Seed of the choice.

    Raises:
        ValueError: It is a stream, or too few images would be left.
    """
    if source.streaming:
        raise ValueError(f"{source.name} is streamed and has no test split: name one with test_split (--test_split).")
    total = len(source)
    if test_images is not None and total - test_images < FEWEST_TRAIN_IMAGES:
        raise ValueError(
            f"test_images (--test_images) is {test_images}, but {source.name} has {total} images and there is no test "
            f"split: {max(0, total - test_images)} would be left to fit on, at least {FEWEST_TRAIN_IMAGES} are needed. "
            "Hold fewer out, or name a test split (--test_split)."
        )
    order = np.random.default_rng(seed).permutation(total)
    count = min(test_images or max(1, round(HELD_OUT * total)), total - 1)
    if count < 1:
        raise ValueError(f"{source.name} has {total} image(s): too few to hold some out for testing.")
    return np.sort(order[count:][:train_images]), np.sort(order[:count])
