"""Plain JPEG files decoded by simplejpeg, an extra: the pixels of Pillow in less time."""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from typing import Any

import numpy as np
import PIL
from PIL import Image

__all__ = ["decode_plain_jpeg", "name_decoder"]

# What the two decoders are compared on: sides that are no multiples of a block, and the subsamplings of colours that
# Pillow writes. Files of another one stay with Pillow, as versions of libjpeg-turbo differ there.
_TRIAL_SIZE, _SUBSAMPLINGS = (53, 37), ("444", "422", "420")


def decode_plain_jpeg(content: bytes, image: Image.Image) -> np.ndarray | None:
    """Decode a plain JPEG file: one picture, sequential, YCbCr of 8 bits in 4:4:4, 4:2:2 or 4:2:0, not cut off.

    Args:
        content: The file.
        image: The same, opened by Pillow and not yet decoded.

    Returns:
        uint8 (H, W, 3), the bits that Pillow decodes to; ``None`` where Pillow is to decode: files of any other kind,
        damaged ones, and all where simplejpeg is not installed or ``name_decoder`` found that its pixels are others.
    """
    if image.format != "JPEG" or image.mode != "RGB" or "progressive" in image.info:
        return None
    simplejpeg = _find_simplejpeg()
    if simplejpeg is None:
        return None
    try:
        colours, subsampling = simplejpeg.decode_jpeg_header(content)[2:4]
        if colours != "YCbCr" or subsampling not in _SUBSAMPLINGS:
            return None
        pixels = simplejpeg.decode_jpeg(content)  # fails on whatever libjpeg warns of, which Pillow judges by itself
    except Exception:  # Pillow finds the same, and says it in its own words
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def name_decoder() -> str:
    """Return what decodes plain JPEG files here, with its version."""
    simplejpeg = _find_simplejpeg()
    return f"Pillow {PIL.__version__}" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"


@cache
def _find_simplejpeg() -> Any:
    """Import simplejpeg; ``None`` where it is missing, does not load, or does not give Pillow's pixels.

    Both carry a copy of libjpeg-turbo. Where Pillow was built with another library, views would follow from what is
    installed, so that one is tried out once per process.
    """
    if importlib.util.find_spec("simplejpeg") is None:
        return None
    try:
        simplejpeg = importlib.import_module("simplejpeg")
        width, height = _TRIAL_SIZE
        noise = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize(_TRIAL_SIZE, Image.Resampling.BICUBIC)
        for subsampling in range(len(_SUBSAMPLINGS)):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90, subsampling=subsampling)
            if not np.array_equal(simplejpeg.decode_jpeg(buffer.getvalue()), np.asarray(Image.open(buffer))):
                return None
    except (ImportError, AttributeError, ValueError, RuntimeError, OSError):
        return None
    return simplejpeg
