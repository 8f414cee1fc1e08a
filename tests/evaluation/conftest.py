"""Encoders and images whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import EvaluationData, ImageSet


class PixelEncoder(nn.Module):
    """Features = pixels: nothing about a transformation is lost. One weight, so that there is something to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)  # its running statistics would move in training mode
        self.calls = 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.calls += 1
        return (self.norm(pixel_values) * self.scale).flatten(1)


class ConstantEncoder(nn.Module):
    """Features that know nothing."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.ones(len(pixel_values), 8)


def gradient_images(count: int, seed: int, size: int = 12) -> list[np.ndarray]:
    """Smooth images: one oriented ramp each, brighter than 0 everywhere, so that turning them shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / (size - 1)
    images = []
    for level in rng.uniform(0.9, 1.1, count):
        channels = np.stack([0.2 + 0.5 * x, 0.2 + 0.5 * y, 0.2 + 0.25 * (x + y)], -1) * level
        images.append((channels * 255).astype(np.uint8))
    return images


@pytest.fixture
def ramps() -> EvaluationData:
    """256 + 64 unlabelled images of 12 x 12."""
    return EvaluationData(
        ImageSet(gradient_images(256, 0), None, "ramps", "train", progress=False),
        ImageSet(gradient_images(64, 1), None, "ramps", "test", progress=False),
    )


def coloured(count: int, seed: int, classes: int, size: int = 8) -> tuple[list[np.ndarray], Tensor]:
    """Noise around a colour that tells the class."""
    rng = np.random.default_rng(seed)
    palette = np.stack(
        [(np.arange(classes) % 3) * 80, np.arange(classes) // 3 % 2 * 160, np.arange(classes) // 6 * 160]
    )
    labels = rng.integers(0, classes, count)
    images = 40 + palette.T[labels][:, None, None] + rng.integers(-20, 21, (count, size, size, 3))
    return list(images.astype(np.uint8)), torch.from_numpy(labels)


@pytest.fixture
def colours() -> EvaluationData:
    """Twelve classes, 360 + 120 images of 8 x 8."""
    return EvaluationData(
        ImageSet(*coloured(360, 0, 12), "colours", "train", progress=False),
        ImageSet(*coloured(120, 1, 12), "colours", "test", progress=False),
    )


@pytest.fixture
def shuffled_colours(colours: EvaluationData) -> EvaluationData:
    """The same images with labels that have nothing to do with them."""
    generator = torch.Generator().manual_seed(5)
    for part in (colours.train, colours.test):
        part.labels = torch.randint(0, 12, (len(part),), generator=generator)
    return colours


@pytest.fixture
def pixels_12() -> FrozenEncoder:
    return FrozenEncoder(PixelEncoder().train(), image_size=12, name="pixels")


@pytest.fixture
def pixels_8() -> FrozenEncoder:
    return FrozenEncoder(PixelEncoder().train(), image_size=8, name="pixels")
