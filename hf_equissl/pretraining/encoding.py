"""Views through an encoder: crops of one size in one pass, local crops together with the global ones."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from ..modeling import EquiSSLModel
from ..objectives.base import Features, TokenMap
from ..views.base import Views
from ..views.needs import ExtraViews
from .packing import encode_packed

__all__ = ["encode_crops", "encode_extra"]


def encode_crops(
    encoder: EquiSSLModel,
    crops: Tensor,
    masks: Tensor | None = None,
    layers: Sequence[int] = (),
    patches: bool = True,
    last_layer: int | None = None,
    local: Tensor | None = None,
) -> Features:
    """Encode crops of one size in one pass, together with local ones where there are any.

    Args:
        encoder: Student or teacher.
        crops: (..., C, H, W).
        masks: bool (images, N), patches that the encoder does not see; the images are ``crops`` in their order.
        layers: Blocks whose tokens are kept.
        patches: ``False``: only CLS and registers leave the last block.
        last_layer: Stop after so many blocks; ``None``: after the last.
        local: (..., C, h, w), crops of another size, of which CLS and registers leave the last block.
    """
    images, local_tokens = crops.flatten(0, -4), None
    if local is None:
        output = encoder(
            images,
            bool_masked_pos=masks,
            output_features=False,
            output_patches=patches,
            output_hidden_states=list(layers) or False,
            last_layer=last_layer,
        )
        last, states = output.last_hidden_state, output.hidden_states
    else:
        last, local_tokens, states = encode_packed(encoder, images, local.flatten(0, -4), masks, layers)
        local_tokens = local_tokens.unflatten(0, local.shape[:-3])
    shape, side = crops.shape[:-3], encoder.config.patch_side
    grid = (crops.shape[-2] // side, crops.shape[-1] // side)

    def tokens_after(layer: int, tokens: Tensor) -> TokenMap:
        inserted = encoder.config.cls_insertion_layer
        prefix = encoder.num_prefix_tokens if not inserted or layer > inserted else 0
        return TokenMap(tokens.unflatten(0, shape), prefix, grid)

    end = tokens_after(last_layer or encoder.config.num_hidden_layers, last)
    hidden = {layer: tokens_after(layer, states[layer]) for layer in layers}
    return Features(end.tokens, end.num_prefix_tokens, grid, encoder.stem, hidden=hidden, local_tokens=local_tokens)


def encode_extra(
    encoder: EquiSSLModel, views: Views, features: Features, wanted: Sequence[tuple[ExtraViews, Sequence[int] | None]]
) -> None:
    """Encode further views and add them to the ``features`` of the usual crops; those of one size go in one pass.

    Views whose size is drawn go alone (``ExtraViews.sizes_are_drawn``).

    Args:
        encoder: Student or teacher.
        views: Views with ``extra``.
        features: Features of ``views.global_crops`` by the same encoder; ``extra`` and ``joined`` are set.
        wanted: Which views of each set; ``None``: all.
    """
    passes: dict[tuple, list[tuple[str, int]]] = {}
    for extra, chosen in wanted:
        made = views.extra.get(extra.name, ())  # none where they took the place of the global crops
        features.extra[extra.name] = {}
        for view in dict.fromkeys(range(len(made)) if chosen is None else chosen):
            options = (extra.hidden_layers, extra.patches, extra.last_layer)
            shares = (extra.name, view) if extra.sizes_are_drawn else made[view].shape[-2:]
            passes.setdefault((shares, *options), []).append((extra.name, view))
    for (_, layers, patches, last_layer), members in passes.items():
        images = [views.extra[name][view] for name, view in members]
        together = encode_crops(encoder, torch.cat(images), None, layers, patches, last_layer)
        together.stem = features.stem
        start = 0
        for (name, view), own in zip(members, images, strict=True):
            part = slice(start, start := start + len(own))
            features.extra[name][view] = together.map(itemgetter(part))
    crops = len(features.tokens)
    joining = [extra for extra, _ in wanted if extra.joins]
    if joining:
        features.joined = torch.cat([_cls_of(features, extra, extra.joins[:crops]) for extra in joining], dim=1)
    if joining and features.local_tokens is not None:
        features.joined_local = torch.cat([_cls_of(features, extra, extra.joins[crops:]) for extra in joining], dim=1)


def _cls_of(features: Features, extra: ExtraViews, views: Sequence[int]) -> Tensor:
    """Take the CLS rows of these views of a set, (views, M, D)."""
    return torch.stack([features.extra[extra.name][view].cls for view in views])
