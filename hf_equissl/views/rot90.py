"""Rotation by quarter turns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import TransformationFamily
from .uniform import as_float_images, check_draws, check_no_path, check_number

TURNS = 4


class Rot90Family(TransformationFamily):
    """Turn the image by 0 to 3 quarter turns, counter-clockwise: nothing is filled and, on a square, nothing resampled.

    An image that is not square is resized to its old shape after an odd number of turns. There is no path: the family
    ``rotation`` has one.

    Args:
        p: Probability that the image is turned at all; 1, 2 and 3 turns are equally likely then.

    Parameters (B, 1): ``turns``, 0, 1, 2 or 3.
    """

    parameter_names = ("turns",)
    num_draws = 1
    continuous = False

    def __init__(self, p: float = 0.75) -> None:
        self.p = check_number("p", p, high=1)

    def sample(self, draws: Tensor) -> Tensor:
        """Turn uniform draws (B, 1) into 0, 1, 2 or 3, (B, 1)."""
        draws = check_draws(draws, self.num_draws)
        turned = 1 + ((TURNS - 1) * draws / max(self.p, 1e-9)).floor().clamp(max=TURNS - 2)
        return torch.where(draws < self.p, turned, 0.0)

    @torch.no_grad()
    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Turn images (B, C, H, W) by parameters (B, 1) at fractions (F,) of 0 and 1 -> (B, F, C, H, W).

        Raises:
            ValueError: As ``check_no_path``.
        """
        check_no_path(
            fractions,
            "quarter turns: they have no intermediate images. Take fractions 0 and 1 only, or the family rotation.",
        )
        images = as_float_images(images)
        fractions = fractions.to(images.device, torch.float32, non_blocking=True)
        turns = (parameters.float() * fractions)[:, :, None, None, None]  # (B, F, 1, 1, 1)
        path = images[:, None].expand(-1, turns.shape[1], -1, -1, -1)
        for number in range(1, TURNS):
            path = torch.where(turns == number, _turn(images, number)[:, None], path)
        return path.contiguous()

    def apply(self, images: Tensor, parameters: Tensor, fraction: float = 1.0) -> Tensor:
        """Turn images (B, C, H, W) by parameters (B, 1) at fraction 0 or 1 -> (B, C, H, W)."""
        return self.path(images, parameters, torch.tensor([fraction]))[:, 0]

    def targets(self, parameters: Tensor) -> Tensor:
        """Map 0 to 3 turns to -1 to 1, (B, 1)."""
        return 2 * parameters.float() / (TURNS - 1) - 1


def _turn(images: Tensor, number: int) -> Tensor:
    turned = images.rot90(number, dims=(-2, -1))
    if turned.shape == images.shape:
        return turned
    resized = F.interpolate(turned, size=images.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
    return resized.clamp(0, 1)
