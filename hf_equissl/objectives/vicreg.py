"""VICReg: variance, invariance and covariance of two views' projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed.collectives import gather, world_size
from .base import Features, LossOutput, Objective
from .heads import Projector, off_diagonal

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views

__all__ = ["VICRegObjective", "covariance_term", "invariance_term", "variance_term"]


class VICRegObjective(Objective):
    r"""VICReg on the invariant part of the image's representation.

    .. math::
        L = \lambda\, s(z, z') + \mu\, [v(z) + v(z')] / 2 + \nu\, [c(z) + c(z')]

    with the mean squared distance s, the hinge v on the standard deviation of each dimension and the squared
    off-diagonal covariances c; eq. 1 to 6 of VICReg (https://arxiv.org/abs/2105.04906), constants as in the authors'
    code (``main_vicreg.py`` in facebookresearch/vicreg). Two of them differ from the paper: the variance terms are
    halved (eq. 6), and s is a mean over dimensions, too (eq. 5).

    The representation (V, B, D), V = 2, is the CLS row or the mean of the patch rows; the stem takes its first d_inv
    dimensions; a projector ("expander") makes z (B, d) of each view in a pass of its own. s sees the batch of one
    process, v and c see that of all (M, d).

    Weights default to 10/10/1 and the expander to 1024-1024-1024, the invariance loss of SIE
    (https://arxiv.org/abs/2302.10283) for half of the features, which EquiSSL takes over. VICReg itself: 25/25/1 and
    8192-8192-8192.

    Args:
        config: The encoder's configuration.
        invariance_weight: lambda.
        variance_weight: mu.
        covariance_weight: nu.
        expander_sizes: Layer widths of the projector.
        pooling: "cls" or "mean", which takes the mean of the patch tokens.
        gather: Whether v and c see the batch of all processes.

    Logs:
        ``loss_invariance``, ``loss_variance``, ``loss_covariance``: weighted, they add up to the loss;
        ``projection_std``: mean standard deviation of z, which v pulls to 1; 0 is collapse.

    Raises:
        ValueError: Unknown ``pooling``, negative weight; in ``forward``, other than two global crops, or fewer than
            two images to take a variance over.
    """

    citation: ClassVar[str] = """@inproceedings{bardes2022vicreg,
  title     = {{VICReg}: Variance-Invariance-Covariance Regularization for Self-Supervised Learning},
  author    = {Bardes, Adrien and Ponce, Jean and LeCun, Yann},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  url       = {https://openreview.net/forum?id=xm6YD62D1Ub}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        invariance_weight: float = 10.0,
        variance_weight: float = 10.0,
        covariance_weight: float = 1.0,
        expander_sizes: Sequence[int] = (1024, 1024, 1024),
        pooling: Literal["cls", "mean"] = "cls",
        gather: bool = True,
    ) -> None:
        super().__init__(config)
        if pooling not in ("cls", "mean"):
            raise ValueError(f"`pooling` is {pooling!r}, expected 'cls' or 'mean' (the mean of the patch tokens).")
        weights = (invariance_weight, variance_weight, covariance_weight)
        if min(weights) < 0:
            raise ValueError(f"VICReg's weights (invariance, variance, covariance) may not be negative, got {weights}.")
        self.invariance_weight, self.variance_weight, self.covariance_weight = weights
        self.pooling = pooling
        self.gather = gather
        self.expander: nn.Module = Projector(config.invariant_size or config.hidden_size, expander_sizes)

    @property
    def reads_joining_rows(self) -> bool:
        """Say no where patches are pooled: images that join by CLS have none."""
        return self.pooling == "cls"

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of the two global crops of ``student``; neither ``teacher`` nor pixels are used."""
        self._check(student)
        pooled = student.cls if self.pooling == "cls" else student.patches.mean(dim=2)  # (2, B, D)
        h = student.invariant(pooled)  # (2, B, d_inv)
        # One pass per view, so that batch normalisation sees one distribution at a time, as the authors do.
        z1, z2 = self.expander(h[0]), self.expander(h[1])  # (B, d) each
        with torch.autocast(z1.device.type, enabled=False):  # squares and small covariances need fp32
            return self._loss(z1.float(), z2.float())

    def _loss(self, z1: Tensor, z2: Tensor) -> LossOutput:
        both = torch.stack([z1, z2], dim=1)  # (B, 2, d): one exchange for both views
        both = gather(both) if self.gather else both
        all1, all2 = both.unbind(dim=1)  # (M, d) each
        parts = {
            "loss_invariance": self.invariance_weight * invariance_term(z1, z2),
            "loss_variance": self.variance_weight * (variance_term(all1) + variance_term(all2)) / 2,
            "loss_covariance": self.covariance_weight * (covariance_term(all1) + covariance_term(all2)),
        }
        logs = {name: part.detach() for name, part in parts.items()}
        logs["projection_std"] = both.detach().std(dim=0).mean()
        return LossOutput(torch.stack(list(parts.values())).sum(), logs, projections=torch.stack([z1, z2]))

    def _check(self, student: Features) -> None:
        crops, batch_size = student.cls.shape[:2]
        if crops != 2:
            raise ValueError(f"VICReg compares exactly 2 global crops, got {crops}. Use a pipeline with two of them.")
        self.check_batch(batch_size, world_size())

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a single image: it has no variance."""
        images *= processes if self.gather else 1
        if images < 2:
            raise ValueError(
                f"VICReg takes variances over the batch and needs at least 2 images, got {images}. Raise "
                "`per_device_train_batch_size` (gradient accumulation does not help) and drop the last batch."
            )


def invariance_term(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference s of two projections (B, d): eq. 5, with the mean over dimensions, too."""
    return F.mse_loss(x, y)


def variance_term(x: Tensor, eps: float = 1e-4) -> Tensor:
    """Return the hinge v of projections (M, d): mean of relu(1 - sqrt(Var + eps)), Var unbiased. Eq. 1 and 2."""
    return F.relu(1 - torch.sqrt(x.var(dim=0) + eps)).mean()


def covariance_term(x: Tensor) -> Tensor:
    """Return the redundancy c of projections (M, d): squared off-diagonal covariances, divided by d. Eq. 3 and 4."""
    images, width = x.shape
    centred = x - x.mean(dim=0)
    if images < width:
        # ||X^T X||_F = ||X X^T||_F: the same sum of squares from the smaller matrix, less the diagonal's.
        gram = centred @ centred.T / (images - 1)  # (M, M)
        return (gram.square().sum() - x.var(dim=0).square().sum()) / width
    covariance = centred.T @ centred / (images - 1)  # (d, d)
    return off_diagonal(covariance).square().sum() / width
