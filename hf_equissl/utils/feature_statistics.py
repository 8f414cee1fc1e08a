"""Signs of collapse that need no labels: pure functions on representations.

Both take the rows of one process. For the whole batch, hand them ``distributed.gather(h)``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["effective_rank", "feature_std"]


@torch.no_grad()
def feature_std(h: Tensor) -> Tensor:
    r"""Average the standard deviation of L2-normalised representations over dimensions.

    .. math:: \frac{1}{D} \sum_j \mathrm{std}_i \left( h_{ij} / \lVert h_i \rVert_2 \right)

    As plotted by SimSiam (https://arxiv.org/abs/2011.10566, Fig. 2): 0 is complete collapse to a point,
    :math:`1 / \sqrt{D}` is what an isotropic distribution gives.

    Args:
        h: (M, D), any floating dtype, M >= 2.

    Returns:
        Scalar, fp32.

    Raises:
        ValueError: If ``h`` is not a matrix with at least two rows.
    """
    _check_rows(h)
    return F.normalize(h.float(), dim=1).std(dim=0).mean()


@torch.no_grad()
def effective_rank(h: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Compute RankMe: the exponential of the entropy of the singular values, between 1 and min(M, D).

    .. math:: \exp\left( -\sum_k p_k \log p_k \right), \quad p_k = \sigma_k / \lVert \sigma \rVert_1 + \epsilon

    Equation 1 of RankMe (https://arxiv.org/abs/2210.02885). Representations are not centred. Singular values are
    square roots of the eigenvalues of the smaller Gram matrix, in double precision where the device has it: squaring
    halves the digits, and fp32 would leave small singular values in the noise.

    Args:
        h: (M, D), any floating dtype. M bounds the result from above: the paper takes 25600 images.
        eps: Added to each share.

    Returns:
        Scalar, fp32; NaN for representations that are not finite.

    Raises:
        ValueError: If ``h`` is not a matrix with at least two rows.
    """
    _check_rows(h)
    h = h.float() if h.device.type == "mps" else h.double()
    gram = h @ h.T if h.shape[0] < h.shape[1] else h.T @ h
    # eigvalsh raises an error for a matrix with a NaN; this returns NaN, and the Trainer names the loss.
    finite = gram.isfinite().all()
    singular_values = torch.linalg.eigvalsh(torch.where(finite, gram, torch.zeros_like(gram))).clamp(min=0).sqrt()
    total = singular_values.sum().clamp(min=torch.finfo(h.dtype).tiny)  # all representations zero: rank 1
    shares = singular_values / total + eps
    rank = torch.exp(-(shares * shares.log()).sum()).float()
    return torch.where(finite, rank, torch.full_like(rank, torch.nan))


def _check_rows(h: Tensor) -> None:
    if h.ndim != 2 or h.shape[0] < 2:
        raise ValueError(
            f"Expected representations of at least two images as a matrix (M, D), got shape {tuple(h.shape)}. "
            "Take the CLS rows, e.g. `features.cls.flatten(0, 1)`."
        )
