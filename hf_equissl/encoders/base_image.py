"""The image that an encoder sees at evaluation: resized and cropped from the centre."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Photographs are resized to 256 and cropped to 224; images that are small already would only lose their border.
SMALLEST_CROPPED_SIZE = 96
RESIZE_RATIO = 256 / 224


def resized_side(size: int) -> int:
    """Compute the shorter side before the centre crop of ``size``: 256/224 of it from 96 pixels on, else ``size``.

    Probes and the image processor that is saved beside an encoder share this rule. It depends on nothing but ``size``,
    because the settings of an image processor cannot depend on the picture. Small pictures are not enlarged by 8/7:
    that would blur a 32-pixel image and then throw a quarter of it away.
    """
    return round(size * RESIZE_RATIO) if size >= SMALLEST_CROPPED_SIZE else size


def base_image(image: Image.Image, size: int) -> Tensor:
    """Make the base image I of an RGB picture: shorter side to ``resized_side(size)``, centre crop, nothing else.

    A picture whose shorter side is that already is only cropped: CIFAR-10 at 32 pixels keeps its pixels. Rounding is
    that of image processors, so that both make the same pixels.

    Returns:
        (3, size, size) uint8.
    """
    side, (width, height) = resized_side(size), image.size
    shorter = min(width, height)
    if shorter != side:
        width, height = int(side * width / shorter), int(side * height / shorter)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def square_side(size: Any) -> int:
    """Read the side of a square image from an int or a pair."""
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"The image size must be one positive side in pixels, got {size!r}. Pass image_size=<pixels>.")
    return size
