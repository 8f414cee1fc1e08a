"""Views: transformation families g, and the registry that recipes name them by."""

from __future__ import annotations

import inspect
from typing import Any

from ..utils.registry import Registry
from ..utils.suggestions import check_keys, check_known
from .base import TransformationFamily, Views
from .color_jitter import ColorJitterFamily
from .composed import JointFamily, OneOfFamily
from .crop import CropFamily
from .flip import FlipFamily
from .gaussian_blur import GaussianBlurFamily
from .given import GivenFamily
from .rot90 import Rot90Family
from .rotation import RotationFamily
from .se2 import SE2Family
from .translation import TranslationFamily

TRANSFORMATIONS = Registry[TransformationFamily](
    "transformation",
    TransformationFamily,
    {
        "rotation": RotationFamily,
        "translation": TranslationFamily,
        "se2": SE2Family,
        "color_jitter": ColorJitterFamily,
        "gaussian_blur": GaussianBlurFamily,
        "crop": CropFamily,
        "flip": FlipFamily,
        "rot90": Rot90Family,
    },
)

# What else a recipe may name: families that are made of others, or come with the data.
SPECIAL_TRANSFORMATIONS: dict[str, type[TransformationFamily]] = {
    "joint": JointFamily,
    "one_of": OneOfFamily,
    "given": GivenFamily,
}

__all__ = [
    "SPECIAL_TRANSFORMATIONS",
    "TRANSFORMATIONS",
    "ColorJitterFamily",
    "CropFamily",
    "FlipFamily",
    "GaussianBlurFamily",
    "GivenFamily",
    "JointFamily",
    "OneOfFamily",
    "Rot90Family",
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
        name: A key of ``TRANSFORMATIONS`` or ``SPECIAL_TRANSFORMATIONS``.
        kwargs: Keyword arguments of that family.

    Raises:
        ValueError: unknown name or keyword (the nearest valid one is named), or an impossible value.
    """
    families = TRANSFORMATIONS | SPECIAL_TRANSFORMATIONS
    check_known(name, families, "transformation")
    family = families[name]
    check_keys(kwargs, inspect.signature(family).parameters, f"transformation {name!r}")
    return family(**kwargs)
