"""iBOT: DINO, and the same for masked patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .base import Features
from .self_distillation import Centering, MaskedPatches, SelfDistillationObjective, TeacherRows, TeacherTemperature

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
        head_hidden_size: Width of the head's MLP.
        bottleneck_size: Width of its L2-normalised output, which meets the prototypes.
        head_layers: Linear layers of the MLP, which is common to CLS and patches.
        freeze_gain: Keep the gain of each prototype at 1 (``norm_last_layer`` of the authors).
        shared_head: One set of prototypes for CLS and patches, or one for each.
        student_temperature: tau_s.
        teacher_temperature: tau_t of CLS after the warm-up.
        warmup_teacher_temperature: tau_t of CLS at the start.
        patch_teacher_temperature: tau_t of patches after the warm-up.
        warmup_patch_teacher_temperature: tau_t of patches at the start.
        teacher_temperature_warmup_epochs: Length of the warm-up, 0 for none.
        center_momentum: Share of the old centers in the new ones.
        centering: "centering", or "sinkhorn" with 3 iterations, which needs no centers (SwAV, DINOv2).
        cls_weight: Factor of L_cls.
        patch_weight: Factor of L_patch.
        local_crops: Whether the student sees local crops, too.
        equivariant_logits: Logit split: this many of the K logits, the last ones, are left to equivariance objectives.
            0 splits the encoder's stem; more needs an encoder without one.

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
        head_hidden_size: int = 2048,
        bottleneck_size: int = 256,
        head_layers: int = 3,
        freeze_gain: bool = False,
        shared_head: bool = True,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        patch_teacher_temperature: float = 0.07,
        warmup_patch_teacher_temperature: float = 0.04,
        teacher_temperature_warmup_epochs: float = 30,
        center_momentum: float = 0.9,
        centering: Centering = "centering",
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        local_crops: bool = True,
        equivariant_logits: int = 0,
    ) -> None:
        super().__init__(
            config,
            head={
                "num_prototypes": num_prototypes,
                "hidden_size": head_hidden_size,
                "bottleneck_size": bottleneck_size,
                "num_layers": head_layers,
                "freeze_gain": freeze_gain,
                "patches": "shared" if shared_head else "own_prototypes",
            },
            student_temperature=student_temperature,
            cls_temperature=TeacherTemperature(
                teacher_temperature, warmup_teacher_temperature, teacher_temperature_warmup_epochs, clock="epoch"
            ),
            patch_temperature=TeacherTemperature(
                patch_teacher_temperature,
                warmup_patch_teacher_temperature,
                teacher_temperature_warmup_epochs,
                clock="epoch",
            ),
            cls_weight=cls_weight,
            patch_weight=patch_weight,
            center_momentum=center_momentum,
            centering=centering,
            local_crops=local_crops,
            equivariant_logits=equivariant_logits,
        )

    def _teacher_rows(self, teacher: Features, masked: MaskedPatches | None) -> TeacherRows:
        """All patches pass the MLP, because the center averages them; the masked ones are picked after it."""
        if masked is None or self.centering == "sinkhorn":
            return super()._teacher_rows(teacher, masked)
        cls, patches = self.teacher_head(teacher, teacher.cls.flatten(0, 1), teacher.patches.flatten(0, 2))
        rows = patches.index_select(0, masked.patches)
        return TeacherRows(cls.unflatten(0, teacher.tokens.shape[:2]), rows, [cls.mean(dim=0), patches.mean(dim=0)])
