"""AugSelf: predict from two views' features how differently the two were augmented."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..views.needs import Needs
from .base import Features, LossOutput, Objective, Reach
from .heads import SyncBatchNorm1d, cls_after

if TYPE_CHECKING:
    from ..modeling import EquiSSLConfig
    from ..views.base import Views
    from ..views.facts import ViewFacts

__all__ = ["AugSelfObjective", "blur_difference", "color_difference", "crop_difference", "solarize_difference"]

QUARTERS = 4
COLORS = ("brightness", "contrast", "saturation", "hue")
# How many numbers are predicted of each factor.
WIDTHS = {"crop": 4, "color": 4, "flip": 1, "blur": 1, "solarize": 1, "rotation": 4}
# What has to vary in a view for its factor to be predicted (``ViewFacts.deviations``), and what lets it vary.
VARYING = {
    "crop": (("top", "left", "height", "width"), "crop_scale: [0.2, 1.0]"),
    "color": (COLORS, "brightness: 0.4"),
    "flip": (("flip",), "flip_probability: 0.5"),
    "blur": (("blur_sigma",), "blur_probability: 0.5"),
    "solarize": (("solarize",), "solarize_probability: 0.2"),
}
TURNS = "turns"  # the parameter of the family rot90, also where it is a member of another one


class AugSelfObjective(Objective):
    r"""Predict the difference between the augmentation parameters of two views from both representations.

    .. math::
        L = \sum_f w_f \frac{1}{2} \left[ \ell_f(\phi_f([h_1 ; h_2]),\, \omega_f^{12}) +
            \ell_f(\phi_f([h_2 ; h_1]),\, \omega_f^{21}) \right]

    "Improving Transferability of Representations via Augmentation-Aware Self-Supervision"
    (https://arxiv.org/abs/2111.09613), with the targets of hankook/AugSelf. h (B, D) are CLS representations of the
    first and the last global crop, before any stem or projector, both of the student; each factor f has an MLP of its
    own, whose batch normalisation sees the batch of all processes. omega^12 is that of view 1 less that of view 2:

    - crop (4): centres and sizes of the boxes as fractions of the image; where a view is mirrored, so is the x of its
      centre (the authors' code mirrors both views' where the first one is);
    - color (4): brightness, contrast, saturation and hue, each in widths of its own range, 0 where jitter was skipped;
    - flip (1): whether both views are mirrored or both are not;
    - blur (1): sigma in pixels, 0 where blur was skipped;
    - solarize (1): the threshold, 1 where solarization was skipped;
    - rotation (4): by how many quarter turns, modulo 4. They come from the transformation family ``rot90``, which turns
      the last view alone; the authors turn both.

    The loss of a factor is the mean squared error of tanh(phi), and cross-entropy for flips and rotations. Weights
    default to the paper's on ImageNet-100; 0 leaves a factor out. No other g behind the augmentation is predicted.

    Args:
        config: The encoder's configuration.
        facts: Ranges of the colour factors, what varies between views, and the parameters of g.
        crop_weight, color_weight, flip_weight, blur_weight, solarize_weight, rotation_weight: w_f.
        hidden_size: Width of the MLPs.
        layer: Read CLS after this block, through a LayerNorm of this objective's own; ``None``, or the last block:
            behind the encoder's final norm.

    Logs:
        ``loss_crop``, ``loss_color`` ...: weighted, of the factors with a weight; they add up to the loss.

    Raises:
        ValueError: A negative weight, or none above 0; views that do not differ, or a factor that never does; a layer
            without CLS; in ``forward``, fewer than two global crops.
    """

    purpose: ClassVar[str] = (
        "AugSelf asks the features to tell by how much two views of an image differ in crop and colours, which the "
        "augmentation tells it."
    )
    citation: ClassVar[str] = """@inproceedings{lee2021augself,
  title     = {Improving Transferability of Representations via Augmentation-Aware Self-Supervision},
  author    = {Lee, Hankook and Lee, Kibok and Lee, Kimin and Lee, Honglak and Shin, Jinwoo},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021},
  url       = {https://arxiv.org/abs/2111.09613}
}"""

    def __init__(
        self,
        config: EquiSSLConfig,
        facts: ViewFacts,
        crop_weight: float = 0.5,
        color_weight: float = 0.5,
        flip_weight: float = 0.0,
        blur_weight: float = 0.0,
        solarize_weight: float = 0.0,
        rotation_weight: float = 0.0,
        hidden_size: int = 512,
        layer: int | None = None,
    ) -> None:
        super().__init__(config)
        given = (crop_weight, color_weight, flip_weight, blur_weight, solarize_weight, rotation_weight)
        weights = {name: float(weight) for name, weight in zip(WIDTHS, given, strict=True)}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        if not self.weights or min(weights.values()) < 0:
            raise ValueError(f"AugSelf's weights may not be negative, and one must be above 0, got {weights}.")
        self.strengths = (facts.strengths[0], facts.strengths[-1])
        self.turns = [number for number, name in enumerate(facts.parameter_names) if name.split("_")[-1] == TURNS]
        _check_views(facts, self.weights, bool(self.turns))
        self.layer, self.norm = cls_after(layer, config, "AugSelf")
        self.predictors = nn.ModuleDict(
            {name: _predictor(2 * config.hidden_size, hidden_size, WIDTHS[name]) for name in self.weights}
        )

    @property
    def needs(self) -> Needs:
        """Ask how views were cropped, coloured and, for rotations, turned; and for the tokens of the layer."""
        layers = () if self.layer is None else (self.layer,)
        turned = "rotation" in self.weights
        return Needs(crop_boxes=True, photometric=True, parameters=turned, hidden_layers=layers)

    @property
    def trains(self) -> Reach:
        """Train all blocks and the final norm, or the blocks up to the layer; never the stem."""
        return Reach(blocks=self.layer, norm=self.layer is None, stem=False)

    def forward(self, student: Features, teacher: Features | None, views: Views) -> LossOutput:
        """Compute the loss of first and last global crop of ``student``; ``teacher`` and pixels are not used."""
        if len(student.tokens) < 2:
            raise ValueError(f"AugSelf compares two global crops, got {len(student.tokens)}.")
        # Rows of images that join the usual ones are left out: how they were augmented is not known.
        tokens = student.tokens[:, :, 0] if self.layer is None else student.hidden[self.layer].cls  # (V, B, D)
        h1, h2 = self.norm(tokens[0]), self.norm(tokens[-1])
        pairs = torch.cat([torch.cat([h1, h2], dim=1), torch.cat([h2, h1], dim=1)])  # (2B, 2D)
        targets = self.targets(views)
        parts = {}
        for name, weight in self.weights.items():
            output = self.predictors[name](pairs).float()  # (2B, width)
            with torch.autocast(output.device.type, enabled=False):
                parts[f"loss_{name}"] = weight * _error(name, output, targets[name])
        loss = torch.stack(list(parts.values())).sum()
        return LossOutput(loss, {name: part.detach() for name, part in parts.items()})

    @torch.no_grad()
    def targets(self, views: Views) -> dict[str, Tensor]:
        """Return what each factor's MLP has to predict: that of view 1 less that of the last view, then the reverse.

        Returns:
            Factor -> (2B, width); rotation (2B,), classes.
        """
        if views.crop_boxes is None or not views.photometric:
            raise ValueError(
                "The views do not say how they were cropped and coloured. Build the view pipeline with this "
                "objective's `needs`."
            )
        first, last = ({key: value[view] for key, value in views.photometric.items()} for view in (0, -1))
        differences = {
            "crop": lambda: crop_difference(views.crop_boxes[0], views.crop_boxes[-1], first["flip"], last["flip"]),
            "color": lambda: color_difference(first, last, self.strengths),
            "flip": lambda: (first["flip"] == last["flip"]).float()[:, None],
            "blur": lambda: blur_difference(first, last),
            "solarize": lambda: solarize_difference(first, last, self.strengths),
            "rotation": lambda: -self._turns(views),
        }
        found = {name: differences[name]() for name in self.weights}
        both = {name: torch.cat([value, value if name == "flip" else -value]) for name, value in found.items()}
        return {name: value % QUARTERS if name == "rotation" else value for name, value in both.items()}

    def _turns(self, views: Views) -> Tensor:
        """Return the quarter turns of the last view, (B,) int64."""
        if views.parameters is None:
            raise ValueError(
                "The views do not say how they were turned. Build the view pipeline with this objective's `needs`."
            )
        return views.parameters[:, self.turns[0]].round().long()


def crop_difference(boxes1: Tensor, boxes2: Tensor, flip1: Tensor, flip2: Tensor) -> Tensor:
    """Compare two crops: y and x of the centre, height, width, (B, 4), as they lie in the views.

    Args:
        boxes1, boxes2: (B, 4), top, left, height, width as fractions of the image.
        flip1, flip2: (B,) bool, whether the view is mirrored.
    """
    centres = []
    for boxes, flip in ((boxes1, flip1), (boxes2, flip2)):
        y, x = (boxes[:, :2] + boxes[:, 2:] / 2).unbind(1)
        centres.append(torch.stack([y, torch.where(flip, 1 - x, x)], dim=1))
    return torch.cat([centres[0] - centres[1], boxes1[:, 2:] - boxes2[:, 2:]], dim=1)


def color_difference(
    first: Mapping[str, Tensor], last: Mapping[str, Tensor], strengths: tuple[Mapping[str, float], Mapping[str, float]]
) -> Tensor:
    """Compare two views' colour factors, each in widths of its own range, (B, 4).

    Args:
        first, last: Name -> (B,), the factors, and the hue in turns; neutral where jitter was skipped.
        strengths: Ranges of the factors in the same two views, as ``ViewSpec`` states them.
    """
    return torch.stack([_shift(name, first, strengths[0]) - _shift(name, last, strengths[1]) for name in COLORS], dim=1)


def _shift(name: str, drawn: Mapping[str, Tensor], strengths: Mapping[str, float]) -> Tensor:
    """Return how far one colour factor lies from neutral, in widths of its range, (B,)."""
    strength = strengths[name]
    width = strength + (strength if name == "hue" else min(strength, 1.0))  # factors are not negative
    neutral = 0.0 if name == "hue" else 1.0
    return (drawn[name] - neutral) / width if width else torch.zeros_like(drawn[name])


def blur_difference(first: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> Tensor:
    """Compare two views' sigma in pixels, (B, 1)."""
    return (first["blur_sigma"] - last["blur_sigma"])[:, None]


def solarize_difference(
    first: Mapping[str, Tensor], last: Mapping[str, Tensor], strengths: tuple[Mapping[str, float], Mapping[str, float]]
) -> Tensor:
    """Compare two views' thresholds of solarization, 1 where it was skipped, (B, 1)."""
    thresholds = [
        torch.where(drawn["solarize"], own["solarize_threshold"], 1.0)
        for drawn, own in zip((first, last), strengths, strict=True)
    ]
    return (thresholds[0] - thresholds[1])[:, None]


def _error(name: str, output: Tensor, target: Tensor) -> Tensor:
    if name == "flip":
        return F.binary_cross_entropy_with_logits(output, target)
    if name == "rotation":
        return F.cross_entropy(output, target)
    return F.mse_loss(torch.tanh(output), target)


def _predictor(in_features: int, hidden_size: int, out_features: int) -> nn.Sequential:
    """Build an MLP with two hidden layers; as the authors', linear layers before a normalisation have no bias."""
    return nn.Sequential(
        nn.Linear(in_features, hidden_size, bias=False),
        SyncBatchNorm1d(hidden_size),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_size, hidden_size, bias=False),
        SyncBatchNorm1d(hidden_size),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_size, out_features),
    )


def _check_views(facts: ViewFacts, weights: Mapping[str, float], turned: bool) -> None:
    """Refuse a pipeline whose views never differ in what is to be predicted."""
    if facts.same_base and set(weights) != {"rotation"}:
        raise ValueError(
            "AugSelf predicts how two views were cropped and coloured, and this view pipeline does neither. Choose one "
            "that does, for example views.pipeline: {name: vicreg}."
        )
    for name, (draws, remedy) in VARYING.items():
        if name in weights and not any(facts.deviations.get(draw, 1.0) for draw in draws):
            raise ValueError(
                f"AugSelf predicts how two views differ in {name}, and this view pipeline treats all views alike there."
                f" Set {name}_weight: 0, or for example views.pipeline.{remedy}."
            )
    if "rotation" in weights and not turned:
        raise ValueError(
            "AugSelf predicts by how many quarter turns a view is turned, and no view is. Set rotation_weight: 0, or "
            "views.transformation: {name: rot90}."
        )
