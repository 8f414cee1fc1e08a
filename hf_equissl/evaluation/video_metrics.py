"""Region similarity J and contour accuracy F of video object segmentation, as plain functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Boundaries match within this share of the image's diagonal, rounded up to whole pixels.
TOLERANCE = 0.008
# Distances between points of boundaries are computed for so many pairs at a time.
_PAIRS = 1 << 22


def region_similarity(predicted: Tensor, true: Tensor) -> float:
    """Compute J, the intersection of two masks (H, W) over their union; 1 where both are empty.

    Raises:
        ValueError: the shapes differ.
    """
    predicted, true = _masks(predicted, true)
    union = int((predicted | true).sum())
    return int((predicted & true).sum()) / union if union else 1.0


def contour_accuracy(predicted: Tensor, true: Tensor, tolerance: float = TOLERANCE) -> float:
    """Compute F, the harmonic mean of precision and recall of the boundary pixels of two masks (H, W).

    A boundary pixel is right if the other mask has one within ``ceil(tolerance * diagonal)`` pixels. Boundaries and the
    rules for empty masks (both: 1; one of them: 0) are those of the DAVIS benchmark (https://arxiv.org/abs/1704.00675,
    code: davischallenge/davis2017-evaluation).

    Raises:
        ValueError: the shapes differ.
    """
    predicted, true = _masks(predicted, true)
    reach = math.ceil(tolerance * math.hypot(*true.shape))
    ours, theirs = mask_boundary(predicted).nonzero(), mask_boundary(true).nonzero()
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    precision, recall = _share_near(ours, theirs, reach), _share_near(theirs, ours, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mask_boundary(mask: Tensor) -> Tensor:
    """Mark the pixels of a mask (H, W) that differ from the one to the right, below, or right below: bool (H, W).

    In the last row and column only the neighbour that exists counts.
    """
    mask = mask.bool()
    found = torch.zeros_like(mask)
    found[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    found[:-1] |= mask[:-1] ^ mask[1:]
    found[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return found


def _masks(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    if predicted.shape != true.shape or predicted.ndim != 2:
        raise ValueError(f"Masks must both be (H, W), got {tuple(predicted.shape)} and {tuple(true.shape)}.")
    return predicted.bool(), true.bool()


def _share_near(points: Tensor, others: Tensor, reach: int) -> float:
    """Compute the share of points (n, 2) that have one of ``others`` (m, 2) within ``reach``."""
    near = 0
    for rows in points.split(max(1, _PAIRS // len(others))):
        squares = (rows[:, None] - others[None]).square().sum(2)
        near += int((squares.amin(1) <= reach * reach).sum())
    return near / len(points)
