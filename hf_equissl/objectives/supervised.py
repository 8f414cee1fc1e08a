"""Supervised: a linear classifier on the CLS representation, the baseline that is told the classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..distributed.collectives import all_reduce_sum, world_size
from ..views.base import UNLABELLED
from ..views.needs import Needs
from .base import Features, LossOutput, Objective

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views
    from ..views.facts import ViewFacts

__all__ = ["SupervisedObjective"]


class SupervisedObjective(Objective):
    r"""Classes from the invariant part of the CLS representation, by a linear layer.

    .. math::
        L = -\frac{1}{V M} \sum_{v=1}^{V} \sum_{b=1}^{M} \sum_c
            \left[ (1 - \epsilon)\, \mathbb{1}(c = y_b) + \epsilon / C \right] \log \mathrm{softmax}(W h_{vb} + a)_c

    Cross-entropy over C classes, with label smoothing epsilon (https://arxiv.org/abs/1512.00567), of all V global crops
    of the M images of all processes that have a class; others are passed over. It is the supervised row of "Equivariant
    Representation Learning for Augmentation-based Self-Supervised Learning via Image Reconstruction"
    (https://arxiv.org/abs/2412.03314), which says no more of it: it sees the same views as the methods without classes.

    h (V, B, D) are CLS rows, of which the stem takes d_inv dimensions.

    Args:
        config: The encoder's configuration.
        label_smoothing: epsilon.
        facts: Say how many classes there are, C.

    Logs:
        ``loss_classes``: the loss; ``accuracy``: of this batch, in training.

    Raises:
        ValueError: For a label smoothing outside [0, 1); in ``forward``, without labels.
    """

    reads_num_classes = True
    citation: ClassVar[str] = """@inproceedings{szegedy2016rethinking,
  title     = {Rethinking the Inception Architecture for Computer Vision},
  author    = {Szegedy, Christian and Vanhoucke, Vincent and Ioffe, Sergey and Shlens, Jon and Wojna, Zbigniew},
  booktitle = {Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2016},
  url       = {https://arxiv.org/abs/1512.00567}
}"""

    def __init__(self, config: EquiSSLConfig, label_smoothing: float = 0.0, *, facts: ViewFacts) -> None:
        super().__init__(config)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` is {label_smoothing}, expected a value in [0, 1).")
        self.label_smoothing = label_smoothing
        self.classifier = nn.Linear(config.invariant_size or config.hidden_size, facts.num_classes or 0)

    @property
    def needs(self) -> Needs:
        """Ask for the classes of the images."""
        return Needs(labels=True)

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the cross-entropy of the global crops of ``student``; ``teacher`` is not used."""
        if views.labels is None:
            raise ValueError("The supervised objective needs the class of every image, and the views have no labels.")
        logits = self.classifier(student.invariant(student.cls))  # (V, B, C)
        labels = views.labels.masked_fill(views.labels < 0, UNLABELLED).expand(len(logits), -1)  # (V, B)
        with torch.autocast(logits.device.type, enabled=False):
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten(),
                ignore_index=UNLABELLED,
                label_smoothing=self.label_smoothing,
                reduction="sum",
            )
            known = labels != UNLABELLED
            # Processes may have classes for different numbers of images: each weighs its own by the mean of all.
            count = all_reduce_sum(known.sum().float()) / world_size()
            loss = losses / count.clamp(min=1 / world_size())  # 0 where nobody has any
        hits = ((logits.argmax(dim=-1) == labels) & known).sum()
        accuracy = hits / known.sum().clamp(min=1)
        return LossOutput(loss, {"loss_classes": loss.detach(), "accuracy": accuracy})
