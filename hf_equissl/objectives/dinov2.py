"""DINOv2: iBOT's two losses with other targets and centers, and KoLeo."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .base import Features
from .koleo import check_neighbours, koleo_loss
from .self_distillation import Centering, SelfDistillationObjective, TeacherTemperature

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig

__all__ = ["DINOv2Objective"]


class DINOv2Objective(SelfDistillationObjective):
    r"""DINOv2: distillation of CLS tokens and of masked patches, and evenly spread CLS representations.

    .. math::
        L = L_{cls} + L_{patch} + 0.1\, L_{koleo}, \quad
        L_{patch} = \frac{1}{V B} \sum_{i\ \mathrm{masked}} \frac{H(t_i, s_i)}{m_{crop(i)}}

    "DINOv2: Learning Robust Visual Features without Supervision" (https://arxiv.org/abs/2304.07193), constants of the
    short ImageNet-1k configuration in the authors' code (``ssl_meta_arch.py`` in facebookresearch/dinov2). L_cls is
    that of :class:`.DINOObjective`; L_patch equals iBOT's, m_crop(i) being the number of masked patches of the crop of
    patch i, and crops without a mask count in V B; L_koleo is on the CLS of the student's encoder, before stem and
    head, for each global crop.

    What differs from iBOT: one temperature of the teacher, which rises at every step; a patch center from masked
    patches only, the mean of the processes' means; or Sinkhorn-Knopp in place of centers.

    Args:
        config: The encoder's configuration, with a mask token.
        num_prototypes: K.
        head_hidden_size: Width of the head's MLP.
        bottleneck_size: Width of its L2-normalised output, which meets the prototypes.
        head_layers: Linear layers of the MLP.
        freeze_gain: Keep the gain of each prototype at 1.
        separate_head: A head of its own for patches (configurations for large data).
        centering: "centering", or "sinkhorn" with 3 iterations (configurations for large data).
        student_temperature: tau_s.
        teacher_temperature: tau_t after the warm-up.
        warmup_teacher_temperature: tau_t at the start.
        teacher_temperature_warmup_epochs: Length of the warm-up, 0 for none.
        center_momentum: Share of the old centers in the new ones.
        cls_weight: Factor of L_cls.
        patch_weight: Factor of L_patch.
        koleo_weight: Factor of L_koleo; 0 leaves it out.
        gather_koleo: Seek KoLeo's nearest neighbours in the batch of all processes, not in that of one.
        local_crops: Whether the student sees local crops, too.
        equivariant_logits: Logit split: this many of the K logits, the last ones, are left to equivariance objectives.
            0 splits the encoder's stem; more needs an encoder without one.

    Logs:
        ``loss_cls``, ``loss_patch``, ``loss_koleo``: weighted, they add up to the loss; ``teacher_entropy``: mean
        entropy of the CLS targets, 0 or log K in a collapse; ``cls_divergence``: L_cls less that entropy;
        ``teacher_temperature``.

    Raises:
        ValueError: For values out of range; in ``forward``, without a teacher, with fewer than two global crops,
            without masks, or with a single image for KoLeo.
    """

    citation: ClassVar[str] = """@article{oquab2024dinov2,
  title   = {{DINOv2}: Learning Robust Visual Features without Supervision},
  author  = {Oquab, Maxime and Darcet, Timoth{\\'e}e and Moutakanni, Th{\\'e}o and Vo, Huy and Szafraniec, Marc and
             Khalidov, Vasil and Fernandez, Pierre and Haziza, Daniel and Massa, Francisco and El-Nouby, Alaaeldin and
             Assran, Mahmoud and Ballas, Nicolas and Galuba, Wojciech and Howes, Russell and Huang, Po-Yao and
             Li, Shang-Wen and Misra, Ishan and Rabbat, Michael and Sharma, Vasu and Synnaeve, Gabriel and Xu, Hu and
             J{\\'e}gou, Herv{\\'e} and Mairal, Julien and Labatut, Patrick and Joulin, Armand and Bojanowski, Piotr},
  journal = {Transactions on Machine Learning Research},
  year    = {2024},
  url     = {https://arxiv.org/abs/2304.07193}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        num_prototypes: int = 65536,
        head_hidden_size: int = 2048,
        bottleneck_size: int = 256,
        head_layers: int = 3,
        freeze_gain: bool = False,
        separate_head: bool = False,
        centering: Centering = "centering",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature_warmup_epochs: float = 30,
        center_momentum: float = 0.9,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        gather_koleo: bool = False,
        local_crops: bool = True,
        equivariant_logits: int = 0,
    ) -> None:
        temperature = TeacherTemperature(
            teacher_temperature, warmup_teacher_temperature, teacher_temperature_warmup_epochs, clock="step"
        )
        super().__init__(
            config,
            head={
                "num_prototypes": num_prototypes,
                "hidden_size": head_hidden_size,
                "bottleneck_size": bottleneck_size,
                "num_layers": head_layers,
                "freeze_gain": freeze_gain,
                "patches": "own_head" if separate_head else "shared",
            },
            student_temperature=student_temperature,
            cls_temperature=temperature,
            patch_temperature=temperature,
            cls_weight=cls_weight,
            patch_weight=patch_weight,
            center_momentum=center_momentum,
            centering=centering,
            local_crops=local_crops,
            equivariant_logits=equivariant_logits,
        )
        if koleo_weight < 0:
            raise ValueError(f"`koleo_weight` is {koleo_weight}, expected 0 (none) or more.")
        self.koleo_weight = koleo_weight
        self.gather_koleo = gather_koleo

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a single image for KoLeo: it has no neighbour."""
        if self.koleo_weight:
            check_neighbours(images * (processes if self.gather_koleo else 1))

    def _regularizers(self, student: Features) -> dict[str, Tensor]:
        if not self.koleo_weight:
            return {}
        return {"loss_koleo": self.koleo_weight * koleo_loss(student.cls, self.gather_koleo)}
