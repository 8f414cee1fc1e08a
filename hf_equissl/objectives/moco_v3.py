"""MoCo-v3: each view finds, by the encoder's moving average, the other view of its image in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from ..distributed.collectives import gather, world_size
from ..views.needs import Needs
from .base import Features, LossOutput, Objective
from .contrast import info_nce
from .heads import Projector

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig, EquiSSLModel
    from ..views.base import Views

__all__ = ["MoCoV3Objective"]


class MoCoV3Objective(Objective):
    r"""MoCo-v3 on the invariant part of the CLS representation.

    .. math::
        L = \ell(q_1, k_2) + \ell(q_2, k_1), \quad
        \ell(q, k) = -\frac{2 \tau}{B} \sum_{i=1}^{B} \log
            \frac{\exp(q_i^\top k_i / \tau)}{\sum_{j=1}^{M} \exp(q_i^\top k_j / \tau)}

    Eq. 1 and algorithm 1 of "An Empirical Study of Training Self-Supervised Vision Transformers"
    (https://arxiv.org/abs/2104.02057), as in the authors' code (``moco/builder.py`` in facebookresearch/moco-v3). q are
    unit rows of the student behind projector and predictor, k (M, d) those of the teacher behind its projector, of all
    processes and without gradient. Every pass sees one view (B, D), and normalises by the batch of all processes, the
    teacher's by its own: no head keeps running statistics.

    With ``local_crops`` L local crops are queries, too, as in "Soft Equivariance Regularization for Invariant
    Self-Supervised Learning" (https://arxiv.org/abs/2603.06693): the terms of each query with the keys of all other
    global crops, 2 + 2 L of them, are added up. Local crops are no keys.

    The authors update the teacher between the student's pass and the teacher's, here that is done after the optimizer's
    step: the same weights meet. The student is what they report and what is exported.

    Args:
        config: The encoder's configuration.
        temperature: tau.
        hidden_size: Width of the hidden layers of projector (3 layers) and predictor (2 layers).
        projection_size: Width of q and k.
        xavier_init: Begin as the authors' ViTs do: linear layers of the blocks and the patch embedding Xavier-uniform
            with biases of 0, CLS normal with a standard deviation of 1e-6. To hold the patch embedding there is
            ``freeze_patch_embedding`` of the training.
        local_crops: Whether the student sees local crops, too.

    Logs:
        ``loss_contrast``: the loss; ``accuracy``: the share of queries that find their key first; ``projection_std``:
        mean standard deviation of the unit keys over the batch, 0 is collapse, 1 / sqrt(d) at most.

    Raises:
        ValueError: For a temperature or a width of 0 or less; in ``forward``, without a teacher, other than two global
            crops, or a single image.
    """

    exports = "student"
    citation: ClassVar[str] = """@inproceedings{chen2021empirical,
  title     = {An Empirical Study of Training Self-Supervised Vision Transformers},
  author    = {Chen, Xinlei and Xie, Saining and He, Kaiming},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021},
  url       = {https://arxiv.org/abs/2104.02057}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        temperature: float = 0.2,
        hidden_size: int = 4096,
        projection_size: int = 256,
        xavier_init: bool = False,
        local_crops: bool = False,
    ) -> None:
        super().__init__(config)
        if temperature <= 0:
            raise ValueError(f"`temperature` is {temperature}, expected a value above 0.")
        self.temperature, self.xavier_init, self.local_crops = temperature, xavier_init, local_crops
        width = config.invariant_size or config.hidden_size
        self.projector = _head(width, (hidden_size, hidden_size, projection_size))
        self.teacher_projector = deepcopy(self.projector).requires_grad_(False)
        self.predictor = _head(projection_size, (hidden_size, projection_size))

    @property
    def needs(self) -> Needs:
        """Ask for a teacher, whose projections are the keys, and for local crops where they are queries."""
        return Needs(teacher=True, local_crops=self.local_crops)

    @torch.no_grad()
    def prepare_encoder(self, encoder: EquiSSLModel) -> None:
        """Initialise as the authors do, where asked."""
        if not self.xavier_init:
            return
        patches = encoder.embeddings.patch_embeddings.projection
        linear = [module for module in encoder.encoder.modules() if isinstance(module, nn.Linear)]
        for weight, bias in [(patches.weight.flatten(1), patches.bias), *((m.weight, m.bias) for m in linear)]:
            nn.init.xavier_uniform_(weight)  # query, key and value are layers of their own here
            if bias is not None:
                nn.init.zeros_(bias)
        nn.init.normal_(encoder.embeddings.cls_token, std=1e-6)

    def ema_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield the projector and its copy; the predictor has none."""
        yield self.projector, self.teacher_projector

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of the two global crops, and of local ones where asked; pixels are not used."""
        crops, images = student.cls.shape[:2]
        if teacher is None or crops != 2:
            raise ValueError(
                f"MoCo-v3 compares exactly 2 global crops with a teacher's, got {crops} and "
                f"{'no' if teacher is None else 'a'} teacher."
            )
        self.check_batch(images, world_size())
        z = torch.stack([self.projector(view) for view in student.invariant(student.cls)])  # (2, B, d)
        local = student.local_cls if self.local_crops else None
        # One pass per view, so that batch normalisation sees one distribution at a time.
        more = () if local is None else [self.projector(view) for view in student.invariant(local)]
        q = [self.predictor(view) for view in (*z, *more)]  # (B, d) each
        with torch.no_grad():
            k = torch.stack([self.teacher_projector(view) for view in teacher.invariant(teacher.cls)], dim=1)
            keys = gather(F.normalize(k.float(), dim=-1)).unbind(dim=1)  # (M, d) each: one exchange for both views
        pairs = [(query, key) for query in range(len(q)) for key in (0, 1) if key != query]
        with torch.autocast(z.device.type, enabled=False):
            terms = (info_nce(q[query].float(), keys[key], self.temperature) for query, key in pairs)
            losses, hits = zip(*terms, strict=True)
            loss = torch.stack(losses).sum()
        logs = {
            "loss_contrast": loss.detach(),
            "accuracy": torch.stack(hits).mean(),
            "projection_std": keys[0].std(dim=0).mean(),
        }
        return LossOutput(loss, logs, projections=z)

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a single image: there is nothing to tell it from."""
        if images * processes < 2:
            raise ValueError(
                f"MoCo-v3 tells the images of a batch apart and needs at least 2, got {images * processes}. Raise "
                "`per_device_train_batch_size` (gradient accumulation does not help) and drop the last batch."
            )


def _head(in_features: int, sizes: tuple[int, ...]) -> Projector:
    return Projector(in_features, sizes, bias=False, normalize=True, running_statistics=False)
