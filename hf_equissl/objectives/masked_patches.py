"""The masked patches of a batch: where they lie, and how much each counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .base import Features

if TYPE_CHECKING:
    from ..views.base import Views

__all__ = ["MaskedPatches", "masked_patches", "tokens_at"]


class MaskedPatches(NamedTuple):
    """The M masked patches of all global crops, in ascending order.

    Attributes:
        patches: (M,), positions in (V, B, N).
        tokens: (M,), positions in (V, B, T).
        weights: (M,), 1 / (V B m) for a patch of a crop with m masked ones: their sum is the share of masked crops.
    """

    patches: Tensor
    tokens: Tensor
    weights: Tensor


def masked_patches(views: Views, features: Features) -> MaskedPatches:
    """Find the masked patches, without waiting for the device if the views carry ``mask_indices``.

    Raises:
        ValueError: If the views have no masks or masks of another shape.
    """
    crops, images, tokens = features.tokens.shape[:3]
    patches = tokens - features.num_prefix_tokens
    if views.masks is None or views.masks.shape != (crops, images, patches):
        raise ValueError(
            f"The patch loss needs masks of shape {(crops, images, patches)} (V, B, N), the views carry "
            f"{None if views.masks is None else tuple(views.masks.shape)}. Build the view pipeline with this "
            "objective's `needs`, masks (`views.pipeline.masks`) and the encoder's patch size."
        )
    indices = views.mask_indices
    if indices is None:
        indices = views.masks.flatten().nonzero().squeeze(1)
    counts = views.masks.flatten(0, 1).sum(dim=1).clamp(min=1)  # (V * B,)
    crop = indices // patches
    weights = 1 / (counts[crop] * (crops * images)).float()
    return MaskedPatches(indices, indices + (crop + 1) * features.num_prefix_tokens, weights)


def tokens_at(features: Features, masked: MaskedPatches | None) -> Tensor | None:
    """Take the tokens (M, D) of the masked patches; ``None`` without masks."""
    return None if masked is None else features.tokens.flatten(0, 2).index_select(0, masked.tokens)
