"""Views: transformation families g, and the registry that recipes name them by."""

from __future__ import annotations

import inspect
from typing import Any

from ..utils.suggestions import check_keys, check_known
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


def build_transformation(name: str, **kwargs: Any) -> TransformationFamily:
    """Build the family registered as ``name``.

    Args:
        name: A key of ``TRANSFORMATIONS``.
        kwargs: Keyword arguments of that family.

    Raises:
        ValueError: unknown name or keyword (the nearest valid one is named), or an impossible value.
    """
    check_known(name, TRANSFORMATIONS, "transformation")
    family = TRANSFORMATIONS[name]
    check_keys(kwargs, inspect.signature(family).parameters, f"transformation {name!r}")
    return family(**kwargs)
