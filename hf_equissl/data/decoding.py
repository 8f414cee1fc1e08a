"""Encoded images of every kind to RGB."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .depth import (
    as_bytes,
    find_transparent,
    needs_file,
    read_planes,
    read_wide_values,
    scale_transparent_grey,
    to_eight_bits,
)
from .errors import ImageDecodeError, explain_decode_errors
from .jpeg import decode_plain_jpeg
from .metadata import count_bands, find_transposition, strip_metadata

__all__ = [
    "AS_STORED",
    "MAX_PIXELS",
    "Decoding",
    "ImageDecodeError",
    "decode_image",
    "decode_pixels",
    "find_used_range",
    "open_image",
    "read_file",
]

# Pillow's own limit, above which it takes a file for an attack. Nothing decodes more unless it is asked to.
MAX_PIXELS = 178_956_970
# What Pillow may open: photographs and scans. Others run programs (EPS runs Ghostscript), or are no pictures.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "MPO", "DIB", "AVIF", "JPEG2000", "HEIF")
# Formats whose EXIF block, if any, is in the header: without one there is no orientation to look for.
_EXIF_IN_HEADER = {"JPEG", "MPO", "WEBP"}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class Decoding:
    """How images become 8-bit RGB where files leave a choice.

    Attributes:
        value_range: Which stored values become black and white, in images of more than 8 bits per band. "full": the
            whole range of the type; "auto": each image's own smallest and largest value; (a, b): these two.
        max_pixels: Images of more pixels are refused, as a small file may hold a picture that fills the memory.
        fast: Whether simplejpeg decodes plain JPEG files where it is installed, to the same pixels as Pillow. Only
            measurements switch it off.

    Raises:
        ValueError: A value means nothing.
    """

    value_range: str | tuple[float, float] = "full"
    max_pixels: int = MAX_PIXELS
    fast: bool = True

    def __post_init__(self) -> None:
        """Check both, and keep a range as a tuple."""
        chosen = self.value_range
        limits = None if isinstance(chosen, str) else _read_limits(chosen)
        if limits is not None:
            object.__setattr__(self, "value_range", limits)
        elif not isinstance(chosen, str) or chosen not in ("full", "auto"):
            raise ValueError(
                f"value_range is {chosen!r}, expected full, auto, or two numbers [a, b] with a below b, such as "
                "[0, 4095] for 12 bits."
            )
        if not isinstance(self.max_pixels, Integral) or self.max_pixels < 1:
            raise ValueError(f"max_pixels is {self.max_pixels!r}, expected a whole number of 1 or more.")

    def difference(self) -> dict[str, Any]:
        """Return what changes pixels and is not as usual, as plain types, for records."""
        chosen = self.value_range if isinstance(self.value_range, str) else list(self.value_range)
        return {} if chosen == "full" else {"value_range": chosen}


def _read_limits(chosen: Any) -> tuple[float, float] | None:
    """Read two finite numbers, the first below the second; ``None`` of anything else."""
    limits = tuple(chosen) if isinstance(chosen, Iterable) else ()
    if len(limits) != 2 or not all(isinstance(limit, Real) and math.isfinite(limit) for limit in limits):
        return None
    low, high = map(float, limits)
    return (low, high) if low < high else None


AS_STORED = Decoding()


def decode_image(data: Any, decoding: Decoding = AS_STORED) -> Image.Image:
    """Decode one image to RGB, upright.

    - EXIF (and XMP) orientation is applied; metadata that is wrong or too long is passed over.
    - Grey (``1``, ``L``) fills all channels; palettes are looked up; CMYK, YCbCr, HSV are converted; of more bands than
      red, green, blue and alpha only these are used.
    - Transparency, also of palettes and of a transparent colour, is laid over white: hidden colours stay hidden.
    - 16-bit values are shifted by 8 bits. 32-bit integers: likewise when they need 16 bits, unchanged when they need 8,
      otherwise scaled from their own minimum and maximum, as are floats beyond [0, 255]; floats in [0, 1] count as
      fractions of white. ``decoding.value_range`` says otherwise, also of arrays. Where Pillow opened a colour image of
      16 bits before, only the high bytes are left: give the file.

    Args:
        data: Encoded bytes, a path, a PIL image, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or the mapping
            ``{"bytes": ..., "path": ...}`` of a ``datasets.Image(decode=False)`` column.
        decoding: What to do where files leave a choice.

    Raises:
        ImageDecodeError: Missing, truncated, too large, or not an image that is read.
        MemoryError: There is not enough memory for it, which is not the image's fault.
    """
    decoded = _decode_any(data, decoding)
    return decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded)


def decode_pixels(data: Any, decoding: Decoding = AS_STORED) -> np.ndarray:
    """Decode one image as ``decode_image`` does, to an array of its own: uint8 (H, W, 3)."""
    decoded = _decode_any(data, decoding)
    return decoded if isinstance(decoded, np.ndarray) else np.array(decoded)


def open_image(data: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open one image without decoding its pixels: size, mode and format of what ``decode_image`` would decode.

    Raises:
        ImageDecodeError: ``data`` holds no image, or one of more than ``max_pixels``. Pillow's own errors (``OSError``
            and others) pass through.
    """
    data = _content(data)
    if isinstance(data, Image.Image):
        _check_size(*data.size, max_pixels)
        return data
    if isinstance(data, np.ndarray):
        return _from_array(data, Decoding(max_pixels=max_pixels))
    return _open_encoded(data, max_pixels)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read width and height of the image that a file holds, upright as ``decode_image`` returns it.

    Raises:
        ImageDecodeError: It holds none.
        OSError: It cannot be read.
    """
    image = open_image(read_file(path))
    width, height = image.size
    swaps = (
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.TRANSVERSE,
    )
    return (height, width) if find_transposition(image) in swaps else (width, height)


def _open_encoded(data: bytes, max_pixels: int) -> Image.Image:
    if len(data) == 0:
        raise ImageDecodeError("The file is empty.")
    image: Image.Image
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        image = _open_of_any_size(data)
    except UnidentifiedImageError:  # it names the buffer by its address, which helps nobody
        raise ImageDecodeError(_why_unknown(data)) from None
    _check_size(*image.size, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height == 0:
        raise ImageDecodeError(f"{width} x {height} pixels (width x height): there is nothing in it.")
    if width * height > max_pixels:
        raise ImageDecodeError(
            f"{width} x {height} = {width * height:,} pixels are more than max_pixels = {max_pixels:,}. To read it, "
            "set --max_pixels (data.max_pixels of a recipe) higher; decoding takes 3 bytes for each pixel, in every "
            "worker."
        )


def find_used_range(data: bytes, decoding: Decoding = AS_STORED) -> tuple[float, float] | None:
    """Find the smallest and the largest stored value of an image of integers of 16 bits per band; ``None`` of others.

    Raises:
        ImageDecodeError: It does not decode.
    """
    with explain_decode_errors():
        image = open_image(data, decoding.max_pixels)
        values = read_planes(image, data)
        if values is None:
            values = read_wide_values(image, lambda: open_image(data, decoding.max_pixels))
        elif image.mode in ("RGBA", "RGBa"):
            values = values[..., :3]
    if values is None or values.dtype.kind not in "iu" or values.max() < 256:
        return None
    return float(values.min()), float(values.max())


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file. Pipes and devices are refused: they would be waited for, or never end.

    Raises:
        OSError: It does not exist, cannot be read, or is something else.
    """
    with open(path, "rb", opener=_open_regular) as file:
        return file.read()


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"{path!r} is not a regular file")


def _content(data: Any) -> bytes | Image.Image | np.ndarray:
    """Find what is to be decoded: read files, take mappings apart."""
    if isinstance(data, Mapping):
        data = data.get("bytes") if data.get("bytes") is not None else data.get("path")
    if isinstance(data, bytes | Image.Image | np.ndarray):
        return data
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    if isinstance(data, (str, os.PathLike)):
        return read_file(data)
    raise ImageDecodeError(
        f"Expected encoded bytes, a path, a PIL image, an array or a mapping with 'bytes' or 'path', got "
        f"{type(data).__name__}."
    )


def _decode_any(data: Any, decoding: Decoding) -> Image.Image | np.ndarray:
    """Decode as ``decode_image`` says, to what costs nothing more: an RGB image, or uint8 (H, W, 3)."""
    try:
        data = _content(data)
        return _decode(data, decoding)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a broken header led them into.
        bare = strip_metadata(data) if isinstance(data, bytes) else None
        if bare is not None:
            try:
                return _decode(bare, decoding)
            except MemoryError:
                raise
            except Exception as again:  # The pixels are broken, too: the first error is told.
                error.__context__ = again
        if isinstance(error, ImageDecodeError):
            raise
        raise ImageDecodeError(f"{type(error).__name__}: {error}") from error


def _decode(data: bytes | Image.Image | np.ndarray, decoding: Decoding) -> Image.Image | np.ndarray:
    if isinstance(data, np.ndarray):
        return _to_rgb(_from_array(data, decoding))
    image = open_image(data, decoding.max_pixels)
    if isinstance(data, Image.Image) and needs_file(image, decoding.value_range):
        raise ImageDecodeError(
            "Pillow opened this image of 16 bits per colour, and decodes half of them. Give its path or its bytes in "
            "place of the opened image (datasets: cast the column to Image(decode=False))."
        )
    if decoding.fast and isinstance(data, bytes) and (pixels := decode_plain_jpeg(data, image)) is not None:
        turned = find_transposition(image) if {"exif", "xmp"} & image.info.keys() else None
        return pixels if turned is None else Image.fromarray(pixels).transpose(turned)
    if image.mode == "RGB" and image.format in _EXIF_IN_HEADER and "exif" not in image.info:
        image.load()
        if "xmp" not in image.info and "transparency" not in image.info:
            return image
    planes = read_planes(image, data)
    values = None
    if planes is not None:
        transposition = find_transposition(image)  # before pixels are decoded: decoding turns those of TIFF
        image = _from_planes(image.mode, planes, decoding)
    else:
        if decoding.value_range != "full" or "transparency" in image.info:
            values = read_wide_values(image, lambda: open_image(data, decoding.max_pixels))
        scale_transparent_grey(image)
        image.load()
        transposition = find_transposition(image)
    rgb = _to_rgb(image if values is None else _recolour(image, values, decoding))
    return rgb if transposition is None else rgb.transpose(transposition)


def _from_planes(mode: str, planes: np.ndarray, decoding: Decoding) -> Image.Image:
    """Make an image of 8 bits of the 16-bit planes (H, W, bands) of one that was opened in ``mode``."""
    mode = {3: "RGB", 4: "CMYK" if mode == "CMYK" else "RGBA"}.get(planes.shape[2], "L")
    colours = to_eight_bits(planes[..., :3] if mode == "RGBA" else planes, decoding.value_range)
    bands = [*np.moveaxis(colours, -1, 0), *([as_bytes(planes[..., 3])] if mode == "RGBA" else [])]
    return Image.merge(mode, [Image.fromarray(band) for band in bands]) if len(bands) > 1 else Image.fromarray(bands[0])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        return Image.fromarray(as_bytes(values.astype(values.dtype.newbyteorder("="), copy=False))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _recolour(image: Image.Image, values: np.ndarray, decoding: Decoding) -> Image.Image:
    """Put the colours of stored values, (H, W) or (H, W, 3), behind the transparency of an image."""
    coloured = Image.fromarray(to_eight_bits(values, decoding.value_range)).convert("RGB")
    if image.mode == "RGBA":
        coloured.putalpha(image.getchannel("A"))
    elif (transparent := find_transparent(image, values)) is not None:
        coloured.putalpha(Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8)))
    return coloured


def _from_array(array: np.ndarray, decoding: Decoding) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    grey = array.ndim == 2
    if not grey and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageDecodeError(
            f"The array has shape {array.shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), channels last: "
            "images are grey or RGB."
        )
    _check_size(array.shape[1], array.shape[0], decoding.max_pixels)
    if array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.dtype == np.bool_:
        return Image.fromarray(array.astype(np.uint8) * 255)
    floats = array.dtype.kind == "f"
    if array.dtype.newbyteorder("=") == np.uint16 or (floats and decoding.value_range != "full"):
        planes = array.astype(array.dtype.newbyteorder("="), copy=False)
        return _from_planes("", planes[..., None] if grey else planes, decoding)
    if floats and float(array.min()) >= 0.0 and float(array.max()) <= 1.0:
        return Image.fromarray(np.rint(array * 255.0).astype(np.uint8))
    raise ImageDecodeError(
        f"The array is {array.dtype}, expected uint8, uint16, bool or floats in [0, 1], of any size with a value_range."
    )


@cache
def _formats() -> list[str]:
    """Name the formats that may be opened and that this installation can open."""
    Image.init()
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in _FORMATS if name in Image.OPEN]


def _open_of_any_size(data: bytes) -> Image.Image:
    """Open an image above Pillow's own limit, which has no other switch than this one for the whole process."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _why_unknown(data: bytes) -> str:
    """Say what bytes are that no reader takes."""
    if data.startswith(_POSTSCRIPT):
        return "a PostScript file (EPS): these are programs, and are not run. Save it as PNG or JPEG"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and "HEIF" not in _formats():
        return "a HEIF (HEIC) image, which Pillow reads with pillow-heif: pip install 'hf-equissl[heif]'"
    bands = count_bands(data)
    if bands is not None and bands[0] not in (1, 3):
        return (
            f"a TIFF file of {bands[0]} bands of {bands[1]} bits; images are grey or RGB. Choose three of its bands "
            "and save them as an RGB image"
        )
    return "not an image that Pillow reads"
