"""EquiMod: predict a view's embedding from that of the un-augmented image and the parameters of the augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..views.cropping import crop_views
from ..views.makers import ViewMaker
from ..views.needs import ExtraViews, Needs
from ..views.view_specs import PIPELINES
from .base import Features, LossOutput, Objective, Reach
from .contrast import CONTRASTS, contrast
from .heads import Projector, SyncBatchNorm1d, cls_after

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Item, Views
    from ..views.facts import ViewFacts

__all__ = ["EquiModObjective", "UnaugmentedImage", "augmentation_parameters"]

BOX = ("top", "left", "height", "width")
# Components of p, in the authors' order.
PARAMETERS = (
    *BOX,
    "flip",
    "jitter_applied",
    *(f"order_{place}" for place in range(4)),
    *("brightness", "contrast", "saturation", "hue"),
    "grayscale",
    *("blur_applied", "blur_sigma"),
    "solarize",
)


class UnaugmentedImage(ViewMaker):
    """The image as evaluation shows it: its centre, of the size of the global crops, and nothing else done to it."""

    def crop(self, item: Item, rng: np.random.Generator) -> dict[str, Any]:
        """Cut the centre: ``pixels`` uint8 (3, S, S).

        Raises:
            ValueError: There is an image for each view.
        """
        if len(item.images) > 1:
            raise ValueError(
                f"EquiMod predicts views from the one image that they were made of, and the data set gives "
                f"{len(item.images)} at a time. Choose another equivariance objective."
            )
        pixels, _ = crop_views(item.images, PIPELINES["center"].views[:1], self.settings.image_size, rng)
        return {"pixels": pixels[0]}

    def __call__(self, batch: dict[str, Any]) -> tuple[Sequence[Tensor], Any]:
        """Return one view (B, 3, S, S)."""
        return [batch["pixels"].to(torch.float32, memory_format=torch.contiguous_format).div_(255)], None


class EquiModObjective(Objective):
    r"""Predict the embedding of each view from the image before augmentation and the augmentation's parameters p.

    .. math::
        L = \ell(y_v, \hat y_v), \quad \hat y_v = \mathrm{BN}(W [y_0 ; \mathrm{BN}(W_p\, \bar p_v)]), \quad y = E(h)

    "EquiMod: An Equivariance Module to Improve Visual Instance Discrimination" (https://arxiv.org/abs/2211.01244), as
    in ``src/model.py`` of ADevillers/EquiMod. h (B, D) are CLS representations, before any stem or projector, of the V
    global crops and of x_0, the centre of the image without augmentation, which the student encodes in a pass of its
    own. E is an MLP that sees all of them at once, W the predictor, deliberately linear. l is NT-Xent over the 2 V B
    embeddings and predictions of each process among those of all; nothing is detached.

    p has 18 components: top, left, height and width of the crop, flip, jitter, the order of the four colour operations,
    brightness, contrast, saturation, hue, grayscale, blur, its sigma, solarize; the last one only where a view may be
    solarized, else 17. They are standardised by mean and standard deviation of this run's own pipeline
    (``ViewFacts.means``); one that never changes, as the order here, is 0. Boxes are fractions of the image where the
    authors have pixels, which mean something else in each image of another size. No g behind the augmentation is told.

    Args:
        config: The encoder's configuration.
        facts: Means and deviations of what the pipeline draws.
        temperature: tau.
        contrast: l. "nt_xent", the paper's; or "info_nce", half of MoCo-v3's in both directions, as the SER paper's
            port has it (``contrast.contrast``).
        hidden_size: Width of the hidden layers of E; ``None``: the encoder's. The paper's ResNet-50 takes its 2048.
        projection_size: Width of y, of the encoded p and of the prediction.
        layer: Read CLS after this block, through a LayerNorm of this objective's own, and encode x_0 no further;
            ``None``, or the last block: behind the encoder's final norm.

    Logs:
        ``loss_prediction``: the loss; ``accuracy``: share of embeddings and predictions that find each other first;
        ``equivariance_gain``: cos(y_v, prediction) - cos(y_v, y_0), by how much the prediction is nearer to a view than
        the image itself: it should become positive.

    Raises:
        ValueError: Views that do not differ, a temperature of 0 or less, a layer without CLS.
    """

    purpose: ClassVar[str] = (
        "EquiMod asks the features of a view to be predictable, by a linear map, from those of the image and what the "
        "augmentation did to it."
    )
    citation: ClassVar[str] = """@inproceedings{devillers2023equimod,
  title     = {EquiMod: An Equivariance Module to Improve Visual Instance Discrimination},
  author    = {Devillers, Alexandre and Lefort, Mathieu},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  url       = {https://arxiv.org/abs/2211.01244}
}"""
    means: Tensor
    deviations: Tensor

    def __init__(
        self,
        config: EquiSSLConfig,
        facts: ViewFacts,
        temperature: float = 0.2,
        contrast: Literal["nt_xent", "info_nce"] = "nt_xent",
        hidden_size: int | None = None,
        projection_size: int = 128,
        layer: int | None = None,
    ) -> None:
        super().__init__(config)
        if temperature <= 0:
            raise ValueError(f"`temperature` is {temperature}, expected a value above 0.")
        if contrast not in CONTRASTS:
            raise ValueError(f"`contrast` of EquiMod is {contrast!r}, expected one of {', '.join(CONTRASTS)}.")
        if not any(facts.deviations.values()):
            raise ValueError(
                "EquiMod predicts what the augmentation does to features, and this view pipeline does the same to all "
                "images. Choose one that does not, for example views.pipeline: {name: vicreg}."
            )
        self.temperature, self.form = temperature, contrast
        self.layer, self.norm = cls_after(layer, config, "EquiMod")
        solarizes = facts.deviations.get("solarize", 0.0) > 0
        self.parameter_names = PARAMETERS if solarizes else PARAMETERS[:-1]
        for name, known in (("means", facts.means), ("deviations", facts.deviations)):
            values = torch.tensor([known.get(component, 0.0) for component in self.parameter_names])
            self.register_buffer(name, values)
        width = hidden_size or config.hidden_size
        self.projector = Projector(config.hidden_size, (width, width, projection_size), bias=False, normalize=True)
        self.parameter_encoder = nn.Sequential(
            nn.Linear(len(self.parameter_names), projection_size, bias=False), SyncBatchNorm1d(projection_size)
        )
        self.predictor = nn.Sequential(
            nn.Linear(2 * projection_size, projection_size, bias=False), SyncBatchNorm1d(projection_size, affine=False)
        )

    @property
    def needs(self) -> Needs:
        """Ask for CLS of the un-augmented image, for what was done to the views, and for the tokens of the layer."""
        image = ExtraViews("unaugmented", UnaugmentedImage, patches=False, last_layer=self.layer)
        layers = () if self.layer is None else (self.layer,)
        return Needs(crop_boxes=True, photometric=True, hidden_layers=layers, extra=(image,))

    @property
    def trains(self) -> Reach:
        """Train all blocks and the final norm, or the blocks up to the layer; never the stem."""
        return Reach(blocks=self.layer, norm=self.layer is None, stem=False)

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of the global crops of ``student``; ``teacher`` and pixels are not used."""
        if views.crop_boxes is None or not views.photometric:
            raise ValueError(
                "The views do not say how they were cropped and coloured. Build the view pipeline with this "
                "objective's `needs`."
            )
        # Rows of images that join the usual ones are left out: how they were augmented is not known.
        crops = student.tokens[:, :, 0] if self.layer is None else student.hidden[self.layer].cls  # (V, B, D)
        image = student.extra["unaugmented"][0].cls  # (B, D)
        h = self.norm(torch.cat([image[None], crops]))  # (1 + V, B, D)
        y = self.projector(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        actual, original = y[1:].flatten(0, 1), y[:1].expand_as(y[1:]).flatten(0, 1)  # (V B, d) each
        p = self._standardize(augmentation_parameters(views.crop_boxes, views.photometric))
        predicted = self.predictor(torch.cat([original, self.parameter_encoder(p.flatten(0, 1))], dim=1))
        with torch.autocast(y.device.type, enabled=False):  # logits go up to 1 / tau
            actual, predicted, original = actual.float(), predicted.float(), original.float()
            loss, accuracy = contrast(actual, predicted, self.temperature, self.form)
            loss = loss if self.form == "nt_xent" else loss / 2
        with torch.no_grad():
            gain = F.cosine_similarity(actual, predicted) - F.cosine_similarity(actual, original)
        logs = {"loss_prediction": loss.detach(), "accuracy": accuracy, "equivariance_gain": gain.mean()}
        return LossOutput(loss, logs)

    def _standardize(self, parameters: Tensor) -> Tensor:
        """Scale p (V, B, 18) by the pipeline's statistics, and leave out what it never draws: (V, B, 17 or 18)."""
        p = parameters[..., : len(self.parameter_names)]
        return torch.where(self.deviations > 0, (p - self.means) / self.deviations, 0.0)


def augmentation_parameters(boxes: Tensor, photometric: Mapping[str, Tensor]) -> Tensor:
    """Put what was drawn for each view into one vector, (V, B, 18), in the order of ``PARAMETERS``.

    Args:
        boxes: (V, B, 4), top, left, height, width as fractions of the image.
        photometric: Name -> (V, B), as ``Views`` have it.
    """
    known = {**dict(zip(BOX, boxes.unbind(-1), strict=True)), **photometric}
    order = {f"order_{place}": torch.full_like(boxes[..., 0], place) for place in range(4)}  # the same in all views
    return torch.stack([(known | order)[name].float() for name in PARAMETERS], dim=-1)
