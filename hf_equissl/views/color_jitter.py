"""Colour jitter: brightness, contrast, saturation, hue."""

from __future__ import annotations

from torch import Tensor

from .photometric import color_jitter_path
from .uniform import UniformFamily, at_fractions, check_number


class ColorJitterFamily(UniformFamily):
    """Brightness, contrast, saturation and hue, always in this order, each result clamped to [0, 1].

    Default ranges of Table 1 of the EquiSSL paper (arXiv 2503.18753): offsets in [-0.4, 0.4] for the first three, which
    act as factors 1 + offset, and in [-0.1, 0.1] turns for the hue. At fraction t all four offsets are scaled by t. The
    order is fixed, because a random order would leave the path between identity and g undefined.

    Args:
        brightness: Its offset is uniform in [-brightness, brightness], at most 1.
        contrast: The same for contrast, relative to the mean luma of the image.
        saturation: The same for saturation, relative to the luma of the pixel.
        hue: The same for hue, in turns, at most 0.5.

    Parameters (B, 4): ``brightness``, ``contrast``, ``saturation`` as offsets of a factor, ``hue`` in turns.
    """

    parameter_names = ("brightness", "contrast", "saturation", "hue")
    num_draws = 4

    def __init__(
        self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1
    ) -> None:
        self.brightness = check_number("brightness", brightness, high=1)
        self.contrast = check_number("contrast", contrast, high=1)
        self.saturation = check_number("saturation", saturation, high=1)
        self.hue = check_number("hue", hue, high=0.5)
        limits = (self.brightness, self.contrast, self.saturation, self.hue)
        super().__init__([(-limit, limit) for limit in limits])

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Jitter images (B, C, H, W) by parameters (B, 4) at fractions (F,) -> (B, F, C, H, W)."""
        brightness, contrast, saturation, turns = at_fractions(parameters, fractions).unbind(-1)  # (B, F) each
        return color_jitter_path(images, 1 + brightness, 1 + contrast, 1 + saturation, turns)
