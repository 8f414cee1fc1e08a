"""Write an encoder as a folder that ``AutoModel`` and ``AutoImageProcessor`` load."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import BitImageProcessorPil

from ..modeling import EquiSSLModel
from ..utils.files import move_into_place, staging_folder
from .base_image import resized_side
from .places import BASE_FILE

# Files of a saved encoder, sharded ones and stock types included.
_SAVED = ("config.json", "preprocessor_config.json", "model*.safetensors", "model*.json", "*_equissl.py", BASE_FILE)
# What desktops leave in folders that were looked at.
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")


def image_processor(image_size: int, image_mean: Sequence[float], image_std: Sequence[float]) -> BitImageProcessorPil:
    """Make the evaluation transform: shorter side to ``resized_side``, centre crop, normalise.

    Its pixels are those of ``base_image``, so that a loaded encoder sees what was measured.
    """
    return BitImageProcessorPil(
        size={"shortest_edge": resized_side(image_size)},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def check_replaceable(directory: str | Path, also: Sequence[str] = ()) -> None:
    """Make sure that only a saved model, with files ``also``, is deleted when another one takes its place.

    Raises:
        ValueError: ``directory`` is a link or a file, or holds other files, links or folders, hidden ones included.
    """
    directory = Path(directory)
    if directory.is_symlink():
        raise ValueError(f"{directory} is a link and would be replaced. Delete it, or name a new folder.")
    if directory.is_file():
        raise ValueError(f"{directory} is a file. Name a folder for the encoder.")
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.is_symlink() or not path.is_file() or not any(map(path.match, (*_SAVED, *_LITTER, *also))):
            raise ValueError(
                f"{directory} holds {path.name}, which is no part of a saved encoder and would be deleted with the "
                "folder. Move it away, or name a new folder."
            )


def save_encoder(
    encoder: EquiSSLModel,
    directory: str | Path,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> Path:
    """Save encoder, its code and its image processor into ``directory``; an older one there is replaced as a whole.

    Raises:
        ValueError: As ``check_replaceable``; the encoder was trained on images that are not square, which the processor
            cannot crop; code that its config names is not beside it, e.g. that of a class defined in a script.
    """
    size = encoder.config.image_size
    if not isinstance(size, int) and len(set(size)) > 1:
        raise ValueError(
            f"The image processor crops squares, but the encoder's image_size is {tuple(size)}. "
            "Train on square images, or save the encoder with its own save_pretrained and no image processor."
        )
    directory = Path(directory)
    check_replaceable(directory)
    with staging_folder(directory) as staging:
        encoder.save_pretrained(staging)
        image_processor(size if isinstance(size, int) else size[0], image_mean, image_std).save_pretrained(staging)
        _check_code(staging)
        move_into_place(staging, directory)
    return directory


def _check_code(folder: Path) -> None:
    """Check that the modules named by ``auto_map`` are there, and those that they import."""
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    needed = {name.rpartition(".")[0] for name in entries.values()}
    seen: set[str] = set()
    while needed - seen:
        module = min(needed - seen)
        seen.add(module)
        path = folder / f"{module}.py"
        if not path.is_file():
            raise ValueError(
                f"The encoder's config names {path.name}, which was not saved beside it: without this package it would "
                "not load. A class of your own must live in a module, not in a script or notebook."
            )
        needed |= set(re.findall(r"^\s*from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE))
    if not seen:
        raise ValueError("The encoder's config has no auto_map: without this package it would not load.")
