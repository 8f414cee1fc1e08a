"""Masks of single objects: read from COCO's polygons and run-length codes, and carried as codes by tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data import ImageDecodeError

# What fills up rows of different lengths, as the run does it.
PADDING = -100


def check_code(segmentation: Any, size: tuple[int, int] | None) -> None:
    """Refuse what ``read_code`` cannot read; polygons are not drawn for it.

    Args:
        segmentation: As there.
        size: Width and height of the image; ``None`` where they are not known yet.

    Raises:
        ImageDecodeError: it is neither polygons nor a run-length code, or of an image of another size.
    """
    try:
        (_check_runs if isinstance(segmentation, Mapping) else _check_polygons)(segmentation, size)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ImageDecodeError(f"A mask is neither polygons nor a run-length code ({error!r}).") from error


def _check_runs(code: Mapping[str, Any], size: tuple[int, int] | None) -> None:
    from pycocotools import mask

    height, width = map(int, code["size"])
    if size is not None and (width, height) != tuple(size):
        raise ImageDecodeError(f"A mask is of {width} x {height} pixels, and its image of {size[0]} x {size[1]}.")
    if isinstance(code["counts"], (str, bytes)):
        mask.decode({"size": [height, width], "counts": code["counts"]})  # refuses runs that do not end with the image
    elif min(code["counts"], default=0) < 0 or sum(code["counts"]) != width * height:
        raise ImageDecodeError(f"The runs of a mask count {sum(code['counts'])} pixels, and it has {width} x {height}.")


def _check_polygons(polygons: Sequence[Any], size: tuple[int, int] | None) -> None:
    if isinstance(polygons, (str, bytes)):
        raise TypeError("a text without its size")
    for polygon in polygons:
        if len(polygon) % 2 or not all(math.isfinite(value) for value in polygon):
            raise ImageDecodeError(f"A polygon of a mask is {str(polygon)[:60]}; expected x, y, x, y, ... in pixels.")
    if not any(len(polygon) >= 6 for polygon in polygons):
        raise ImageDecodeError("A mask has no polygon of three corners or more.")


def read_code(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Read a mask into COCO's compressed run-length code.

    Args:
        segmentation: Polygons, each x, y, x, y, ... in pixels, of which those of fewer than three corners are left out;
            or ``{"size": (height, width), "counts": ...}``.
        size: Width and height of the image.

    Raises:
        ImageDecodeError: as ``check_code``.
    """
    from pycocotools import mask

    width, height = size
    check_code(segmentation, size)
    if not isinstance(segmentation, Mapping):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return mask.merge(mask.frPyObjects(polygons, height, width))
    if isinstance(segmentation["counts"], (str, bytes)):
        return dict(segmentation)
    return mask.frPyObjects(dict(segmentation), height, width)


def read_masks(objects: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Iterable[np.ndarray]:
    """Decode the masks of objects one by one: uint8 (height, width)."""
    from pycocotools import mask

    for one in objects:
        yield mask.decode(read_code(one["segmentation"], size))


def encode_objects(objects: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> list[bytes]:
    """Return the codes of the masks of objects."""
    return [_bytes_of(read_code(one["segmentation"], size)) for one in objects]


def encode_masks(masks: np.ndarray) -> list[bytes]:
    """Encode masks, (n, height, width), not 0 where the object is."""
    from pycocotools import mask

    return [_bytes_of(code) for code in mask.encode(np.asfortranarray(masks.astype(np.uint8).transpose(1, 2, 0)))]


def _bytes_of(code: Mapping[str, Any]) -> bytes:
    counts = code["counts"]
    return counts.encode() if isinstance(counts, str) else counts


def pack_codes(codes: Sequence[Sequence[bytes]]) -> dict[str, Tensor]:
    """Lay the codes of several images into tensors.

    Returns:
        ``codes`` int16 (B, L), those of an image behind one another, and their ``lengths`` int32 (B, n), both padded.
    """
    rows = [torch.from_numpy(np.frombuffer(b"".join(several), np.uint8).astype(np.int16)) for several in codes]
    lengths = [torch.tensor([len(code) for code in several], dtype=torch.int32) for several in codes]
    names = {"codes": rows, "lengths": lengths}
    return {name: pad_sequence(values, batch_first=True, padding_value=PADDING) for name, values in names.items()}


def unpack_codes(codes: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    """Return the codes of one image, as ``pack_codes`` was given them."""
    kept = lengths[lengths != PADDING]
    data = codes[: int(kept.sum())].astype(np.uint8).tobytes()
    ends = np.cumsum(kept)
    return [data[end - length : end] for end, length in zip(ends, kept, strict=True)]
