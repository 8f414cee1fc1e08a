"""Barlow Twins: the cross-correlation of two views' projections becomes the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..distributed.collectives import all_reduce_sum, world_size
from .base import Features, LossOutput, Objective
from .heads import Projector, SyncBatchNorm1d, off_diagonal

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views

__all__ = ["BarlowTwinsObjective"]


class BarlowTwinsObjective(Objective):
    r"""Barlow Twins on the invariant part of the CLS representation.

    .. math::
        L = \sum_i (1 - C_{ii})^2 + \lambda \sum_i \sum_{j \ne i} C_{ij}^2, \quad
        C = \frac{1}{M} \sum_{b=1}^{M} \hat z_b \hat z_b'^\top

    Eq. 1 and 2 of "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (https://arxiv.org/abs/2103.03230),
    constants as in the authors' code (``main.py`` in facebookresearch/barlowtwins). z and z' (M, d) are the projections
    of both views of the M images of all processes, each dimension normalised over them. The sum over processes carries
    the gradient, which the authors' does not: theirs is 1 / W of the loss's on W processes, which Adam and LARS do not
    see, and clipping and a second objective do. L is a sum over dimensions: d at the start, d times that of VICReg.

    The CLS rows (V, B, D), V = 2, go through the stem, whose first d_inv dimensions count, and through a projector in
    one pass per view.

    Args:
        config: The encoder's configuration.
        redundancy_weight: lambda.
        projector_sizes: Layer widths of the projector.

    Logs:
        ``loss_invariance`` and ``loss_redundancy``: the two sums, weighted; they add up to the loss;
        ``projection_std``: mean standard deviation of z before it is normalised, 0 is collapse; ``correlation``: mean
        of the diagonal of C.

    Raises:
        ValueError: Negative weight; in ``forward``, other than two global crops, or a single image.
    """

    citation: ClassVar[str] = """@inproceedings{zbontar2021barlow,
  title     = {Barlow Twins: Self-Supervised Learning via Redundancy Reduction},
  author    = {Zbontar, Jure and Jing, Li and Misra, Ishan and LeCun, Yann and Deny, St{\\'e}phane},
  booktitle = {International Conference on Machine Learning},
  year      = {2021},
  url       = {https://arxiv.org/abs/2103.03230}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        redundancy_weight: float = 0.0051,
        projector_sizes: Sequence[int] = (8192, 8192, 8192),
    ) -> None:
        super().__init__(config)
        if redundancy_weight < 0:
            raise ValueError(f"`redundancy_weight` is {redundancy_weight}, expected 0 or more.")
        self.redundancy_weight = redundancy_weight
        self.projector = Projector(
            config.invariant_size or config.hidden_size, projector_sizes, bias=False, running_statistics=False
        )
        self.norm = SyncBatchNorm1d(self.projector.out_features, affine=False, track_running_stats=False)

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of the two global crops of ``student``; neither ``teacher`` nor pixels are used."""
        crops, images = student.cls.shape[:2]
        if crops != 2:
            raise ValueError(
                f"Barlow Twins compares exactly 2 global crops, got {crops}. Use a pipeline with two of them."
            )
        self.check_batch(images, world_size())
        h = student.invariant(student.cls)  # (2, B, d_inv)
        z = torch.stack([self.projector(view) for view in h])  # (2, B, d)
        with torch.autocast(z.device.type, enabled=False):  # a sum of d^2 squares needs fp32
            return self._loss(z.float())

    def _loss(self, z: Tensor) -> LossOutput:
        first, second = (self.norm(view) for view in z)  # (B, d) each
        correlation = all_reduce_sum(first.T @ second / (len(first) * world_size()))  # (d, d)
        diagonal = correlation.diagonal()
        parts = {
            "loss_invariance": (diagonal - 1).square().sum(),
            "loss_redundancy": self.redundancy_weight * off_diagonal(correlation).square().sum(),
        }
        logs = {name: part.detach() for name, part in parts.items()}
        logs["projection_std"] = z.detach().std(dim=1, correction=0).mean()
        logs["correlation"] = diagonal.detach().mean()
        return LossOutput(torch.stack(list(parts.values())).sum(), logs, projections=z)

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a single image: it correlates with nothing."""
        if images * processes < 2:
            raise ValueError(
                "Barlow Twins takes correlations over the batch and needs at least 2 images, got "
                f"{images * processes}. Raise `per_device_train_batch_size` (gradient accumulation does not help) and "
                "drop the last batch."
            )
