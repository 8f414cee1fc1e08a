"""The transformation families by the names that recipes and commands give them. Needs no torch before one is used."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..utils.registry import Later, Registry
from ..utils.suggestions import check_keys, check_known

if TYPE_CHECKING:
    from .base import TransformationFamily

_BASE = Later(f"{__package__}.base", "TransformationFamily")

TRANSFORMATIONS: Registry[TransformationFamily] = Registry(
    "transformation",
    _BASE,
    {
        "rotation": Later(f"{__package__}.rotation", "RotationFamily"),
        "translation": Later(f"{__package__}.translation", "TranslationFamily"),
        "se2": Later(f"{__package__}.se2", "SE2Family"),
        "color_jitter": Later(f"{__package__}.color_jitter", "ColorJitterFamily"),
        "gaussian_blur": Later(f"{__package__}.gaussian_blur", "GaussianBlurFamily"),
        "crop": Later(f"{__package__}.crop", "CropFamily"),
        "flip": Later(f"{__package__}.flip", "FlipFamily"),
        "rot90": Later(f"{__package__}.rot90", "Rot90Family"),
    },
)

# What else a recipe may name: families that are made of others, or come with the data.
SPECIAL_TRANSFORMATIONS: Registry[TransformationFamily] = Registry(
    "transformation",
    _BASE,
    {
        "joint": Later(f"{__package__}.composed", "JointFamily"),
        "one_of": Later(f"{__package__}.composed", "OneOfFamily"),
        "given": Later(f"{__package__}.given", "GivenFamily"),
    },
)


def build_transformation(name: str, **kwargs: Any) -> TransformationFamily:
    """Build the family registered as ``name``.

    Args:
        name: A key of ``TRANSFORMATIONS`` or ``SPECIAL_TRANSFORMATIONS``.
        kwargs: Keyword arguments of that family.

    Raises:
        ValueError: unknown name or keyword (the nearest valid one is named), or an impossible value.
    """
    check_known(name, (*TRANSFORMATIONS, *SPECIAL_TRANSFORMATIONS), "transformation")
    family: Any = (SPECIAL_TRANSFORMATIONS if name in SPECIAL_TRANSFORMATIONS else TRANSFORMATIONS)[name]
    check_keys(kwargs, inspect.signature(family).parameters, f"transformation {name!r}")
    return family(**kwargs)
