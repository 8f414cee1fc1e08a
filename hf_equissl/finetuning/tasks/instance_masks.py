"""Masks of single objects: read from COCO's polygons and run-length codes, and carried as codes by tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data import ImageDecodeError

# What fills up rows of different lengths, as the run does it.
PADDING = -100


def read_code(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Read a mask into COCO's compressed run-length code.

    Args:
        segmentation: Polygons, each x, y, x, y, ... in pixels; or ``{"size": (height, width), "counts": ...}``.
        size: Width and height of the image.

    Raises:
        ImageDecodeError: it is something else, or of an image of another size.
    """
    from pycocotools import mask

    width, height = size
    try:
        if isinstance(segmentation, Mapping):
            if list(segmentation["size"]) != [height, width]:
                raise ImageDecodeError(
                    f"A mask is of {segmentation['size'][1]} x {segmentation['size'][0]} pixels, and its image of "
                    f"{width} x {height}."
                )
            if isinstance(segmentation["counts"], list):
                return mask.frPyObjects(segmentation, height, width)
            return dict(segmentation)
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            raise ImageDecodeError("A mask has no polygon of three corners or more.")
        return mask.merge(mask.frPyObjects(polygons, height, width))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ImageDecodeError(f"A mask is neither polygons nor a run-length code ({error}).") from error


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
