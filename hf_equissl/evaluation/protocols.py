"""The sizes of images that evaluators have settings for; each evaluator says itself what its settings are."""

from __future__ import annotations

# Up to this side, "auto" means "small".
SMALL_IMAGE_SIDE = 64
# "full": 224-pixel images, the evaluators' own defaults. "small": 32 to 64 pixels, minutes on one CPU core.
PROTOCOLS = ("full", "small")


def protocol_for(image_size: int) -> str:
    """Return "small" for images of up to 64 pixels, otherwise "full"."""
    return "small" if image_size <= SMALL_IMAGE_SIDE else "full"
