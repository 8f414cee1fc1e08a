"""Write an encoder as a folder that ``AutoModel`` and ``AutoImageProcessor`` load."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import BitImageProcessorPil

from ..files import move_into_place
from ..modeling import EquiSSLModel

# Photographs are resized to 256 and cropped to 224; images that are small already would only lose their border.
SMALLEST_CROPPED_SIZE = 96
RESIZE_RATIO = 256 / 224


def image_processor(image_size: int, image_mean: Sequence[float], image_std: Sequence[float]) -> BitImageProcessorPil:
    """The evaluation transform: shorter side to 256/224 of ``image_size`` (from 96 px on), centre crop, normalise."""
    shortest_edge = round(image_size * RESIZE_RATIO) if image_size >= SMALLEST_CROPPED_SIZE else image_size
    return BitImageProcessorPil(
        size={"shortest_edge": shortest_edge},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def save_encoder(
    encoder: EquiSSLModel,
    directory: str | Path,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> Path:
    """Save encoder, its code and its image processor into ``directory``; an existing folder is replaced as a whole.

    Raises:
        ValueError: if the encoder was trained on images that are not square: the processor crops squares.
    """
    size = encoder.config.image_size
    if not isinstance(size, int) and len(set(size)) > 1:
        raise ValueError(f"The image processor crops squares, but the encoder's image_size is {size}.")
    directory = Path(directory)
    staging = directory.with_name(f".saving-{directory.name}")
    shutil.rmtree(staging, ignore_errors=True)
    encoder.save_pretrained(staging)
    image_processor(size if isinstance(size, int) else size[0], image_mean, image_std).save_pretrained(staging)
    move_into_place(staging, directory)
    return directory
