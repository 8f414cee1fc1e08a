"""What a transformation does to an image, and what it then should do to a map of features: actions with a known rho."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

# Area of a resized image relative to the original, as SER draws it.
_SCALES = (0.7, 1.3)


@dataclass(frozen=True)
class Action:
    """One transformation g.

    Attributes:
        image: x -> g x, (B, C, S, S) -> (B, C, S', S').
        map: F(x) -> rho_g F(x), (B, D, h, h) -> (B, D, h', h').
    """

    image: Callable[[Tensor], Tensor]
    map: Callable[[Tensor], Tensor]


def _same(function: Callable[[Tensor], Tensor]) -> Action:
    return Action(function, function)


def _resize(side: int) -> Callable[[Tensor], Tensor]:
    def resize(value: Tensor) -> Tensor:
        return F.interpolate(value, size=(side, side), mode="bilinear", antialias=True, align_corners=False)

    return resize


def rotations(size: int, grid: int) -> list[Action]:
    """Turn by 90, 180 and 270 degrees: nothing is resampled."""
    return [_same(partial(torch.rot90, k=turns, dims=(-2, -1))) for turns in (1, 2, 3)]


def horizontal_flip(size: int, grid: int) -> list[Action]:
    """Give the one action that exchanges left and right, of images and of token maps alike."""
    return [_same(lambda value: value.flip(-1))]


def resizings(size: int, grid: int) -> list[Action]:
    """Resize to each other whole grid of 0.7 to 1.3 times the area; without one, to the next grid on either side.

    Args:
        size: Side of the images in pixels.
        grid: Side of the map; a cell of it stays as many pixels large.
    """
    cell = size // grid
    near = [side for side in range(1, 2 * grid) if side != grid and _SCALES[0] <= (side / grid) ** 2 <= _SCALES[1]]
    sides = near or [side for side in (grid - 1, grid + 1) if side > 0]
    return [Action(_resize(side * cell), _resize(side)) for side in sides]


ACTIONS: dict[str, Callable[[int, int], list[Action]]] = {
    "rotation": rotations,
    "hflip": horizontal_flip,
    "scale": resizings,
}
