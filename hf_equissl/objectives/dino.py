"""DINO: self-distillation of the CLS token over prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .self_distillation import Centering, SelfDistillationObjective, TeacherTemperature

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig

__all__ = ["DINOObjective"]


class DINOObjective(SelfDistillationObjective):
    r"""DINO: the student's CLS tokens of all crops predict the teacher's of the other global crop.

    .. math::
        L = \frac{1}{V (V + L - 1)} \sum_{q=1}^{V} \sum_{v \ne q} \frac{1}{B} \sum_b
            H\left( \mathrm{softmax}\frac{t_{qb} - c}{\tau_t},\, \mathrm{softmax}\frac{s_{vb}}{\tau_s} \right)

    Eq. 3 of "Emerging Properties in Self-Supervised Vision Transformers" (https://arxiv.org/abs/2104.14294) with the
    center c of eq. 4, constants as in the authors' code (``main_dino.py`` in facebookresearch/dino). t and s are
    logits of the teacher's and the student's head over K prototypes, q the V = 2 global crops, v these and L local
    crops, any number of them. After the loss the center moves to the mean of t over both crops and all processes.

    The teacher's temperature rises linearly over the first epochs and changes between epochs only.

    Args:
        config: The encoder's configuration.
        num_prototypes: K.
        head_hidden_size: Width of the head's MLP.
        bottleneck_size: Width of its L2-normalised output, which meets the prototypes.
        head_layers: Linear layers of the MLP.
        freeze_gain: Keep the gain of each prototype at 1 (``norm_last_layer`` of the authors).
        student_temperature: tau_s.
        teacher_temperature: tau_t after the warm-up.
        warmup_teacher_temperature: tau_t at the start.
        teacher_temperature_warmup_epochs: Length of the warm-up, 0 for none.
        center_momentum: Share of the old center in the new one.
        centering: "centering", or "sinkhorn" with 3 iterations, which needs no center (SwAV, DINOv2).
        local_crops: Whether the student sees local crops, too.
        equivariant_logits: Logit split: this many of the K logits, the last ones, are left to equivariance objectives.
            0 splits the encoder's stem; more needs an encoder without one.

    Logs:
        ``loss_cls``: the loss; ``teacher_entropy``: mean entropy of the targets, 0 or log K in a collapse;
        ``cls_divergence``: the loss less that entropy; ``teacher_temperature``.

    Raises:
        ValueError: For values out of range; in ``forward``, without a teacher or with fewer than two global crops.
    """

    citation: ClassVar[str] = """@inproceedings{caron2021emerging,
  title     = {Emerging Properties in Self-Supervised Vision Transformers},
  author    = {Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J{\\'e}gou, Herv{\\'e} and Mairal, Julien and
               Bojanowski, Piotr and Joulin, Armand},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021},
  url       = {https://arxiv.org/abs/2104.14294}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        num_prototypes: int = 65536,
        head_hidden_size: int = 2048,
        bottleneck_size: int = 256,
        head_layers: int = 3,
        freeze_gain: bool = False,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature_warmup_epochs: float = 30,
        center_momentum: float = 0.9,
        centering: Centering = "centering",
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
            },
            student_temperature=student_temperature,
            cls_temperature=TeacherTemperature(
                teacher_temperature, warmup_teacher_temperature, teacher_temperature_warmup_epochs, clock="epoch"
            ),
            center_momentum=center_momentum,
            centering=centering,
            local_crops=local_crops,
            equivariant_logits=equivariant_logits,
        )
