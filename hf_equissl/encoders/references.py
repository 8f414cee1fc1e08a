"""Encoders by name that a measurement is read beside: the pixels themselves, and an architecture before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .frozen import FrozenEncoder
from .loading import read_image_settings, untrained_encoder
from .places import RAW_PIXELS, is_raw_pixels, split_untrained

# Larger images are averaged to this side: at 224 pixels a row would be 150,528 numbers.
MOST_SIDE = 32


class RawPixels(nn.Module):
    """The image as its own features, (B, 3 s^2): s is the image's side, at most ``MOST_SIDE``, by averaging areas."""

    gives_vectors = True
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Says on which device the module is; a module without any tensor could not be moved.
        self.register_buffer("scale", torch.ones(()))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Flatten images (B, C, S, S) to (B, C s^2)."""
        side = min(pixel_values.shape[-1], MOST_SIDE)
        return F.adaptive_avg_pool2d(pixel_values, side).flatten(1) * self.scale


def open_frozen(
    source: str | Path, *, device: str | torch.device | None = None, image_size: int | None = None, **options: Any
) -> FrozenEncoder:
    """Open an encoder by path, Hub id or one of the names of this module.

    - ``raw_pixels``: features are the image's pixels; ``image_size`` has to be given.
    - ``untrained:PATH_OR_ID``: the architecture of the encoder there with random weights, seed 0, and its image
      settings; ``untrained@3:PATH_OR_ID`` for another seed.

    Args:
        source: Path, Hub id or name.
        device: Where it is put; default: CUDA if there is one.
        image_size: Side of the images in pixels; default: the encoder's own.
        **options: Further arguments of ``FrozenEncoder``: ``precision``, ``batch_size``, ``revision``, ...

    Raises:
        ValueError: there is no such encoder, or the pixels are asked for without a size.
    """
    reading = {
        key: options.pop(key) for key in ("precision", "batch_size", "image_mean", "image_std") if key in options
    }
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_raw_pixels(source):
        if image_size is None:
            raise ValueError(f"{RAW_PIXELS} has no image size of its own: give one in pixels (--image_size).")
        return FrozenEncoder(RawPixels().to(target), image_size=image_size, name=RAW_PIXELS, **reading)
    if (found := split_untrained(source)) is None:
        return FrozenEncoder(source, device=device, image_size=image_size, **reading, **options)
    architecture, seed = found
    module = untrained_encoder(architecture, seed=seed, **options).to(target)
    hub_options = {key: value for key, value in options.items() if key != "trust_remote_code"}
    saved = read_image_settings(architecture, **hub_options)
    own_size = saved.pop("image_size", None)
    image_size = image_size or own_size
    return FrozenEncoder(module, image_size=image_size, name=str(source), **(saved | reading))
