"""Rotation about the image centre."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import FILLS, INTERPOLATIONS, rigid_inverse, warp
from .uniform import UniformFamily, at_fractions, check_choice, check_number


class RotationFamily(UniformFamily):
    """Rotate about the image centre, counter-clockwise as seen on screen.

    Default range of Table 1 of the EquiSSL paper (arXiv 2503.18753): angle in [-45, 45] degrees. At fraction t the
    angle is t * angle. Black corners (``fill="zeros"``) show the angle without any content; "reflect" is the control.

    Args:
        max_degrees: The angle is uniform in [-max_degrees, max_degrees], at most 180.
        fill: "zeros", "reflect" or "border": what lies outside the image.
        interpolation: "bilinear", "nearest" or "bicubic".

    Parameters (B, 1): ``angle`` in degrees.
    """

    parameter_names = ("angle",)
    num_draws = 1

    def __init__(self, max_degrees: float = 45.0, fill: str = "zeros", interpolation: str = "bilinear") -> None:
        self.max_degrees = check_number("max_degrees", max_degrees, high=180)
        self.fill = check_choice("fill", fill, FILLS)
        self.interpolation = check_choice("interpolation", interpolation, INTERPOLATIONS)
        super().__init__([(-self.max_degrees, self.max_degrees)])

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Rotate images (B, C, H, W) by parameters (B, 1) at fractions (F,) -> (B, F, C, H, W)."""
        degrees = at_fractions(parameters, fractions)[..., 0]
        none = torch.zeros_like(degrees)
        return warp(images, rigid_inverse(degrees, none, none), self.fill, self.interpolation)
