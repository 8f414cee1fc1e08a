"""Linear regression with an L2 penalty in closed form: the probe of least capacity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .probes import seeded_permutation

# Relative to the mean square of a standardised feature.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
FOLDS = 5
# From here on one fold judges the penalties as well as all of them would.
_ENOUGH = 1000


def solve_ridge(inputs: Tensor, targets: Tensor, penalties: Sequence[float] = PENALTIES) -> list[tuple[Tensor, Tensor]]:
    """Minimise ``||Y - X W^T - b||^2 / n + penalty ||W||^2`` for each penalty, in float64.

    The system solved is that of the features or that of the samples, whichever is smaller: memory min(n, D)^2.

    Args:
        inputs: (n, D).
        targets: (n, p).
        penalties: Each larger than 0.

    Returns:
        Weights (p, D) and biases (p,) in float32, one pair per penalty.
    """
    x, y = inputs.double(), targets.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    count, width = x.shape
    by_features = width <= count
    gram = (x.T @ x if by_features else x @ x.T) / count
    right = x.T @ y / count if by_features else y / count
    identity = torch.eye(len(gram), dtype=gram.dtype)
    found = []
    for penalty in penalties:
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(gram + penalty * identity))
        weight = solved.T if by_features else solved.T @ x
        found.append((weight.float(), (mean_y - weight @ mean_x).float()))
    return found


def fit_ridge(inputs: Tensor, targets: Tensor, penalties: Sequence[float] = PENALTIES) -> tuple[Tensor, Tensor]:
    """Choose the penalty by cross-validation, and fit all samples with it.

    Five folds, of which the first alone is held out from 1,000 samples on. Nothing is random.

    Args:
        inputs: (n, D).
        targets: (n, p).
        penalties: To choose from.

    Returns:
        Weight (p, D) and bias (p,).
    """
    count = len(inputs)
    order = seeded_permutation(count, 0, count)
    errors = torch.zeros(len(penalties))
    for fold in range(1 if count >= _ENOUGH else min(FOLDS, count)):
        held = order[fold::FOLDS]
        kept = order[~torch.isin(order, held)]
        if not len(kept):
            break
        for position, (weight, bias) in enumerate(solve_ridge(inputs[kept], targets[kept], penalties)):
            errors[position] += F.mse_loss(F.linear(inputs[held], weight, bias), targets[held], reduction="sum")
    return solve_ridge(inputs, targets, [penalties[int(errors.argmin())]])[0]
