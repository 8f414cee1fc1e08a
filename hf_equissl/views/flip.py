"""Horizontal flip."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import TransformationFamily
from .uniform import as_float_images, check_draws, check_no_path, check_number


class FlipFamily(TransformationFamily):
    """Mirror left and right, or not: a family without a path, since nothing lies between an image and its mirror.

    Args:
        p: Probability of a flip.

    Parameters (B, 1): ``flip``, 1 for a flip and 0 for none.
    """

    parameter_names = ("flip",)
    num_draws = 1
    continuous = False

    def __init__(self, p: float = 0.5) -> None:
        self.p = check_number("p", p, high=1)

    def sample(self, draws: Tensor) -> Tensor:
        """Turn uniform draws (B, 1) into 0 or 1, (B, 1)."""
        return (check_draws(draws, self.num_draws) < self.p).float()

    @torch.no_grad()
    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Flip images (B, C, H, W) by parameters (B, 1) at fractions (F,) of 0 and 1 -> (B, F, C, H, W).

        Raises:
            ValueError: As ``check_no_path``.
        """
        check_no_path(
            fractions,
            "a flip: flips have no intermediate images. Take fractions 0 and 1 only; to "
            "train on flips, use the objective cross_attention_reconstruction, which needs none.",
        )
        images = as_float_images(images)
        fractions = fractions.to(images.device, torch.float32, non_blocking=True)
        flipped = (parameters.float() * fractions > 0.5)[:, :, None, None, None]  # (B, F, 1, 1, 1)
        return torch.where(flipped, images.flip(-1)[:, None], images[:, None])

    def apply(self, images: Tensor, parameters: Tensor, fraction: float = 1.0) -> Tensor:
        """Flip images (B, C, H, W) by parameters (B, 1) at fraction 0 or 1 -> (B, C, H, W)."""
        return self.path(images, parameters, torch.tensor([fraction]))[:, 0]

    def targets(self, parameters: Tensor) -> Tensor:
        """Map 0 and 1 to -1 and 1, (B, 1)."""
        return 2 * parameters.float() - 1
