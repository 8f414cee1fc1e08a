"""What comes with the package: two small encoders and a few photographs. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..utils.load_errors import LoadError
from ..utils.suggestions import check_known

# Name -> folder in model_cards/. Both were trained on the same images, views and budget.
CHECKPOINTS: Mapping[str, str] = {"base": "equissl-cifar10-base", "reconstruction": "equissl-cifar10-reconstruction"}
_NEEDED = ("config.json", "model.safetensors", "preprocessor_config.json")
_HERE = Path(__file__).resolve()
_PHOTOGRAPHS = _HERE.parent / "photographs"


def shipped_checkpoint(name: str = "reconstruction") -> Path:
    """Find an encoder that comes with the package, in a checkout or in an installed wheel.

    Args:
        name: "reconstruction" (VICReg and the reconstruction of images between two views) or "base" (the same without
            it).

    Returns:
        A folder that ``AutoModel`` and ``AutoImageProcessor`` load.

    Raises:
        RecipeError: There is no encoder of this name.
        LoadError: This installation lacks its files; the message names them.
    """
    check_known(name, CHECKPOINTS, "shipped_checkpoint")
    folder = model_cards() / CHECKPOINTS[name]
    missing = [file for file in _NEEDED if not (folder / file).is_file()]
    if missing:
        raise LoadError(
            f"The encoder {CHECKPOINTS[name]}, which ships with hf-equissl, is not whole here: {folder} lacks "
            f"{', '.join(missing)}. Install the package again (pip install --force-reinstall --no-deps hf-equissl; in "
            "a checkout: git checkout -- model_cards), or give encoders of your own (--encoder)."
        )
    return folder


def model_cards() -> Path:
    """Find the folder of cards and encoders: in the package of an installed wheel, beside it in a checkout."""
    inside, beside = _HERE.parents[1] / "model_cards", _HERE.parents[2] / "model_cards"
    return inside if inside.is_dir() else beside


def shipped_photographs() -> list[Path]:
    """List the photographs that come with the package; ``SOURCES.md`` beside them says whose they are."""
    return sorted(_PHOTOGRAPHS.glob("*.jpg"))
