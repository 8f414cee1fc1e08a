"""What the decoders that were published with an encoder paint: the images between two views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .frozen import FrozenEncoder, as_frozen

__all__ = ["paint_intermediate_images"]


def paint_intermediate_images(
    encoder: FrozenEncoder | nn.Module | str | Path, first: Tensor, second: Tensor
) -> dict[float, Tensor]:
    """Paint the images on the way from one view to the other, from the equivariant features of both.

    The decoders lie in the weights of the encoder that a run exports, and of the one that is published: nothing else
    is loaded. How the second view came about is not told to them.

    Args:
        encoder: A folder or Hub id, an ``EquiSSLModel``, or a ``FrozenEncoder`` of one, which knows the mean and
            standard deviation of the images; of a bare model they are taken to be ImageNet's.
        first: (B, 3, H, W), uint8 or floats in [0, 1]: images of which the sides are multiples of the patch.
        second: Likewise, the transformed views.

    Returns:
        Fraction of the way -> images (B, 3, H, W), floats in [0, 1] on the CPU. With K decoders the fractions are
        k / (K + 1), and 1 where one paints the second view; with the decoder of cross-attention it is 1 alone.

    Raises:
        LoadError: There is no encoder, or it cannot be read.
        ValueError: It has no decoder, or the views differ in shape.
    """
    frozen = as_frozen(encoder)
    module: Any = frozen.module
    if not can_paint(frozen):
        raise ValueError(
            f"{frozen.name} has no decoder: it was trained without reconstruction, or exported without it. Give an "
            "encoder of a run with the objective `reconstruction` or `cross_attention_reconstruction`."
        )
    with frozen.frozen():
        painted = module.reconstruct(frozen.normalise(first), frozen.normalise(second))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (frozen.image_mean, frozen.image_std))
    images = (painted.float().cpu() * std + mean).clamp(0, 1)
    return dict(zip(_fractions(module.config), images.unbind(1), strict=True))


def can_paint(encoder: FrozenEncoder) -> bool:
    """Return whether the encoder has a decoder."""
    return getattr(encoder.module, "decoder", None) is not None and hasattr(encoder.module, "reconstruct")


def _fractions(config: Any) -> list[float]:
    """List how far on the way each painted image is."""
    if config.decoder_type != "conv":
        return [1.0]
    count = config.num_intermediate_images
    return [k / (count + 1) for k in range(1, count + 1 + int(config.decoder_reconstructs_final))]
