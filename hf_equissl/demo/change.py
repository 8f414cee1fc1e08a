"""What the demo does to an image: turn, shift, recolour and blur it, all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from ..views import ColorJitterFamily, GaussianBlurFamily, JointFamily, RotationFamily, TranslationFamily

# Field -> its least and its greatest value: what the encoders that ship have seen.
LIMITS: Mapping[str, tuple[float, float]] = {
    "angle": (-45.0, 45.0),
    "shift_right": (-4.5, 4.5),
    "shift_down": (-4.5, 4.5),
    "brightness": (-0.4, 0.4),
    "contrast": (-0.4, 0.4),
    "saturation": (-0.4, 0.4),
    "hue": (-0.1, 0.1),
    "blur": (0.0, 2.0),
}


@dataclass(frozen=True)
class Change:
    """One transformation g, and the way to it. What an image does not show beyond its edges is mirrored.

    Attributes:
        angle: Degrees, counter-clockwise as seen on screen.
        shift_right: Per cent of the width.
        shift_down: Per cent of the height.
        brightness: Offset of a factor: 0.4 makes 1.4 times as bright.
        contrast: Likewise.
        saturation: Likewise.
        hue: Turns of the colour circle.
        blur: Standard deviation in pixels of the image that the encoder sees.

    Raises:
        ValueError: A value is outside its ``LIMITS``.
    """

    angle: float = 0.0
    shift_right: float = 0.0
    shift_down: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), LIMITS[field.name]
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise ValueError(f"{field.name} is {value!r}, expected a number from {low:g} to {high:g}.")

    def path(self, images: Tensor, fractions: Sequence[float] = (1.0,)) -> Tensor:
        """Change images (B, 3, H, W) in [0, 1] at fractions (F,) of the way -> (B, F, 3, H, W) in [0, 1]."""
        angle, right, down, *rest = astuple(self)
        parameters = torch.tensor([[angle, right / 100, down / 100, *rest]]).expand(len(images), -1)
        return joint_family().path(images, parameters, torch.tensor(list(fractions)))

    def apply(self, images: Tensor) -> Tensor:
        """Change images (B, 3, H, W) in [0, 1]; returns the same shape."""
        return self.path(images)[:, 0]


def joint_family() -> JointFamily:
    """Build the four transformations of which a ``Change`` holds the parameters, over the ranges of ``LIMITS``."""
    return JointFamily(
        [
            RotationFamily(LIMITS["angle"][1], fill="reflect"),
            TranslationFamily(LIMITS["shift_right"][1] / 100, unit="fraction", fill="reflect"),
            ColorJitterFamily(*(LIMITS[name][1] for name in ("brightness", "contrast", "saturation", "hue"))),
            GaussianBlurFamily(*LIMITS["blur"]),
        ]
    )
