"""A disk that hides what a transformation leaves empty, laid over an image and its transformed copy alike."""

from __future__ import annotations

from itertools import product
from math import inf

import torch
from torch import Tensor

from ..views.base import TransformationFamily
from .options import CIRCLE

# A disk of less than this share of the side would hide what is judged.
_SMALLEST_SHARE = 0.25
_NUM_TRIED = 256
# Beyond so many draws per image, their extremes are too many to try.
_MOST_CORNERS = 8


def _distances(size: int) -> Tensor:
    """Compute the distance of each pixel's centre from the image's centre, (size, size), in pixels."""
    line = torch.arange(size) - (size - 1) / 2
    return (line[:, None].square() + line.square()).sqrt()


def disk_radius(family: TransformationFamily, size: int) -> float:
    """Find the largest centred disk of which no draw of ``family`` leaves a part empty.

    White images are transformed, with the extremes of the draws and with random ones: what is not white came from
    outside. A rotation leaves the inscribed disk, a shift takes its length off it.

    Args:
        family: Transforms with zeros outside the image.
        size: Side of the images in pixels.

    Returns:
        The radius in pixels; at most half the side.

    Raises:
        ValueError: less than half of the side would be seen.
    """
    draws = torch.rand(_NUM_TRIED, family.num_draws, generator=torch.Generator().manual_seed(0))
    if family.num_draws <= _MOST_CORNERS:
        corners = torch.tensor(list(product((0.0, 1.0), repeat=family.num_draws)))
        draws = torch.cat([draws, corners])
    shown = family.apply(torch.ones(len(draws), 1, size, size), family.sample(draws))
    empty = (shown < 1 - 1e-3).any(0)[0]
    nearest = float(_distances(size)[empty].min()) if bool(empty.any()) else inf
    radius = min(nearest, size / 2)
    if radius < _SMALLEST_SHARE * size:
        raise ValueError(
            f"--fill {CIRCLE}: {type(family).__name__} moves images of {size} pixels so far that a disk of radius "
            f"{radius:.1f} is all that is never left empty. Choose a smaller range, or --fill reflect."
        )
    return radius


class DiskFamily(TransformationFamily):
    """A transformation whose images are seen through the disk that it never leaves empty; black around it.

    The image that is compared with has to be seen through ``mask``, too: then nothing but the content tells how far it
    was turned or shifted.
    """

    def __init__(self, family: TransformationFamily) -> None:
        self.family = family
        self.parameter_names, self.num_draws = family.parameter_names, family.num_draws
        self.continuous = family.continuous
        self._disks: dict[int, Tensor] = {}

    @property
    def identity_parameters(self) -> tuple[float, ...]:
        """The transformation's own identity parameters."""
        return self.family.identity_parameters

    def mask(self, images: Tensor) -> Tensor:
        """Black out what lies outside of the disk: (..., S, S) -> (..., S, S)."""
        size = images.shape[-1]
        if size not in self._disks:
            self._disks[size] = (_distances(size) < disk_radius(self.family, size)).float()
        return images * self._disks[size].to(images.device)

    def sample(self, draws: Tensor) -> Tensor:
        """Turn uniform draws into parameters, as the transformation does."""
        return self.family.sample(draws)

    def path(self, images: Tensor, parameters: Tensor, fractions: Tensor) -> Tensor:
        """Transform images (B, C, S, S) and look through the disk, (B, F, C, S, S)."""
        return self.mask(self.family.path(images, parameters, fractions))

    def targets(self, parameters: Tensor) -> Tensor:
        """Scale parameters (B, p), as the transformation does."""
        return self.family.targets(parameters)
