"""Affine resampling with known parameters: many fractions of a transformation in one ``grid_sample`` call.

Conventions, the same in every geometric family:
    - x points right, y points DOWN, the origin is the image centre, lengths are pixels; pixel j of a row of W pixels
      lies at x = j - (W - 1) / 2 (``align_corners=False``: pixels are areas, the image is W wide, not W - 1);
    - a positive angle turns counter-clockwise as seen on screen, a positive shift moves right (tx) and down (ty);
    - grids hold the INVERSE map, from a position in the output to the position in the input that is read there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .uniform import as_float_images

# Our name -> grid_sample's name.
FILLS = {"zeros": "zeros", "reflect": "reflection", "border": "border"}
INTERPOLATIONS = ("bilinear", "nearest", "bicubic")
UNITS = ("pixels_at_224", "pixels", "fraction")


def affine_inverse(rows: tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Stack six tensors (B, F), the two rows of an inverse map, to (B, F, 2, 3)."""
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rigid_inverse(degrees: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """Make the inverse of "rotate about the centre, then shift".

    On screen, counter-clockwise with y down: R = [[cos, sin], [-sin, cos]], p' = R p + t, so p = R^T p' - R^T t.

    Args:
        degrees: (B, F), counter-clockwise.
        shift_x: (B, F), pixels to the right.
        shift_y: (B, F), pixels down.

    Returns:
        (B, F, 2, 3), [R^T | -R^T t].
    """
    radians = torch.deg2rad(degrees)
    cos, sin = torch.cos(radians), torch.sin(radians)
    return affine_inverse(
        (
            (cos, -sin, sin * shift_y - cos * shift_x),
            (sin, cos, -sin * shift_x - cos * shift_y),
        )
    )


def shift_to_pixels(shift_x: Tensor, shift_y: Tensor, unit: str, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Turn shifts in a family's unit into pixels of an image of ``height`` x ``width``.

    Units: "pixels" as they are; "pixels_at_224" pixels of an image of 224 x 224, scaled per axis by size / 224, so that
    the same parameters mean the same motion at every resolution; "fraction" of the width (x) and of the height (y).
    """
    per_unit = {"pixels": (1.0, 1.0), "pixels_at_224": (width / 224, height / 224), "fraction": (width, height)}
    scale_x, scale_y = per_unit[unit]
    return shift_x * scale_x, shift_y * scale_y


@torch.no_grad()
def warp(images: Tensor, inverse: Tensor, fill: str = "zeros", interpolation: str = "bilinear") -> Tensor:
    """Resample each image once per inverse map, all in one ``grid_sample`` call and without copies of the input.

    The F grids of an image are stacked along the output height. Where a map is exactly the identity, so is the result,
    bit for bit: ``grid_sample`` alone would be off by the rounding of its coordinates.

    Args:
        images: (B, C, H, W) in [0, 1].
        inverse: (B, F, 2, 3), inverse maps in pixels about the centre.
        fill: What lies outside the image, a key of ``FILLS``.
        interpolation: One of ``INTERPOLATIONS``; bicubic overshoots, therefore the result is clamped.

    Returns:
        (B, F, C, H, W), fp32, in [0, 1].
    """
    images = as_float_images(images)
    batch, channels, height, width = images.shape
    num_maps = inverse.shape[1]
    x = torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=torch.float32) - (height - 1) / 2
    grid = torch.empty(batch, num_maps, height, width, 2, device=images.device)
    for axis, size in enumerate((width, height)):
        from_x, from_y, offset = (inverse[:, :, axis] * (2 / size)).unbind(-1)  # (B, F) each
        row = from_x[..., None] * x  # (B, F, W)
        column = from_y[..., None] * y + offset[..., None]  # (B, F, H)
        torch.add(row[:, :, None, :], column[:, :, :, None], out=grid[..., axis])
    warped = F.grid_sample(
        images,
        grid.view(batch, num_maps * height, width, 2),
        mode=interpolation,
        padding_mode=FILLS[fill],
        align_corners=False,
    )
    warped = warped.clamp_(0, 1).view(batch, channels, num_maps, height, width).transpose(1, 2)
    identity = (inverse == torch.eye(2, 3, device=images.device)).all(dim=-1).all(dim=-1)  # (B, F)
    # lerp with weights 0 and 1 selects exactly, and is several times faster than torch.where on a CPU.
    return warped.lerp_(images[:, None], identity.float()[:, :, None, None, None])
