"""Views: transformation families g, and the registry that recipes name them by.

Names are imported when they are first used: commands list the families in their help without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy_names import import_when_used

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

if TYPE_CHECKING:
    from .base import TransformationFamily, Views
    from .color_jitter import ColorJitterFamily
    from .composed import JointFamily, OneOfFamily
    from .crop import CropFamily
    from .flip import FlipFamily
    from .gaussian_blur import GaussianBlurFamily
    from .given import GivenFamily
    from .registry import SPECIAL_TRANSFORMATIONS, TRANSFORMATIONS, build_transformation
    from .rot90 import Rot90Family
    from .rotation import RotationFamily
    from .se2 import SE2Family
    from .translation import TranslationFamily

__getattr__, __dir__ = import_when_used(
    __name__,
    __all__,
    {
        "SPECIAL_TRANSFORMATIONS": "registry",
        "TRANSFORMATIONS": "registry",
        "ColorJitterFamily": "color_jitter",
        "CropFamily": "crop",
        "FlipFamily": "flip",
        "GaussianBlurFamily": "gaussian_blur",
        "GivenFamily": "given",
        "JointFamily": "composed",
        "OneOfFamily": "composed",
        "Rot90Family": "rot90",
        "RotationFamily": "rotation",
        "SE2Family": "se2",
        "TransformationFamily": "base",
        "TranslationFamily": "translation",
        "Views": "base",
        "build_transformation": "registry",
    },
)
