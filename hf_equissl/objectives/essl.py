"""E-SSL: tell by how many quarter turns a small crop was turned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..views.augmentation import VIEW_DRAWS, augment
from ..views.cropping import crop_views
from ..views.makers import ViewMaker, ViewSettings
from ..views.needs import ExtraViews, Needs
from ..views.view_specs import ViewSpec
from .base import Features, LossOutput, Objective, Reach

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Item, Views

__all__ = ["ESSLObjective", "FourRotations"]

TURNS = 4


class FourRotations(ViewMaker):
    """A small crop of each image, coloured, at 0, 1, 2 and 3 quarter turns counter-clockwise: four views of one size.

    Args:
        settings: Settings of the pipeline.
        size: Side of the crop in pixels.
        spec: How the crop is cut and coloured.
    """

    def __init__(self, settings: ViewSettings, size: int, spec: ViewSpec) -> None:
        super().__init__(settings)
        self.size, self.spec = size, spec

    def crop(self, item: Item, rng: np.random.Generator) -> dict[str, Any]:
        """Draw colours and cut one crop: ``draws`` (n,), ``pixels`` uint8 (3, s, s)."""
        draws = torch.from_numpy(rng.random(len(VIEW_DRAWS), dtype=np.float32))
        pixels, _ = crop_views(item.images[:1], (self.spec,), self.size, rng)
        return {"draws": draws, "pixels": pixels[0]}

    def __call__(self, batch: dict[str, Any]) -> tuple[Sequence[Tensor], Any]:
        """Colour the crops and turn them: four views (B, 3, s, s)."""
        images, _ = augment(batch["pixels"], batch["draws"], self.spec)
        return [images.rot90(turns, dims=(-2, -1)) for turns in range(TURNS)], None


class ESSLObjective(Objective):
    r"""Predict which of four rotations a small crop was given.

    .. math::
        L = \frac{1}{4B} \sum_{i=1}^{B} \sum_{r=0}^{3} \mathrm{CE}\left( \phi(f(R_r\, x_i)),\, r \right)

    "Equivariant Contrastive Learning" (https://arxiv.org/abs/2111.00899), constants as in rdangovs/essl. x_i is one
    more crop of each image, 96 px of 5 to 14 % of its area, with the usual flip and colours (jitter 0.4, 0.4, 0.2, 0.1
    at 0.8, grayscale 0.2, blur 0.1), R_r a rotation by r quarter turns. All 4B go through the student in a pass of
    their own; f is the CLS representation (D) before any stem or projector, and phi an MLP with LayerNorm. Nothing is
    exchanged between processes.

    The weight (lambda) of this term is the paper's 0.4 over SimCLR, 0.08 over SimSiam and 8 over Barlow Twins; the SER
    paper's port takes 1 over MoCo-v3 and Barlow Twins and 0.3 over DINO.

    Args:
        config: The encoder's configuration.
        size: Side of the crops, a multiple of the patch size.
        crop_scale: Smallest and largest area of the crops as shares of the image's.
        hidden_size: Width of the MLP; ``None``: the encoder's. The paper's ResNet-50 takes its 2048.
        bottleneck_size: Width of its last hidden layer: 256, or 128 over SimCLR.

    Logs:
        ``loss_rotation``: the loss; ``accuracy``: share of crops whose rotation is told; a quarter is chance.

    Raises:
        ValueError: ``size`` is no multiple of the patch size; an impossible ``crop_scale``.
    """

    purpose: ClassVar[str] = (
        "E-SSL asks the features to tell by how many quarter turns an image is turned, so that they cannot ignore it."
    )
    citation: ClassVar[str] = """@inproceedings{dangovski2022essl,
  title     = {Equivariant Contrastive Learning},
  author    = {Dangovski, Rumen and Jing, Li and Loh, Charlotte and Han, Seungwook and Srivastava, Akash and Cheung,
               Brian and Agrawal, Pulkit and Solja{\\v{c}}i{\\'c}, Marin},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  url       = {https://arxiv.org/abs/2111.00899}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        size: int = 96,
        crop_scale: Sequence[float] = (0.05, 0.14),
        hidden_size: int | None = None,
        bottleneck_size: int = 256,
    ) -> None:
        super().__init__(config)
        if size < 1 or size % config.patch_side:
            raise ValueError(
                f"`size` of E-SSL's crops is {size}, expected a multiple of model.patch_size, {config.patch_side}."
            )
        spec = ViewSpec(crop_scale=cast(tuple[float, float], tuple(crop_scale)), blur_probability=0.1)
        self.options = {"size": size, "spec": spec}
        width = hidden_size or config.hidden_size
        sizes = (config.hidden_size, width, width, bottleneck_size)
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(sizes)):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs)]
            layers += [nn.ReLU(inplace=True)] if number < 2 else []  # the last norm goes straight into the classes
        self.classifier = nn.Sequential(*layers, nn.Linear(bottleneck_size, TURNS))

    @property
    def needs(self) -> Needs:
        """Ask for the four rotations of a small crop, of which CLS alone is read."""
        return Needs(extra=(ExtraViews("four_rotations", FourRotations, self.options, patches=False),))

    @property
    def trains(self) -> Reach:
        """Train everything but the stem."""
        return Reach(stem=False)

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the cross-entropy of the further views; ``teacher`` and the usual crops are not used."""
        turned = student.extra["four_rotations"]
        logits = self.classifier(torch.cat([turned[turns].cls for turns in range(TURNS)])).float()  # (4B, 4)
        labels = torch.arange(TURNS, device=logits.device).repeat_interleave(len(logits) // TURNS)
        with torch.autocast(logits.device.type, enabled=False):
            loss = F.cross_entropy(logits, labels)
        accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
        return LossOutput(loss, {"loss_rotation": loss.detach(), "accuracy": accuracy})
