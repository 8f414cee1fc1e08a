"""KoLeo: spread representations evenly, by the distance of each to its nearest neighbour."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed.collectives import gather as gather_rows
from ..distributed.collectives import rank, world_size

__all__ = ["check_neighbours", "koleo_loss"]


def check_neighbours(images: int) -> None:
    """Raise ``ValueError`` if ``images``, among which neighbours are sought, are fewer than two."""
    if images < 2:
        raise ValueError(
            f"KoLeo needs at least 2 images in a batch to find a neighbour, got {images}. Raise "
            "`per_device_train_batch_size` (gradient accumulation does not help) or set koleo_weight: 0."
        )


def koleo_loss(representations: Tensor, gather: bool = False, eps: float = 1e-8) -> Tensor:
    r"""Estimate the entropy of unit vectors (Kozachenko-Leonenko), summed over views.

    .. math::
        L = -\sum_v \frac{1}{B} \sum_i \log\left( \min_{j \ne i} \lVert x_{vi} - x_{vj} \rVert + \epsilon \right)

    "Spreading vectors for similarity search" (https://arxiv.org/abs/1806.03198), as in ``KoLeoLoss`` of
    facebookresearch/dinov2: neighbours are sought inside the view and, by default, inside the process.

    Args:
        representations: (V, B, D), of any length and floating dtype.
        gather: Seek neighbours in the batch of all processes.
        eps: Under the logarithm and in the distance.

    Returns:
        Scalar, fp32.

    Raises:
        ValueError: With a single image there is no neighbour.
    """
    images = representations.shape[1]
    check_neighbours(images * (world_size() if gather else 1))
    with torch.autocast(representations.device.type, enabled=False):  # eps is 0 in fp16
        x = F.normalize(representations.float(), dim=-1, eps=eps)
        others, offset = x, 0
        if gather:  # (B, V, D): one exchange for all views
            others, offset = gather_rows(x.transpose(0, 1)).transpose(0, 1), rank() * images
        with torch.no_grad():
            cosines = x @ others.transpose(1, 2)  # (V, B, M)
            cosines.diagonal(offset, dim1=1, dim2=2).fill_(-2)  # an image is no neighbour of itself
            nearest = cosines.argmax(dim=2)
        neighbours = others.gather(1, nearest[..., None].expand_as(x))
        distances = F.pairwise_distance(x, neighbours, eps=eps)  # (V, B)
        return -torch.log(distances + eps).mean(dim=1).sum()
