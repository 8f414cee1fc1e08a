"""Images of more than 8 bits per band: the values that files hold, and which of them become black and white."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from .metadata import extract_plane

_PLANAR_CONFIGURATION, _BITS_PER_SAMPLE = 284, 258
_SEPARATE_PLANES = 2
# Pillow's names for layouts of 16-bit bands -> those that read the other byte of each value.
_OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
# Pillow's names for layouts of few bits -> by what their values are multiplied to fill eight.
_WHITE_OF_FEW_BITS = {"L;2": 85, "L;4": 17}


def read_planes(image: Image.Image, content: Any) -> np.ndarray | None:
    """Read a TIFF file of separate 16-bit planes, of which Pillow reads the wrong bytes, or the high ones alone.

    Args:
        image: Opened, not yet decoded.
        content: The file.

    Returns:
        Stored values (H, W, bands), uint16, as many bands as ``image`` has; ``None`` of other images.
    """
    if not isinstance(content, bytes) or not _has_wide_planes(image):
        return None
    planes = [extract_plane(content, number) for number in range(len(image.getbands()))]
    return np.stack(
        [_to_native_order(np.asarray(Image.open(io.BytesIO(plane), formats=["TIFF"]))) for plane in planes], axis=-1
    )


def _has_wide_planes(image: Image.Image) -> bool:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    tags: Any = image.tag_v2
    return tags.get(_PLANAR_CONFIGURATION) == _SEPARATE_PLANES and set(tags.get(_BITS_PER_SAMPLE, ())) == {16}


def needs_file(image: Image.Image, value_range: str | tuple[float, float]) -> bool:
    """Whether an image that somebody else opened cannot be decoded as asked: Pillow gives the high bytes alone."""
    wanted = value_range != "full" or "transparency" in image.info
    return _has_wide_planes(image) or (wanted and _has_wide_colours(image))


def _has_wide_colours(image: Image.Image) -> bool:
    tiles: Any = getattr(image, "tile", ())
    return image.mode in ("RGB", "RGBA", "RGBX") and any(";16" in _layout(tile) for tile in tiles)


def read_wide_values(image: Image.Image, reopen: Callable[[], Image.Image]) -> np.ndarray | None:
    """Read the stored values of an image of more than 8 bits per band, as numbers in the machine's byte order.

    Pillow keeps the high byte of the bands of colour images. The low one is read from the same file once more.

    Args:
        image: Opened, not yet decoded.
        reopen: Opens the same file again.

    Returns:
        (H, W) of a grey image, (H, W, 3) of a coloured one; ``None`` where there are no more than 8 bits.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _to_native_order(np.asarray(image))
    if not _has_wide_colours(image):
        return None
    tiles: Any = getattr(image, "tile", ())
    again: Any = reopen()
    if _layout(tiles[0]).startswith("LA"):  # grey with transparency: four bytes, as those of 8-bit RGBA
        again.tile = [_replace_layout(tile, "RGBA") for tile in again.tile]
        high, low = np.asarray(again)[..., :2].astype(np.uint16).transpose(2, 0, 1)
    else:
        again.tile = [_choose_other_byte(tile) for tile in again.tile]
        high, low = (np.asarray(each)[..., :3].astype(np.uint16) for each in (image, again))
    return high << 8 | low


def to_eight_bits(values: np.ndarray, value_range: str | tuple[float, float]) -> np.ndarray:
    """Map stored values to uint8 by the range that was chosen; ``decode_image`` says the rule of "full"."""
    return as_bytes(values) if value_range == "full" else stretch(values, value_range)


def stretch(values: np.ndarray, value_range: str | tuple[float, float]) -> np.ndarray:
    """Map a range of values to 0 ... 255, what lies beyond it to its ends.

    Args:
        values: Values of any shape. Those that are not finite count as 0.
        value_range: "auto" for their own smallest and largest, or two numbers.

    Returns:
        uint8, of the same shape.
    """
    values = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (values.min(), values.max()) if isinstance(value_range, str) else value_range
    values = (values - low) * (255.0 / max(float(high) - float(low), 1e-12))
    return np.rint(np.clip(values, 0.0, 255.0)).astype(np.uint8)


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Map values (H, W) of more than 8 bits to uint8 by the whole range of their type, as ``decode_image`` says."""
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
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


def scale_transparent_grey(image: Image.Image) -> None:
    """Bring the transparent grey of 2 or 4 bits to the 8 of the pixels, before Pillow decodes these."""
    transparent: Any = image.info.get("transparency")
    tiles: Any = getattr(image, "tile", ())
    if isinstance(transparent, int) and tiles and (factor := _WHITE_OF_FEW_BITS.get(_layout(tiles[0]))):
        image.info["transparency"] = transparent * factor


def find_transparent(image: Image.Image, values: np.ndarray) -> np.ndarray | None:
    """Find the pixels of the transparent colour of an image without alpha: bool (H, W); ``None`` where it has none.

    Args:
        image: What the values were read from.
        values: Stored values, (H, W) or (H, W, 3).
    """
    transparent: Any = image.info.get("transparency")
    if isinstance(transparent, int) and values.ndim == 2:
        return values == transparent
    if isinstance(transparent, tuple) and values.ndim == 3:
        return (values == transparent).all(axis=-1)
    return None


def _layout(tile: TiffImagePlugin.ImageFile._Tile) -> str:
    """Return Pillow's name of how a tile's bands are stored."""
    layout = tile.args[0] if isinstance(tile.args, tuple) else tile.args
    return layout if isinstance(layout, str) else ""


def _choose_other_byte(tile: TiffImagePlugin.ImageFile._Tile) -> TiffImagePlugin.ImageFile._Tile:
    layout = _layout(tile)
    return _replace_layout(tile, layout[:-4] + _OTHER_BYTE.get(layout[-4:], layout[-4:]))


def _replace_layout(tile: TiffImagePlugin.ImageFile._Tile, layout: str) -> TiffImagePlugin.ImageFile._Tile:
    return tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)


def _to_native_order(values: np.ndarray) -> np.ndarray:
    """Bring numbers into the machine's byte order."""
    return values.astype(values.dtype.newbyteorder("="), copy=False)
