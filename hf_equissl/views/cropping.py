"""Crop views in the worker: choose a box, then cut and resize in one pass. Needs PIL and numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .view_specs import ViewSpec

# Left, upper, right, lower in pixels of the stored image; fractions of pixels are allowed.
Box = tuple[float, float, float, float]

# Evaluation's usual margin: resize the shorter side to 256 and cut 224 out of the middle.
CENTER_CROP_RESIZE = 256 / 224

RESAMPLING = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a random resized crop's box: area uniform, aspect ratio log-uniform, at whole pixels.

    The same distribution as torchvision's ``RandomResizedCrop``: ten tries, then the largest centred box whose ratio is
    allowed.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        for_area, for_ratio, for_top, for_left = rng.random(4).tolist()
        area = width * height * (scale[0] + (scale[1] - scale[0]) * for_area)
        aspect = math.exp(log_low + (log_high - log_low) * for_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(for_top * (height - h + 1)), int(for_left * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_box(width: int, height: int, size: int) -> Box:
    """Find the box that resizing the shorter side to 256/224 of ``size`` and cutting the centre would keep.

    Taken from the stored image in one resampling, so it may lie between pixels. An image that has the size already is
    left as it is.
    """
    if width == height == size:
        return 0, 0, width, height
    side = min(width, height) * size / round(size * CENTER_CROP_RESIZE)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def draw_box(width: int, height: int, size: int, spec: ViewSpec, rng: np.random.Generator) -> Box:
    """Choose what a view of ``size`` pixels shows of an image, as its spec says; centre crops draw nothing."""
    if spec.crop_scale is None:
        return center_box(width, height, size)
    return random_box(width, height, spec.crop_scale, spec.crop_ratio, rng)


def as_fractions(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """Express a box of an image as top, left, height, width in fractions of it."""
    left, top, right, lower = box
    return top / height, left / width, (lower - top) / height, (right - left) / width


def crop_views(
    images: Sequence[Image.Image], specs: tuple[ViewSpec, ...], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Crop each image by its spec.

    Args:
        images: RGB, one per crop; the same one may come several times.
        specs: One per crop; boxes are drawn in this order.
        size: Side of the crops.
        rng: The sample's generator; centre crops draw nothing.

    Returns:
        uint8 (V, S, S, 3), and float32 (V, 4) boxes as top, left, height, width, fractions of the image.
    """
    pixels = np.empty((len(specs), size, size, 3), dtype=np.uint8)
    boxes = np.empty((len(specs), 4), dtype=np.float32)
    for number, (image, spec) in enumerate(zip(images, specs, strict=True)):
        box = draw_box(*image.size, size, spec, rng)
        boxes[number] = as_fractions(box, *image.size)
        # resize(box=...) reads the pixels around the box for the filter's support, and copies nothing first.
        pixels[number] = np.asarray(image.resize((size, size), RESAMPLING[spec.interpolation], box=box))
    return pixels, boxes
