"""Rigid motions of the plane, SE(2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import FILLS, INTERPOLATIONS, UNITS, rigid_inverse, shift_to_pixels, warp
from .translation import check_shift
from .uniform import UniformFamily, at_fractions, check_choice, check_number

PATHS = ("linear", "geodesic")


def geodesic_shift(radians: Tensor, shift_x: Tensor, shift_y: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
    """Shift part of exp(t log g) for g = (rotate, then shift): the image turns about one fixed point.

    With V(a) = sinc(a / 2) R(a / 2) the shift of exp(t log g) is t V(t a) V(a)^-1 tau
    = t sinc(t a / 2) / sinc(a / 2) R((t - 1) a / 2) tau, where sinc(z) = sin(z) / z and R as in ``rigid_inverse``.

    Args:
        radians: (B, 1), the full angle a, in (-2 pi, 2 pi).
        shift_x: (B, 1), x of the full shift tau in pixels.
        shift_y: (B, 1), y of the full shift tau in pixels.
        fractions: (1, F), t.

    Returns:
        x and y of the shift at each fraction, (B, F) each. Fraction 1 gives tau exactly.
    """
    # torch.sinc(z) is sin(pi z) / (pi z).
    ratio = torch.sinc(fractions * radians / (2 * torch.pi)) / torch.sinc(radians / (2 * torch.pi))
    turn = (fractions - 1) * radians / 2
    cos, sin = torch.cos(turn), torch.sin(turn)
    scale = fractions * ratio
    return scale * (cos * shift_x + sin * shift_y), scale * (cos * shift_y - sin * shift_x)


class SE2Family(UniformFamily):
    """Rotate about the image centre, then shift, in ONE resampling.

    Default ranges of Table 1 of the EquiSSL paper (arXiv 2503.18753): angle in [-45, 45] degrees, tx and ty in
    [-10, 10] (no unit in the table; here pixels at 224, see ``TranslationFamily``). Angles are counter-clockwise as
    seen on screen, tx points right, ty down.

    Args:
        max_degrees: The angle is uniform in [-max_degrees, max_degrees], at most 180.
        max_shift: tx and ty are uniform in [-max_shift, max_shift], in ``unit``.
        unit: "pixels_at_224", "pixels" or "fraction" (of width and height, at most 1).
        path: "linear": fraction t scales angle, tx and ty by t, as theta_k = k theta / (K + 1) says; "geodesic":
            exp(t log g), the one-parameter subgroup through g, so that fractions compose.
        fill: "zeros", "reflect" or "border": what lies outside the image.
        interpolation: "bilinear", "nearest" or "bicubic".

    Parameters (B, 3): ``angle`` in degrees, ``tx``, ``ty`` in ``unit``.
    """

    parameter_names = ("angle", "tx", "ty")
    num_draws = 3

    def __init__(
        self,
        max_degrees: float = 45.0,
        max_shift: float = 10.0,
        unit: str = "pixels_at_224",
        path: str = "linear",
        fill: str = "zeros",
        interpolation: str = "bilinear",
    ) -> None:
        self.max_degrees = check_number("max_degrees", max_degrees, high=180)
        self.unit = check_choice("unit", unit, UNITS)
        self.max_shift = check_shift(max_shift, self.unit)
        self.path_type = check_choice("path", path, PATHS)
        self.fill = check_choice("fill", fill, FILLS)
        self.interpolation = check_choice("interpolation", interpolation, INTERPOLATIONS)
        shifts = (-self.max_shift, self.max_shift)
        super().__init__([(-self.max_degrees, self.max_degrees), shifts, shifts])

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Move images (B, C, H, W) by parameters (B, 3) at fractions (F,) -> (B, F, C, H, W)."""
        height, width = images.shape[-2:]
        angle, tx, ty = at_fractions(parameters, fractions).unbind(-1)  # (B, F) each
        if self.path_type == "geodesic":
            full_angle, full_x, full_y = parameters.float()[:, :, None].unbind(1)  # (B, 1) each
            # In pixels before anything turns: elsewhere a rotation would mix units of two lengths.
            full_x, full_y = shift_to_pixels(full_x, full_y, self.unit, height, width)
            fractions = fractions.to(parameters.device, torch.float32, non_blocking=True)[None]
            tx, ty = geodesic_shift(torch.deg2rad(full_angle), full_x, full_y, fractions)
        else:
            tx, ty = shift_to_pixels(tx, ty, self.unit, height, width)
        return warp(images, rigid_inverse(angle, tx, ty), self.fill, self.interpolation)
