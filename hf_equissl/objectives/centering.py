"""How a teacher's logits become targets that do not collapse: a moving center, or Sinkhorn-Knopp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.collectives import all_reduce_sum, gather

__all__ = ["centered_softmax", "sinkhorn_knopp"]


def centered_softmax(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Take the softmax of ``(logits - center) / temperature``, (..., K), with a center (K,).

    DINO (https://arxiv.org/abs/2104.14294).
    """
    return torch.softmax((logits - center) / temperature, dim=-1)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assign rows to prototypes, each row once and each prototype about equally often over all processes.

    The Sinkhorn-Knopp step of SwAV (https://arxiv.org/abs/2006.09882) as in facebookresearch/dinov2
    (``sinkhorn_knopp_teacher``): exp(logits / temperature) is divided in turn by the sums over rows of all processes
    and by the sums over prototypes. Instead of rewriting the matrix its two scalings are kept: the constants of the
    original (total sum, K, number of rows) cancel between them, so nobody has to count the rows of other processes.

    Args:
        logits: (M, K), fp32; M may differ between processes, and be 0.
        temperature: Temperature of the exponential.
        iterations: Number of iterations, at least one.

    Returns:
        (M, K), rows that sum to 1.
    """
    highest = logits.max() if len(logits) else logits.new_full((), -torch.inf)
    scores = torch.exp((logits - gather(highest[None]).max()) / temperature)  # the gain may grow: keep exp finite
    tiny = torch.finfo(scores.dtype).tiny
    of_row, of_prototype = scores.new_ones(len(scores)), scores.new_ones(scores.shape[1])
    for _ in range(iterations):
        sums = all_reduce_sum(of_row @ scores)  # (K,)
        of_prototype = sums.mean() / sums.clamp(min=tiny)  # any factor would do; this one keeps both scalings in range
        of_row = 1 / (scores @ of_prototype).clamp(min=tiny)  # (M,)
    return scores * of_prototype * of_row[:, None]
