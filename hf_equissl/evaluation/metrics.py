"""What a metric is, and metrics as plain functions.

Sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ArrayLike = Tensor | np.ndarray | list


@dataclass(frozen=True)
class Metric:
    """What a number is, so that tables, records and cards can show one that they have never heard of.

    Attributes:
        name: As records and logs call it, in snake_case.
        unit: "%" for shares from 0 to 1, which are shown times 100; otherwise what stands behind the number.
        digits: Decimals that are shown.
        higher_is_better: Direction, for choosing the best of several.
        hub_type: Name of the metric in the ``model-index`` of a card; ``None`` keeps the number out of it.
        library: Distribution that computes it; records keep its version.
    """

    name: str
    unit: str = ""
    digits: int = 4
    higher_is_better: bool = True
    hub_type: str | None = None
    library: str = "hf-equissl"

    @property
    def scale(self) -> float:
        """What a value is multiplied by when it is shown."""
        return 100.0 if self.unit == "%" else 1.0

    def text(self, value: float, std: float | None = None) -> str:
        """Write a value for readers, with its standard deviation where there is one: "71.25 +- 0.31"."""
        numbers = [value] if std is None else [value, std]
        text = " +- ".join(f"{number * self.scale:.{self.digits}f}" for number in numbers)
        return text if self.unit in ("", "%") else f"{text} {self.unit}"

    def rounded(self, value: float) -> float:
        """Round a value, not scaled, to the digits that ``text`` shows."""
        return round(value, self.digits + (2 if self.unit == "%" else 0))


TOP1 = Metric("top1", "%", digits=2, hub_type="accuracy")
MEAN_PER_CLASS = Metric("mean_per_class", "%", digits=2)
TOP5 = Metric("top5", "%", digits=2, hub_type="top5")
R2 = Metric("r2", hub_type="r_squared")
R2_SCALAR = Metric("r2_scalar")
R2_LINEAR = Metric("r2_linear")
R2_FEW_SHOT = Metric("r2_few_shot")
EQUIVARIANCE = Metric("equivariance", hub_type="equivariance_score")
EQUIVARIANCE_FLOOR = Metric("equivariance_floor")
LIE_DERIVATIVE = Metric("lie_derivative", higher_is_better=False, hub_type="lie_derivative")
EFFECTIVE_RANK = Metric("effective_rank", digits=2, hub_type="effective_rank")
FEATURE_STD = Metric("feature_std", hub_type="feature_std")


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
    """Share of samples whose label is among the ``k`` largest logits: (n, classes), (n,) -> [0, 1]."""
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
    """Share of samples whose predicted class (n,) is their label (n,)."""
    predicted, true = torch.as_tensor(predictions), torch.as_tensor(labels)
    if predicted.shape != true.shape or predicted.ndim != 1 or not len(true):
        raise ValueError(
            f"predictions and labels must both be (n,) with n > 0, got {tuple(predicted.shape)}, {tuple(true.shape)}."
        )
    return (predicted == true).double().mean().item()


def mean_per_class_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Average the accuracy of each class that occurs in ``labels`` over classes: (n,), (n,) -> [0, 1]."""
    predicted, true = torch.as_tensor(predictions).long(), torch.as_tensor(labels).long()
    top1_accuracy(predicted, true)  # the same checks
    counts = torch.bincount(true).double()
    hits = torch.bincount(true[predicted == true], minlength=len(counts)).double()
    present = counts > 0
    return (hits[present] / counts[present]).mean().item()
