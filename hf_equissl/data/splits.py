"""What is judged by: the test split of a source, or a part that is held out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import UnknownSplitError
from .sources import ImageSource, load_images
from .subsets import SUBSET_SEED

logger = logging.getLogger(__name__)

TEST_SPLITS = ("test", "validation", "val", "valid", "dev")
# Share of the training images that is held out where there is no test split.
HELD_OUT = 0.1
# Fewer than these left to fit on, after some were held out, is a slip and no measurement.
FEWEST_TRAIN_IMAGES = 10


def load_test_split(
    source: str, train_split: str, test_split: str | None, options: Mapping[str, Any]
) -> tuple[ImageSource, str] | None:
    """Load the test split; return it with its name, or ``None`` where there is none.

    Args:
        source: As in ``load_images``.
        train_split: Not this one.
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
        source: Not a stream.
        train_images, test_images: How many; ``None``: all that are left, and a tenth.
        seed: Of the choice.

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
