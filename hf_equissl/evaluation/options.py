"""The options of the evaluators here, apart from their classes: ``--help`` needs no torch."""

from __future__ import annotations

from ..encoders.feature_names import FEATURES
from ..utils.options import Option
from ..utils.suggestions import check_known
from ..views.registry import TRANSFORMATIONS

# A value of --fill: both images are seen through the disk that is never left empty (``circular_mask``).
CIRCLE = "circle"
DEFAULT_FAMILIES = ("rotation", "color_jitter", "gaussian_blur", "translation")


def _known_family(name: str) -> str:
    """Return ``name`` if it is a family that needs no arguments; otherwise raise ``ValueError``."""
    check_known(name, TRANSFORMATIONS, "transformation")
    return name


def _known_feature(name: str) -> str:
    check_known(name, FEATURES, "features")
    return name


CLASS_FEATURES = Option(
    "--class_features",
    "features for linear probe, kNN and effective rank; default: cls patches backbone",
    "KIND",
    setting="features",
    type=_known_feature,
    nargs="+",
    default=("cls", "patches", "backbone"),
)
REGRESSION_OPTIONS = (
    Option(
        "--tests",
        f"transformations to regress, among {', '.join(TRANSFORMATIONS)}; default: {' '.join(DEFAULT_FAMILIES)}",
        "FAMILY",
        setting="families",
        type=_known_family,
        nargs="+",
    ),
    Option(
        "--fill",
        "outside of turned or shifted images: zeros (default; black corners give angles away), reflect, border, or "
        "circle: both images are seen through the disk that is never left empty",
        choices=("zeros", "reflect", "border", CIRCLE),
    ),
    Option(
        "--features",
        f"features for the regression, among {', '.join(FEATURES)}; default: backbone = [CLS ; mean patch]",
        "KIND",
        type=_known_feature,
        nargs="+",
    ),
    Option("--seeds", "seeds of the regression probe; default: 3", "N", type=int),
    Option("--epochs", "epochs of the regression probe", "N", type=int),
    Option("--num_draws", "transformations drawn per training image", "N", type=int),
)
