"""Translation by sub-pixel shifts."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import FILLS, INTERPOLATIONS, UNITS, affine_inverse, shift_to_pixels, warp
from .uniform import UniformFamily, at_fractions, check_choice, check_number


def check_shift(max_shift: object, unit: str) -> float:
    """Return ``max_shift`` as a float. Raises ValueError if negative, or if it leaves the image in fractions."""
    return check_number(f"max_shift (unit {unit!r})", max_shift, high=1.0 if unit == "fraction" else float("inf"))


class TranslationFamily(UniformFamily):
    """Shift the image right (tx > 0) and down (ty > 0).

    Default range of Table 1 of the EquiSSL paper (arXiv 2503.18753): tx and ty in [-10, 10]. The table gives no unit;
    here it is pixels of an image of 224, which other sizes scale by size / 224. At fraction t the shift is t (tx, ty).

    Args:
        max_shift: tx and ty are uniform in [-max_shift, max_shift], in ``unit``.
        unit: "pixels_at_224", "pixels" (of the image at hand) or "fraction" (of its width and height, at most 1).
        fill: "zeros", "reflect" or "border": what lies outside the image.
        interpolation: "bilinear", "nearest" or "bicubic".

    Parameters (B, 2): ``tx``, ``ty`` in ``unit``.
    """

    parameter_names = ("tx", "ty")
    num_draws = 2

    def __init__(
        self,
        max_shift: float = 10.0,
        unit: str = "pixels_at_224",
        fill: str = "zeros",
        interpolation: str = "bilinear",
    ) -> None:
        self.unit = check_choice("unit", unit, UNITS)
        self.max_shift = check_shift(max_shift, self.unit)
        self.fill = check_choice("fill", fill, FILLS)
        self.interpolation = check_choice("interpolation", interpolation, INTERPOLATIONS)
        super().__init__([(-self.max_shift, self.max_shift)] * 2)

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Shift images (B, C, H, W) by parameters (B, 2) at fractions (F,) -> (B, F, C, H, W)."""
        tx, ty = at_fractions(parameters, fractions).unbind(-1)
        tx, ty = shift_to_pixels(tx, ty, self.unit, images.shape[-2], images.shape[-1])
        one, zero = torch.ones_like(tx), torch.zeros_like(tx)
        return warp(images, affine_inverse(((one, zero, -tx), (zero, one, -ty))), self.fill, self.interpolation)
