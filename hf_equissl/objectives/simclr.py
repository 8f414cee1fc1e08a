"""SimCLR: each view finds the other view of its image among all views of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from ..distributed.collectives import world_size
from .base import Features, LossOutput, Objective
from .contrast import nt_xent
from .heads import Projector

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views

__all__ = ["SimCLRObjective"]


class SimCLRObjective(Objective):
    r"""SimCLR on the invariant part of the CLS representation.

    .. math::
        L = -\frac{1}{2M} \sum_{i=1}^{2M} \log
            \frac{\exp(z_i^\top z_{j(i)} / \tau)}{\sum_{k \ne i} \exp(z_i^\top z_k / \tau)}

    NT-Xent, eq. 1 of "A Simple Framework for Contrastive Learning of Visual Representations"
    (https://arxiv.org/abs/2002.05709), over the 2 M unit vectors z that the two views of the M images of all processes
    have; j(i) is the other view of the same image. The gradient also flows into the negatives, wherever they are. The
    authors' code (``objective.py`` in google-research/simclr) has twice this value: it adds the means of both views.

    The CLS rows (V, B, D), V = 2, go through the stem, whose first d_inv dimensions count, and through a projector in
    one pass per view: two layers with the paper's widths beside a ResNet-50, and as in the authors' ``model_util.py``
    batch normalisation behind each instead of biases; the last one here has no gain, theirs has one.

    Args:
        config: The encoder's configuration.
        temperature: tau.
        projector_sizes: Layer widths of the projector.

    Logs:
        ``loss_contrast``: the loss; ``accuracy``: the share of views that find the other one first.

    Raises:
        ValueError: For a temperature of 0 or less; in ``forward``, other than two global crops, or a single image,
            which has no negatives.
    """

    citation: ClassVar[str] = """@inproceedings{chen2020simple,
  title     = {A Simple Framework for Contrastive Learning of Visual Representations},
  author    = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {International Conference on Machine Learning},
  year      = {2020},
  url       = {https://arxiv.org/abs/2002.05709}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        temperature: float = 0.1,
        projector_sizes: Sequence[int] = (2048, 128),
    ) -> None:
        super().__init__(config)
        if temperature <= 0:
            raise ValueError(f"`temperature` is {temperature}, expected a value above 0.")
        self.temperature = temperature
        self.projector = Projector(
            config.invariant_size or config.hidden_size,
            projector_sizes,
            bias=False,
            normalize=True,
            running_statistics=False,
        )

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of the two global crops of ``student``; neither ``teacher`` nor pixels are used."""
        crops, images = student.cls.shape[:2]
        if crops != 2:
            raise ValueError(f"SimCLR compares exactly 2 global crops, got {crops}. Use a pipeline with two of them.")
        self.check_batch(images, world_size())
        h = student.invariant(student.cls)  # (2, B, d_inv)
        z = torch.stack([self.projector(view) for view in h])  # (2, B, d)
        with torch.autocast(z.device.type, enabled=False):  # logits go up to 1 / tau
            loss, accuracy = nt_xent(z.float(), self.temperature)
        return LossOutput(loss, {"loss_contrast": loss.detach(), "accuracy": accuracy}, projections=z)

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a single image: there is nothing to tell it from."""
        if images * processes < 2:
            raise ValueError(
                f"SimCLR tells the images of a batch apart and needs at least 2, got {images * processes}. Raise "
                "`per_device_train_batch_size` (gradient accumulation does not help) and drop the last batch."
            )
