"""Encoded images of every kind to RGB."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageDecodeError

__all__ = ["ImageDecodeError", "decode_image", "open_image"]

# Formats whose EXIF block, if any, is in the header: without one there is no orientation to look for.
_EXIF_IN_HEADER = {"JPEG", "MPO", "WEBP"}


def decode_image(data: Any) -> Image.Image:
    """Decode one image to RGB, upright.

    - EXIF (and XMP) orientation is applied.
    - Grey (``1``, ``L``) fills all channels; palettes are looked up; CMYK, YCbCr, HSV are converted.
    - Transparency, also of palettes and of a transparent colour, is laid over white: hidden colours stay hidden.
    - 16-bit grey is shifted by 8 bits. 32-bit integers: likewise when they need 16 bits, unchanged when they need 8,
      otherwise scaled from their own minimum and maximum, as are floats beyond [0, 255]; floats in [0, 1] count as
      fractions of white.

    Args:
        data: Encoded bytes, a path, a PIL image, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or the mapping
            ``{"bytes": ..., "path": ...}`` of a ``datasets.Image(decode=False)`` column.

    Raises:
        ImageDecodeError: Missing, truncated, or not an image that Pillow reads.
    """
    try:
        image = open_image(data)
        if image.mode == "RGB" and image.format in _EXIF_IN_HEADER and "exif" not in image.info:
            image.load()
            if "xmp" not in image.info and "transparency" not in image.info:
                return image
        return _to_rgb(ImageOps.exif_transpose(image))
    except ImageDecodeError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a broken header led them into.
        raise ImageDecodeError(f"{type(error).__name__}: {error}") from error


def open_image(data: Any) -> Image.Image:
    """Open one image without decoding its pixels: size, mode and format of what ``decode_image`` would decode.

    Raises:
        ImageDecodeError: ``data`` holds no image. Pillow's own errors (``OSError`` and others) pass through.
    """
    if isinstance(data, Image.Image):
        return data
    if isinstance(data, Mapping):
        data = data.get("bytes") if data.get("bytes") is not None else data.get("path")
    if isinstance(data, (bytes, bytearray, memoryview)):
        if len(data) == 0:
            raise ImageDecodeError("The file is empty.")
        try:
            return Image.open(io.BytesIO(data))
        except UnidentifiedImageError:  # it names the buffer by its address, which helps nobody
            raise ImageDecodeError("not an image that Pillow reads") from None
    if isinstance(data, (str, os.PathLike)):
        with open(data, "rb") as file:
            return open_image(file.read())
    if isinstance(data, np.ndarray):
        return _from_array(data)
    raise ImageDecodeError(
        f"Expected encoded bytes, a path, a PIL image, an array or a mapping with 'bytes' or 'path', got "
        f"{type(data).__name__}."
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((_native(np.asarray(image)) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _native(values: np.ndarray) -> np.ndarray:
    """The same numbers in the machine's byte order."""
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """32-bit integers or floats (H, W) to uint8; see ``decode_image`` for the rule."""
    integers = values.dtype.kind in "iu"
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0.0 or high > (65535.0 if integers else 255.0):
        values = (values - low) * (255.0 / max(high - low, 1e-12))
    elif integers and high > 255.0:
        values = np.floor(values / 256.0)
    elif not integers and high <= 1.0:
        values = values * 255.0
    return np.rint(values).astype(np.uint8)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    grey = array.ndim == 2
    if not grey and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageDecodeError(
            f"The array has shape {array.shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), channels last."
        )
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.dtype == np.bool_:
        return Image.fromarray(array.astype(np.uint8) * 255)
    if array.dtype == np.uint16:
        return Image.fromarray((_native(array) >> 8).astype(np.uint8))
    if array.dtype.kind == "f" and array.size and float(array.min()) >= 0.0 and float(array.max()) <= 1.0:
        return Image.fromarray(np.rint(array * 255.0).astype(np.uint8))
    raise ImageDecodeError(f"The array is {array.dtype}, expected uint8, uint16, bool or floats in [0, 1].")
