"""Crop views in the worker: choose a box, cut it out, resize it into its place among the views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .view_specs import ViewSpec

# Left, upper, right, lower in pixels of the stored image; fractions of pixels are allowed.
Box = tuple[float, float, float, float]

# Evaluation's usual margin: resize the shorter side to 256 and cut 224 out of the middle.
CENTER_CROP_RESIZE = 256 / 224

RESAMPLING = {name.lower(): Image.Resampling[name] for name in Image.Resampling.__members__}

# What resizes views, for records. Until it was torch, it was Pillow.
RESIZER, FORMER_RESIZER = "torch", "Pillow"
# Filters that torch has for uint8 with antialiasing, several times as fast as Pillow's. ``F.interpolate`` calls the
# same; with ``out`` the result lands in its place, channels last, without memory of its own and a copy.
_TORCH_RESIZE: dict[str, Callable[..., Tensor]] = {
    "bicubic": torch._C._nn._upsample_bicubic2d_aa,
    "bilinear": torch._C._nn._upsample_bilinear2d_aa,
}


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


def to_pixels(image: np.ndarray | Image.Image) -> np.ndarray:
    """Return an RGB image as uint8 (H, W, 3) that torch can read; an array that can be written to is not copied.

    Raises:
        ValueError: It has another type or another shape.
    """
    usable = isinstance(image, np.ndarray) and image.flags.writeable and image.flags.c_contiguous
    pixels = np.asarray(image) if usable else np.array(image, order="C")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"An image is {pixels.dtype} {pixels.shape}, expected uint8 (H, W, 3): convert it to RGB.")
    return pixels


def resize_box(pixels: np.ndarray, box: Box, interpolation: str, out: np.ndarray) -> None:
    """Cut a box out of an image and resize it with antialiasing.

    Bicubic and bilinear, at whole pixels, is as torchvision does it: the cut is resized by torch, so that pixels beside
    the box have no part in it. Other filters, and boxes between pixels, are Pillow's ``resize(box=...)``.

    Args:
        pixels: uint8 (H, W, 3), as ``to_pixels`` returns it.
        box: What the result shows.
        interpolation: One of ``RESAMPLING``.
        out: uint8 (S, S, 3); the result goes there.
    """
    height, width = out.shape[:2]
    left, top, right, lower = box
    resize = _TORCH_RESIZE.get(interpolation)
    if resize is None or left % 1 or top % 1 or right % 1 or lower % 1:
        out[:] = np.asarray(Image.fromarray(pixels).resize((width, height), RESAMPLING[interpolation], box=box))
        return
    cut = pixels[int(top) : int(lower), int(left) : int(right)]
    # Slices and new axes cost numpy a fraction of what they cost torch, and a batch has thousands of them.
    source, place = (torch.from_numpy(array.transpose(2, 0, 1)[None]) for array in (cut, out))
    resize(source, [height, width], False, out=place)


def crop_views(
    images: Sequence[np.ndarray | Image.Image], specs: tuple[ViewSpec, ...], size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Crop each image by its spec.

    Args:
        images: RGB, one per crop; the same one may come several times.
        specs: One per crop; boxes are drawn in this order.
        size: Side of the crops.
        rng: The sample's generator; centre crops draw nothing.

    Returns:
        Crops, uint8 (V, 3, S, S), channels-last in memory; and their boxes, float32 (V, 4): top, left, height, width
        as fractions of the image.

    Raises:
        ValueError: An image is not RGB of 8 bits.
    """
    crops = np.empty((len(specs), size, size, 3), dtype=np.uint8)
    boxes: list[tuple[float, ...]] = []
    last, pixels = None, np.empty((0, 0, 3), dtype=np.uint8)
    for image, spec, crop in zip(images, specs, crops, strict=True):
        if image is not last:
            last, pixels = image, to_pixels(image)
        height, width = pixels.shape[:2]
        box = draw_box(width, height, size, spec, rng)
        boxes.append(as_fractions(box, width, height))
        resize_box(pixels, box, spec.interpolation, crop)
    return torch.from_numpy(crops).permute(0, 3, 1, 2), torch.from_numpy(np.array(boxes, dtype=np.float32))
