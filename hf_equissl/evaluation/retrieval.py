"""Judge whether a predictor finds the right view of an object: MRR, hits, prediction retrieval error."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def quaternions(angles: Tensor) -> Tensor:
    """Turn extrinsic xyz Euler angles in radians (n, 3) into unit quaternions (x, y, z, w), (n, 4)."""
    half = angles.double() / 2
    (sx, sy, sz), (cx, cy, cz) = half.sin().unbind(1), half.cos().unbind(1)
    return torch.stack(
        [
            sx * cy * cz - cx * sy * sz,
            cx * sy * cz + sx * cy * sz,
            cx * cy * sz - sx * sy * cz,
            cx * cy * cz + sx * sy * sz,
        ],
        1,
    )


def relative_rotation(start: Tensor, end: Tensor) -> Tensor:
    """Compute inverse(start) * end of unit quaternions (n, 4), as SIE gives it to its predictor."""
    x1, y1, z1, w1 = (start * start.new_tensor([-1, -1, -1, 1])).unbind(-1)
    x2, y2, z2, w2 = end.unbind(-1)
    return torch.stack(
        [
            w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
            w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
            w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
            w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
        ],
        -1,
    )


def target_ranks(predictions: Tensor, views: Tensor, targets: Tensor) -> Tensor:
    """Rank the true view among all views of its object by cosine to the prediction; 1 is the best.

    Args:
        predictions: (n, d).
        views: (n, V, d), the embeddings of the object's views.
        targets: (n,), which of the V is the true one.

    Returns:
        (n,) int64. Views as similar as the true one count as better than it: where all views are alike, none is found.
    """
    similarity = torch.einsum("nd,nvd->nv", F.normalize(predictions, dim=1), F.normalize(views, dim=2))
    own = similarity.gather(1, targets[:, None])
    return (similarity >= own).sum(1)


def mean_reciprocal_rank(ranks: Tensor) -> float:
    """Average 1 / rank: 1 if every true view comes first."""
    return (1 / ranks.double()).mean().item()


def hit_rate(ranks: Tensor, k: int) -> float:
    """Compute the share of true views among the ``k`` most similar ones, H@k."""
    return (ranks <= k).double().mean().item()


def prediction_retrieval_error(
    predictions: Tensor, true: Tensor, bank: Tensor, bank_rotations: Tensor, *, chunk_size: int = 1024
) -> float:
    """Average 1 - <q, q'>^2: how far the rotation of the nearest image is from the one that was predicted, PRE of SIE.

    Args:
        predictions: (n, d) embeddings.
        true: (n, 4), the rotations that they were predicted for, as unit quaternions.
        bank: (m, d) embeddings of images of any object; the nearest one by cosine counts.
        bank_rotations: (m, 4), theirs.
        chunk_size: Predictions at a time; memory is that of ``chunk_size`` x m similarities.

    Returns:
        Between 0, always the right rotation, and 1.
    """
    bank = F.normalize(bank, dim=1)
    nearest = torch.cat([(part @ bank.T).argmax(1) for part in predictions.split(chunk_size)])
    agreement = (true.double() * bank_rotations[nearest].double()).sum(1)
    return (1 - agreement.square()).mean().item()
