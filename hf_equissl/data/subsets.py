"""A fixed random part of the rows of a source: one rule for pretraining, probes and fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .errors import ImageSourceError

if TYPE_CHECKING:
    from .sources import ImageSource

# The seed where nothing else is said: probes and fine-tuning take the same images.
SUBSET_SEED = 0
PARTS = ("first", "rest")


@dataclass(frozen=True)
class Subset:
    """Which rows of a source are taken, in their own order.

    ``share: 0.8`` and ``share: 0.8, part: rest`` are two parts of one whole, such as 80 % to train on and 20 % to judge
    by.

    Attributes:
        share: Share of the rows, between 0 and 1.
        images: How many, in place of a share.
        part: "first" for those that are drawn, "rest" for the others.
        seed: Seed of the draw.
        stratified: Draw the same share of each class, as nearly as whole images can: together they are as many as
            without it.

    Raises:
        ValueError: A value means nothing.
    """

    share: float | None = None
    images: int | None = None
    part: str = "first"
    seed: int = SUBSET_SEED
    stratified: bool = False

    def __post_init__(self) -> None:
        """Refuse values that choose no images."""
        if (self.share is None) == (self.images is None):
            raise ValueError(f"expected either share or images, got share {self.share} and images {self.images}.")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share: expected a number between 0 and 1, got {self.share}.")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images: expected 1 or more, got {self.images}.")
        if self.part not in PARTS:
            raise ValueError(f"part: expected {' or '.join(PARTS)}, got {self.part!r}.")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}.")

    def describe(self) -> str:
        """Return a few words for names of sources."""
        by_share = self.images is None
        size = f"{self.share:.6g} of the images" if by_share else f"{self.images} images"
        classes = (" of each class" if by_share else " in proportion to the classes") if self.stratified else ""
        return f"{'all but ' if self.part == 'rest' else ''}{size}{classes}, seed {self.seed}"

    def rows(self, count: int, labels: Sequence[int | None] | None = None) -> np.ndarray:
        """Choose among ``count`` rows; ascending.

        Args:
            count: How many rows there are.
            labels: Their classes, for a stratified choice.
        """
        order = np.random.default_rng(self.seed).permutation(count)
        total = round((self.share or 0.0) * count) if self.images is None else min(self.images, count)
        if self.stratified and labels is not None:
            classes = np.array([-1 if label is None else label for label in labels])[order]
            groups = [order[classes == number] for number in np.unique(classes)]
        else:
            groups = [order]
        parts = apportion(total, [len(group) for group in groups])
        halves = [np.split(group, [part]) for group, part in zip(groups, parts, strict=True)]
        return np.sort(np.concatenate([half[PARTS.index(self.part)] for half in halves]))


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Share ``total`` out among groups in proportion to their ``sizes``, by largest remainders; of equal remainders the
    first ones win.

    Returns:
        Whole numbers that add up to ``total``, none above its group's size, each less than one from its exact part.
    """
    exact = [divmod(total * size, max(1, sum(sizes))) for size in sizes]
    parts = [whole for whole, _ in exact]
    largest = sorted(range(len(sizes)), key=lambda index: -exact[index][1])
    for index in largest[: total - sum(parts)]:
        parts[index] += 1
    return parts


def choose_rows(count: int, limit: int | None, seed: int = SUBSET_SEED) -> np.ndarray:
    """Choose a fixed random subset of ``limit`` of ``count`` rows, ascending; all where there are no more."""
    return np.arange(count) if limit is None or limit >= count else Subset(images=limit, seed=seed).rows(count)


def take_subset(source: ImageSource, subset: Subset) -> ImageSource:
    """Take a part of the rows of a source.

    Raises:
        ImageSourceError: It is a stream, has no labels although the choice needs them, or nothing is left.
    """
    labels = None
    if subset.stratified and not source.streaming:
        labels = source.labels()
    if subset.stratified and labels is None:
        why = source.label_hint or "There is no column of labels."
        raise ImageSourceError(f"{source.name}: subset.stratified needs the classes of all images. {why}")
    rows = subset.rows(0 if source.streaming else len(source), labels)
    taken = replace(source.take(rows), name=f"{source.name[:-1]}, {subset.describe()})")
    if not len(taken):
        raise ImageSourceError(f"{taken.name}: no image of {len(source)} is left.")
    return taken
