"""Compute metrics with plain functions, whose sums are in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .metric import (
    EFFECTIVE_RANK,
    EQUIVARIANCE,
    EQUIVARIANCE_FLOOR,
    FEATURE_STD,
    LIE_DERIVATIVE,
    MEAN_PER_CLASS,
    R2,
    R2_FEW_SHOT,
    R2_LINEAR,
    R2_SCALAR,
    TOP1,
    TOP5,
    Metric,
)

__all__ = [
    "EFFECTIVE_RANK",
    "EQUIVARIANCE",
    "EQUIVARIANCE_FLOOR",
    "FEATURE_STD",
    "LIE_DERIVATIVE",
    "MEAN_PER_CLASS",
    "R2",
    "R2_FEW_SHOT",
    "R2_LINEAR",
    "R2_SCALAR",
    "TOP1",
    "TOP5",
    "ArrayLike",
    "Metric",
    "mean_per_class_accuracy",
    "r2_mean",
    "r2_per_parameter",
    "r2_scalar",
    "top1_accuracy",
    "topk_accuracy",
]

ArrayLike = Tensor | np.ndarray | list


def _float64(name: str, values: ArrayLike) -> Tensor:
    """Turn ``values`` into a float64 matrix (n, p); vectors become one column."""
    tensor = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have shape (n,) or (n, p), got {tuple(tensor.shape)}.")
    return tensor


def r2_per_parameter(predictions: ArrayLike, targets: ArrayLike) -> Tensor:
    """Compute R2 of each parameter around its own mean, 1 - RSS / TSS: (n, p), (n, p) -> (p,) float64.

    Raises:
        ValueError: if shapes differ, or if a target does not vary.
    """
    predicted, true = _float64("predictions", predictions), _float64("targets", targets)
    if predicted.shape != true.shape:
        raise ValueError(
            f"predictions and targets must have one shape, got {tuple(predicted.shape)} and {tuple(true.shape)}."
        )
    total = (true - true.mean(0)).square().sum(0)
    # Rounding leaves a little where the targets are constant: compare with their size.
    constant = total <= 1e-12 * true.square().sum(0).max().clamp_min(1e-300)
    if len(true) < 2 or bool(constant.any()):
        raise ValueError(
            f"R2 is undefined: {len(true)} sample(s), and targets must vary in every parameter "
            f"(sums of squares around the mean: {total.tolist()}). Evaluate on more images."
        )
    return 1 - (true - predicted).square().sum(0) / total


def r2_mean(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Average ``r2_per_parameter`` over parameters: the primary number of the transformation probes."""
    return r2_per_parameter(predictions, targets).mean().item()


def r2_scalar(predictions: ArrayLike, targets: ArrayLike) -> float:
    """Compute R2 with one mean over all target entries: 1 - sum (t - p)^2 / sum (t - mean_all(t))^2.

    The form of SIE's code (https://github.com/facebookresearch/SIE), for comparison with figures published there.
    With one parameter it equals ``r2_per_parameter``; with several of unequal mean or variance it does not.
    """
    flat = (torch.as_tensor(values).flatten() for values in (predictions, targets))
    return r2_per_parameter(*flat).item()


def topk_accuracy(logits: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Compute the share of samples whose label is among the ``k`` largest logits: (n, classes), (n,) -> [0, 1]."""
    scores, true = torch.as_tensor(logits), torch.as_tensor(labels).to(torch.long)
    if scores.ndim != 2 or true.shape != scores.shape[:1] or not len(true):
        raise ValueError(
            f"logits must be (n, classes) and labels (n,) with n > 0, got {tuple(scores.shape)}, {tuple(true.shape)}."
        )
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be between 1 and the number of classes, {scores.shape[1]}, got {k}.")
    hits = (scores.topk(k, dim=1).indices == true[:, None].to(scores.device)).any(1)
    return hits.double().mean().item()


def top1_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Compute the share of samples whose predicted class (n,) is their label (n,)."""
    predicted, true = torch.as_tensor(predictions), torch.as_tensor(labels)
    if predicted.shape != true.shape or predicted.ndim != 1 or not len(true):
        raise ValueError(
            f"predictions and labels must both be (n,) with n > 0, got {tuple(predicted.shape)}, {tuple(true.shape)}."
        )
    return (predicted == true).double().mean().item()


def mean_per_class_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Average the accuracy of each class that occurs in ``labels`` over classes: (n,), (n,) -> [0, 1]."""
    predicted, true = torch.as_tensor(predictions).long(), torch.as_tensor(labels).long()
    top1_accuracy(predicted, true)  # called for its checks alone
    counts = torch.bincount(true).double()
    hits = torch.bincount(true[predicted == true], minlength=len(counts)).double()
    present = counts > 0
    return (hits[present] / counts[present]).mean().item()
