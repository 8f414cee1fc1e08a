"""Write an encoder as a folder that ``AutoModel`` and ``AutoImageProcessor`` load."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import BitImageProcessorPil

from ..evaluation.images import resized_side
from ..files import move_into_place
from ..modeling import EquiSSLModel


def image_processor(image_size: int, image_mean: Sequence[float], image_std: Sequence[float]) -> BitImageProcessorPil:
    """The evaluation transform: shorter side to ``resized_side``, centre crop, normalise.

    Its pixels are those of ``hf_equissl.evaluation.images.base_image``: who loads the encoder sees what was measured.
    """
    return BitImageProcessorPil(
        size={"shortest_edge": resized_side(image_size)},
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
        raise ValueError(
            f"The image processor crops squares, but the encoder's image_size is {tuple(size)}. "
            "Train on square images, or save the encoder with its own save_pretrained and no image processor."
        )
    directory = Path(directory)
    staging = directory.with_name(f".saving-{directory.name}")
    shutil.rmtree(staging, ignore_errors=True)
    encoder.save_pretrained(staging)
    image_processor(size if isinstance(size, int) else size[0], image_mean, image_std).save_pretrained(staging)
    move_into_place(staging, directory)
    return directory
