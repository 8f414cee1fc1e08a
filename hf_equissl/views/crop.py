"""Crop and resize."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import TransformationFamily
from .geometry import INTERPOLATIONS, affine_inverse, warp
from .uniform import check_choice, check_draws, check_range, scale_to_unit

NUM_TRIES = 10


class CropFamily(TransformationFamily):
    """Enlarge a box of the image to the size of the whole image.

    The box is drawn as by RandomResizedCrop of torchvision: an area uniform in ``scale``, an aspect ratio log-uniform
    in ``ratio``, up to 10 tries until the box fits, else the largest central box of an allowed ratio. All is relative
    to the image, so on an image that is not square a ratio of 1 is a box of the image's own shape. Identity is the box
    (0, 0, 1, 1); fraction t is the box at t of the way from there, linearly. Boxes are at most as large as the image,
    so nothing shrinks and no antialiasing is needed.

    Args:
        scale: Smallest and largest area of the box as fractions of the image, in (0, 1].
        ratio: Smallest and largest width / height of the box.
        interpolation: "bilinear", "nearest" or "bicubic".

    Parameters (B, 4): ``top``, ``left``, ``height``, ``width`` of the box as fractions of the image.
    """

    parameter_names = ("top", "left", "height", "width")
    num_draws = 2 * NUM_TRIES + 2

    def __init__(
        self,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bilinear",
    ) -> None:
        self.scale = check_range("scale", scale, low=1e-6, high=1)
        self.ratio = check_range("ratio", ratio, low=1e-3, high=1e3)
        self.interpolation = check_choice("interpolation", interpolation, INTERPOLATIONS)
        # Without a fitting try: the largest box, in the image's own shape (ratio 1) as far as the range allows it.
        nearest = min(max(1.0, self.ratio[0]), self.ratio[1])
        self.fallback = (min(1.0, 1 / nearest), min(1.0, nearest))  # height, width
        smallest, largest = self.scale
        heights = (math.sqrt(smallest / self.ratio[1]), math.sqrt(largest / self.ratio[0]))
        widths = (math.sqrt(smallest * self.ratio[0]), math.sqrt(largest * self.ratio[1]))
        sides = tuple(
            (min(low, fallback, 1.0), max(min(high, 1.0), fallback))
            for (low, high), fallback in zip((heights, widths), self.fallback, strict=True)
        )
        # The possible values of top, left, height and width.
        self.ranges = ((0.0, 1 - sides[0][0]), (0.0, 1 - sides[1][0]), *sides)

    @property
    def identity_parameters(self) -> tuple[float, ...]:
        """The box of the whole image."""
        return (0.0, 0.0, 1.0, 1.0)

    def sample(self, draws: Tensor) -> Tensor:
        """Turn uniform draws (B, 22), of ten areas, ten ratios and two positions, into boxes (B, 4)."""
        draws = check_draws(draws, self.num_draws)
        areas, ratios, positions = draws.split((NUM_TRIES, NUM_TRIES, 2), dim=1)
        log_low, log_high = (math.log(bound) for bound in self.ratio)
        area = areas * (self.scale[1] - self.scale[0]) + self.scale[0]  # (B, 10)
        ratio = torch.exp(ratios * (log_high - log_low) + log_low)
        height, width = torch.sqrt(area / ratio), torch.sqrt(area * ratio)
        fits = (height <= 1) & (width <= 1)
        # Tries count down, so that the largest fitting one is the first; argmax alone may return any of equal ones.
        countdown = torch.arange(NUM_TRIES, 0, -1, device=draws.device)
        first = (fits * countdown).argmax(dim=1, keepdim=True)
        found = fits.any(dim=1)
        height = torch.where(found, height.gather(1, first)[:, 0], self.fallback[0])
        width = torch.where(found, width.gather(1, first)[:, 0], self.fallback[1])
        # The fallback lies at the centre.
        top = (1 - height) * torch.where(found, positions[:, 0], 0.5)
        left = (1 - width) * torch.where(found, positions[:, 1], 0.5)
        return torch.stack((top, left, height, width), dim=1)

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Crop images (B, C, H, W) to boxes (B, 4) at fractions (F,) -> (B, F, C, H, W)."""
        image_height, image_width = images.shape[-2:]
        t = fractions.to(parameters.device, torch.float32, non_blocking=True)  # (F,)
        top, left, height, width = parameters.float()[:, :, None].unbind(1)  # (B, 1) each
        top, left, height, width = t * top, t * left, (1 - t) + t * height, (1 - t) + t * width  # (B, F) each
        offset_x = (left + width / 2 - 0.5) * image_width  # centre of the box, in pixels from the centre of the image
        offset_y = (top + height / 2 - 0.5) * image_height
        zero = torch.zeros_like(width)
        inverse = affine_inverse(((width, zero, offset_x), (zero, height, offset_y)))
        # The outer half of a border pixel has no neighbour outside the image to be mixed with.
        return warp(images, inverse, fill="border", interpolation=self.interpolation)

    def targets(self, parameters: Tensor) -> Tensor:
        """Scale the possible range of each entry of boxes (B, 4) to about [-1, 1], a single possible value to 0."""
        return scale_to_unit(parameters, self.ranges)
