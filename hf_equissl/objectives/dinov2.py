"""DINOv2: iBOT's two losses with other targets and centers, and KoLeo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .base import Features
from .koleo import check_neighbours, koleo_loss
from .self_distillation import SelfDistillationObjective

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
        separate_head: A head of its own for patches (configurations for large data).
        cls_weight: Factor of L_cls.
        patch_weight: Factor of L_patch.
        koleo_weight: Factor of L_koleo; 0 leaves it out.
        gather_koleo: Seek KoLeo's nearest neighbours in the batch of all processes, not in that of one.
        common: Those of :class:`.SelfDistillationObjective`; configurations for large data have centering "sinkhorn".

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

    clock = "step"

    def __init__(
        self,
        config: EquiSSLConfig,
        separate_head: bool = False,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        gather_koleo: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(config, **common)
        if koleo_weight < 0:
            raise ValueError(f"`koleo_weight` is {koleo_weight}, expected 0 (none) or more.")
        self.koleo_weight = koleo_weight
        self.gather_koleo = gather_koleo
        self._build_heads("own_head" if separate_head else "shared", self.cls_schedule, cls_weight, patch_weight)

    def check_batch(self, images: int, processes: int) -> None:
        """Refuse a single image for KoLeo: it has no neighbour."""
        if self.koleo_weight:
            check_neighbours(images * (processes if self.gather_koleo else 1))

    def _regularizers(self, student: Features) -> dict[str, Tensor]:
        if not self.koleo_weight:
            return {}
        return {"loss_koleo": self.koleo_weight * koleo_loss(student.cls, self.gather_koleo)}
