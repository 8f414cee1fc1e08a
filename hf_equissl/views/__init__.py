"""Views: transformation families g, and the registry that recipes name them by."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from .base import TransformationFamily, Views
from .color_jitter import ColorJitterFamily
from .crop import CropFamily
from .flip import FlipFamily
from .gaussian_blur import GaussianBlurFamily
from .rotation import RotationFamily
from .se2 import SE2Family
from .translation import TranslationFamily

TRANSFORMATIONS: dict[str, type[TransformationFamily]] = {
    "rotation": RotationFamily,
    "translation": TranslationFamily,
    "se2": SE2Family,
    "color_jitter": ColorJitterFamily,
    "gaussian_blur": GaussianBlurFamily,
    "crop": CropFamily,
    "flip": FlipFamily,
}

__all__ = [
    "TRANSFORMATIONS",
    "ColorJitterFamily",
    "CropFamily",
    "FlipFamily",
    "GaussianBlurFamily",
    "RotationFamily",
    "SE2Family",
    "TransformationFamily",
    "TranslationFamily",
    "Views",
    "build_transformation",
]


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name in known:
        return
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ValueError(f"unknown {what} {name!r}: {hint}Valid: {', '.join(known) or 'none'}.")


def build_transformation(name: str, **kwargs: Any) -> TransformationFamily:
    """Build the family registered as ``name``.

    Args:
        name: A key of ``TRANSFORMATIONS``.
        kwargs: Keyword arguments of that family.

    Raises:
        ValueError: unknown name or keyword (the nearest valid one is named), or an impossible value.
    """
    _check_known("transformation", name, TRANSFORMATIONS)
    family = TRANSFORMATIONS[name]
    for key in kwargs:
        _check_known(f"option of transformation {name!r}:", key, inspect.signature(family).parameters)
    return family(**kwargs)
