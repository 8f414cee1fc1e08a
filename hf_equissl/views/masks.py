"""Block masks: which patches of the global crops the student does not see. Workers draw them, with NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .uniform import check_choice, check_number, check_range

KINDS = ("per_view", "stratified")
# Blocks that are tried for one place before a mask is left as it is.
MAX_ATTEMPTS = 10


@dataclass(frozen=True)
class MaskSpec:
    """Masks of rectangular blocks, as in BEiT, iBOT and DINOv2. The defaults are iBOT's.

    A mask with the target t = ratio x patches is filled block by block: an area uniform between ``min_patches`` and
    what is left of t, or ``max_share`` (in either order), height / width log-uniform, a place uniform on the grid. A
    block counts if it is shorter than the grid on both sides and adds at least one patch and no more than are left;
    after ten blocks in a row that do not count, or at the target, the mask is done. So masks may fall short of t and
    never exceed it; and as blocks lie within the grid, its middle is masked more often than its corners (0.54 and
    0.03 of iBOT's masks).

    Attributes:
        kind: "per_view" (iBOT, https://arxiv.org/abs/2111.07832): each view of each image draws on its own whether it
            is masked, and its ratio. "stratified" (DINOv2, https://arxiv.org/abs/2304.07193): of all global crops of a
            batch exactly the share ``probability`` (rounded down) is masked; the range of ratios is cut into as many
            equal bins as crops are masked, one ratio is drawn in each, and t is rounded down.
        probability: How likely a view is masked.
        ratio: Smallest and largest ratio, uniform.
        min_patches: Smallest area that a block is drawn with, 4 in DINOv2; ``None``: ``(side // 3) ** 2`` on a grid of
            ``side`` x ``side`` patches, which is iBOT's 16 of 14 x 14, and 4 of 8 x 8, and 1 of 4 x 4. A number above
            that is lowered to it: on small grids blocks would be as large as whole masks.
        max_share: Largest share of the patches that one block may add, 0.5 in DINOv2; ``None``: what is left of t.
        aspect: Smallest height / width of a block; the largest is its inverse.
    """

    kind: str = "per_view"
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    min_patches: int | None = None
    max_share: float | None = None
    aspect: float = 0.3

    def __post_init__(self) -> None:
        """Turn YAML's lists into tuples and refuse values that no mask can have."""
        check_choice("masks.kind", self.kind, KINDS)
        check_number("masks.probability", self.probability, high=1)
        object.__setattr__(self, "ratio", check_range("masks.ratio", self.ratio, low=1e-6, high=1))
        check_number("masks.aspect", self.aspect, low=1e-3, high=1)
        if self.max_share is not None:
            check_number("masks.max_share", self.max_share, low=1e-6, high=1)
        least = self.min_patches
        if least is not None and (not isinstance(least, int) or isinstance(least, bool) or least < 1):
            raise ValueError(f"masks.min_patches is {least!r}, expected a positive integer or None.")

    def smallest_area(self, side: int) -> int:
        """Return ``min_patches`` on a grid of ``side`` x ``side`` patches."""
        scaled = max(1, (side // 3) ** 2)
        return scaled if self.min_patches is None else min(self.min_patches, scaled)

    def check_grid(self, side: int) -> None:
        """Raise ValueError if no patch of a grid of ``side`` x ``side`` could ever be masked."""
        if side < 2 or self.ratio[1] * side**2 < 1:
            raise ValueError(
                f"masks of a ratio up to {self.ratio[1]:g} need more than {side} x {side} patches. Use larger images "
                "(model.image_size), smaller patches (model.patch_size) or a larger views.pipeline.masks.ratio."
            )

    def describe(self, side: int) -> str:
        """Describe the masks in one line."""
        shares = {"per_view": "each view with p", "stratified": "exactly the share"}
        return (
            f"block masks of {self.ratio[0]:g}-{self.ratio[1]:g} of {side} x {side} patches, {shares[self.kind]} "
            f"{self.probability:g}{', ratios stratified' * (self.kind == 'stratified')}, blocks from "
            f"{self.smallest_area(side)} patches"
        )


def draw_masks(spec: MaskSpec, seeds: Sequence[int], views: int, side: int) -> np.ndarray:
    """Draw the masks of one batch.

    Args:
        spec: Kind and size.
        seeds: One per image. "per_view": the masks of an image follow from its seed alone; "stratified": those of the
            batch from the first image's.
        views: Global crops per image, V.
        side: Patches along each side of a crop.

    Returns:
        bool (B, V, side * side), true where the student does not see the patch.
    """
    masks = np.zeros((len(seeds), views, side, side), dtype=bool)
    low, high = spec.ratio
    if spec.kind == "per_view":
        for image, seed in zip(masks, seeds, strict=True):
            rng = np.random.default_rng(seed)
            for view in image:
                applied, place = rng.random(2).tolist()
                if applied < spec.probability:
                    _fill(view, (low + (high - low) * place) * side**2, spec, rng)
    else:
        rng = np.random.default_rng(seeds[0])
        crops = masks.reshape(-1, side, side)
        count = int(spec.probability * len(crops))
        ratios = low + (high - low) * (np.arange(count) + rng.random(count)) / max(count, 1)
        for crop, ratio in zip(rng.permutation(len(crops))[:count].tolist(), ratios.tolist(), strict=True):
            _fill(crops[crop], int(ratio * side**2), spec, rng)
    return masks.reshape(len(seeds), views, side * side)


def _fill(mask: np.ndarray, target: float, spec: MaskSpec, rng: np.random.Generator) -> None:
    """Set blocks of ``mask`` (side, side) to true until ``target`` patches are set or no block fits."""
    side, left = len(mask), target
    smallest, log_aspect = spec.smallest_area(side), math.log(spec.aspect)
    largest = math.inf if spec.max_share is None else spec.max_share * side**2
    # Less than one patch left: no block could count.
    while (limit := min(left, largest)) >= 1:
        for for_area, for_aspect, for_top, for_left in rng.random((MAX_ATTEMPTS, 4)).tolist():
            area = smallest + (limit - smallest) * for_area
            aspect = math.exp(log_aspect * (1 - 2 * for_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= side or width >= side:
                continue
            first_row, first_column = int(for_top * (side - height + 1)), int(for_left * (side - width + 1))
            block = mask[first_row : first_row + height, first_column : first_column + width]
            added = block.size - np.count_nonzero(block)
            if 0 < added <= limit:
                block[...] = True
                left -= added
                break
        else:
            return
