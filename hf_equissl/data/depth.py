"""Images of more than 8 bits per band: the values that files hold, and which of them become black and white."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

_PLANAR_CONFIGURATION, _BITS_PER_SAMPLE = 284, 258
_SEPARATE_PLANES = 2
# Pillow's names for layouts of 16-bit bands -> those that read the other byte of each value.
_OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}


def mend_planes(image: Image.Image) -> None:
    """Let Pillow read a TIFF file of separate uncompressed 16-bit planes, which it takes for planes of 8 bits."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags: Any = image.tag_v2
    separate = tags.get(_PLANAR_CONFIGURATION) == _SEPARATE_PLANES and set(tags.get(_BITS_PER_SAMPLE, ())) == {16}
    if not separate or any(tile.codec_name != "raw" for tile in image.tile):
        return
    tiles: Any = image.tile
    little = tags.prefix == b"II"
    if image.mode.startswith("I;16"):  # one plane
        image.tile = [tile._replace(args=(image.mode, *tile.args[1:])) for tile in tiles]
        return
    image.tile = [tile._replace(args=(tile.args[0] + (";16L" if little else ";16B"), *tile.args[1:])) for tile in tiles]


def wide_values(image: Image.Image, reopen: Callable[[], Image.Image]) -> np.ndarray | None:
    """Read the stored values of an image of more than 8 bits per band, as numbers in the machine's byte order.

    Pillow keeps the high byte of the bands of colour images. The low one is read from the same file once more.

    Args:
        image: Opened, not yet decoded.
        reopen: Opens the same file again.

    Returns:
        (H, W) of a grey image, (H, W, 3) of a coloured one; ``None`` where there are no more than 8 bits.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    if image.mode not in ("RGB", "RGBA", "RGBX") or not any(
        ";16" in _layout(tile) for tile in getattr(image, "tile", ())
    ):
        return None
    again: Any = reopen()
    mend_planes(again)
    again.tile = [_with_other_byte(tile) for tile in again.tile]
    high, low = (np.asarray(each)[..., :3].astype(np.uint16) for each in (image, again))
    return high << 8 | low


def stretch(values: np.ndarray, value_range: str | tuple[float, float]) -> np.ndarray:
    """Map a range of values to 0 ... 255, what lies beyond it to its ends.

    Args:
        values: Of any shape. Those that are not finite count as 0.
        value_range: "auto" for their own smallest and largest, or two numbers.

    Returns:
        uint8, of the same shape.
    """
    values = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (values.min(), values.max()) if isinstance(value_range, str) else value_range
    values = (values - low) * (255.0 / max(float(high) - float(low), 1e-12))
    return np.rint(np.clip(values, 0.0, 255.0)).astype(np.uint8)


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Values (H, W) of more than 8 bits as uint8 by the whole range of their type; ``decode_image`` says the rule."""
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


def _layout(tile: TiffImagePlugin.ImageFile._Tile) -> str:
    """Pillow's name of how a tile's bands are stored."""
    layout = tile.args[0] if isinstance(tile.args, tuple) else tile.args
    return layout if isinstance(layout, str) else ""


def _with_other_byte(tile: TiffImagePlugin.ImageFile._Tile) -> TiffImagePlugin.ImageFile._Tile:
    layout = _layout(tile)
    if layout.startswith("LA"):  # grey with transparency has one layout only: the high byte stands for both
        return tile
    other = layout[:-4] + _OTHER_BYTE.get(layout[-4:], layout[-4:])
    return tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
