"""Square windows of images at their own proportions: random ones to train on, overlapping ones to judge by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...views.cropping import Box
from .masks import IGNORED

# As iBOT's configuration for ADE20K has them (https://github.com/bytedance/ibot,
# evaluation/semantic_segmentation/configs/_base_/datasets/ade20k.py and upernet/*.py): factors of the size that brings
# the shorter side to the window's; the largest share of a window that one class may have, in up to ten draws; and the
# windows' distance at tests, 341 of 512 pixels.
SCALES, LARGEST_SHARE, DRAWS, STRIDE = (0.5, 2.0), 0.75, 10, 2 / 3


def random_window(mask: np.ndarray, rng: Any) -> Box:
    """Draw a window: a factor, then corners until no class fills it.

    Args:
        mask: Numbers of classes (H, W).
        rng: The sample's generator.

    Returns:
        Left, top, right and lower edge in pixels; beyond the image where the factor is so small that it fits.
    """
    height, width = mask.shape
    side = min(height, width) / rng.uniform(*SCALES)
    box: Box = (0, 0, 0, 0)
    for _ in range(DRAWS):
        left, top = (rng.uniform(0, max(0.0, length - side)) for length in (width, height))
        box = (left, top, left + side, top + side)
        seen = mask[round(top) : max(round(top) + 1, round(top + side)), round(left) : round(left + side)]
        counts = np.bincount(seen[seen != IGNORED])
        if np.count_nonzero(counts) > 1 and counts.max() < LARGEST_SHARE * counts.sum():
            break
    return box


def cut_window(
    image: Image.Image, box: Box, size: int, resample: Image.Resampling, fill: int | tuple[int, ...]
) -> np.ndarray:
    """Cut a window out of an image and bring it to ``size`` pixels; ``fill`` stands beyond the image."""
    left, top, right, lower = box
    within = (left, top, min(right, image.width), min(lower, image.height))
    scale = size / (right - left)
    width, height = (max(1, round((high - low) * scale)) for low, high in ((left, within[2]), (top, within[3])))
    part = np.asarray(image.resize((min(width, size), min(height, size)), resample, box=within))
    if part.shape[:2] == (size, size):
        return part
    whole = np.full((size, size, *part.shape[2:]), fill, part.dtype)
    whole[: part.shape[0], : part.shape[1]] = part
    return whole


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Resize an image so that its shorter side has ``size`` pixels."""
    scale = size / min(image.size)
    width, height = (max(size, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def window_starts(length: int, size: int) -> list[int]:
    """Return where windows of ``size`` pixels begin that cover ``length``, two thirds apart, the last at the end."""
    stride = max(1, int(size * STRIDE))
    count = max(0, length - size + stride - 1) // stride + 1
    return [min(index * stride, length - size) for index in range(count)]


def slide(compute: Callable[[Tensor], Tensor], image: Tensor, size: int) -> Tensor:
    """Compute logits of an image window by window, and average them where windows overlap.

    Args:
        compute: Returns logits (N, K, S, S) of windows (N, 3, S, S).
        image: (3, H, W), no side shorter than ``size``.
        size: S.

    Returns:
        (K, H, W), float32.
    """
    height, width = image.shape[1:]
    corners = [(top, left) for top in window_starts(height, size) for left in window_starts(width, size)]
    logits = compute(torch.stack([image[:, top : top + size, left : left + size] for top, left in corners])).float()
    total, count = logits.new_zeros(logits.shape[1], height, width), logits.new_zeros(height, width)
    for (top, left), window in zip(corners, logits, strict=True):
        total[:, top : top + size, left : left + size] += window
        count[top : top + size, left : left + size] += 1
    return total / count
