"""Settings of the evaluators, by the size of the images. Every record carries them in full."""

from __future__ import annotations

from typing import Any

# Up to this side, "auto" means "small".
SMALL_IMAGE_SIDE = 64

PROTOCOLS: dict[str, dict[str, dict[str, Any]]] = {
    # 224-pixel images: the classes' own defaults. 50 epochs, a new theta per image and epoch; three seeds.
    "full": {"transformation_regression": {}, "linear": {}, "knn": {}, "effective_rank": {}},
    # 32-pixel images on one CPU core (CIFAR-10, 50,000 images): two theta per image, shared by eight epochs. More
    # draws and epochs raise every encoder's R2 a little and cost minutes; the order of encoders stays.
    "small": {
        "transformation_regression": {"epochs": 8, "num_draws": 2, "precision": "auto"},
        "linear": {"solver": "lbfgs", "standardize": True},
        "knn": {},
        "effective_rank": {},
    },
}


def protocol_for(image_size: int) -> str:
    """ "small" for images of up to 64 pixels, otherwise "full"."""
    return "small" if image_size <= SMALL_IMAGE_SIDE else "full"
