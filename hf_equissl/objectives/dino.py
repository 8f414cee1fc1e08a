"""DINO: self-distillation of the CLS token over prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from .self_distillation import SelfDistillationObjective

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
        common: Those of :class:`.SelfDistillationObjective`.

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

    def __init__(self, config: EquiSSLConfig, **common: Any) -> None:
        super().__init__(config, **common)
        self._build_heads()
