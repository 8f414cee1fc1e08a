"""References and images that the tests of the transformation families share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage

SCIPY_MODES = {"zeros": "grid-constant", "reflect": "reflect", "border": "nearest"}


def _scipy_rigid(
    image: np.ndarray, degrees: float, tx: float, ty: float, fill: str = "zeros", order: int = 1
) -> np.ndarray:
    """Rotate (C, H, W) counter-clockwise on screen about its centre, then shift right by tx and down by ty."""
    angle = np.deg2rad(degrees)
    # Rows come first in scipy, and its matrix maps output to input, as (row, column) about the centre.
    inverse = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = (np.array(image.shape[1:]) - 1) / 2
    offset = centre - inverse @ (centre + np.array([ty, tx]))
    planes = [ndimage.affine_transform(plane, inverse, offset, order=order, mode=SCIPY_MODES[fill]) for plane in image]
    return np.stack(planes)


def _smooth_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    images = ndimage.gaussian_filter(rng.random((batch, 3, height, width)), (0, 0, 2, 2))
    images = (images - images.min()) / (images.max() - images.min())
    return torch.tensor(images, dtype=torch.float32)


@pytest.fixture(scope="session")
def scipy_rigid() -> Callable[..., np.ndarray]:
    """(image (C, H, W), degrees, tx, ty in pixels, fill) -> image, by scipy in float64."""
    return _scipy_rigid


@pytest.fixture(scope="session")
def smooth_images() -> Callable[..., torch.Tensor]:
    """(batch, height, width) -> (B, 3, H, W) without structure finer than a few pixels."""
    return _smooth_images
