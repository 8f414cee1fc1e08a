"""iBOT: DINO, and the same for masked patches."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Features
from .masked_patches import MaskedPatches
from .self_distillation import SelfDistillationObjective, TeacherRows

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig

__all__ = ["IBOTObjective"]


class IBOTObjective(SelfDistillationObjective):
    r"""iBOT: DINO's loss on CLS tokens, and the teacher's view of each patch that was masked for the student.

    .. math::
        L = L_{cls} + L_{patch}, \quad L_{patch} = \frac{1}{V} \sum_{q=1}^{V} \frac{1}{B} \sum_b
            \frac{\sum_i m_{qbi} H(t_{qbi}, s_{qbi})}{\max(1, \sum_i m_{qbi})}

    "iBOT: Image BERT Pre-Training with Online Tokenizer" (https://arxiv.org/abs/2111.07832), constants as in the
    authors' code (``main_ibot.py`` in bytedance/ibot). L_cls is that of :class:`.DINOObjective`, where the student's
    global crops are the masked ones; t = softmax((teacher - c) / tau_t), s = softmax(student / tau_s); m marks the
    masked patches. Images without a mask count as 0. Two centers, one for CLS and one for patches, the latter from all
    patches of the teacher. Only masked patches meet the prototypes; the center does with the mean of their rows.

    Temperatures rise linearly over the first epochs and change between epochs only.

    Args:
        config: The encoder's configuration, with a mask token.
        num_prototypes: K, of CLS and of patches.
        shared_head: One set of prototypes for CLS and patches, or one for each.
        patch_teacher_temperature: tau_t of patches after the warm-up, which is as long as that of CLS.
        warmup_patch_teacher_temperature: tau_t of patches at the start.
        cls_weight: Factor of L_cls.
        patch_weight: Factor of L_patch.
        common: Those of :class:`.SelfDistillationObjective`, whose tau_t is that of CLS.

    Logs:
        ``loss_cls``, ``loss_patch``: weighted, they add up to the loss; ``teacher_entropy``: mean entropy of the CLS
        targets, 0 or log K in a collapse; ``cls_divergence``: L_cls less that entropy; ``teacher_temperature``.

    Raises:
        ValueError: For values out of range; in ``forward``, without a teacher, with fewer than two global crops, or
            without masks.
    """

    citation: ClassVar[str] = """@inproceedings{zhou2022ibot,
  title     = {{iBOT}: Image {BERT} Pre-Training with Online Tokenizer},
  author    = {Zhou, Jinghao and Wei, Chen and Wang, Huiyu and Shen, Wei and Xie, Cihang and Yuille, Alan and
               Kong, Tao},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  url       = {https://arxiv.org/abs/2111.07832}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        num_prototypes: int = 8192,
        shared_head: bool = True,
        patch_teacher_temperature: float = 0.07,
        warmup_patch_teacher_temperature: float = 0.04,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(config, num_prototypes=num_prototypes, **common)
        final, warmup = patch_teacher_temperature, warmup_patch_teacher_temperature
        schedule = replace(self.cls_schedule, final=final, warmup=warmup)
        self._build_heads("shared" if shared_head else "own_prototypes", schedule, cls_weight, patch_weight)

    def _teacher_rows(self, teacher: Features, masked: MaskedPatches | None) -> TeacherRows:
        """Pass all patches through the MLP, because the center averages them, and pick the masked ones after it."""
        if masked is None or self.centering == "sinkhorn":
            return super()._teacher_rows(teacher, masked)
        cls, patches = self.teacher_head(teacher, teacher.cls.flatten(0, 1), teacher.patches.flatten(0, 2))
        rows = patches.index_select(0, masked.patches)
        return TeacherRows(cls.unflatten(0, teacher.cls.shape[:2]), rows, [cls.mean(dim=0), patches.mean(dim=0)])
