"""Decoded images that stay in memory, for an encoder that is measured again and again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..distributed.collectives import gather, rank, world_size
from ..encoders.frozen import FrozenEncoder, NonFiniteFeaturesError
from .images import ImageSet


class ResidentImages:
    """Base images of an ``ImageSet`` as uint8, each process with its share of them.

    All processes have to make it, and to call ``features``, together. Images that do not decode are left out.

    Args:
        images: The images; the set itself is not kept.
        size: Side of the base images in pixels.
    """

    def __init__(self, images: ImageSet, size: int) -> None:
        # Every process hands in the same number of rows when features are gathered.
        self._share = -(-len(images) // world_size())
        mine = torch.arange(rank(), len(images), world_size())
        batches = list(images.part(mine).batches(size)) if len(mine) else []
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, 3, size, size, dtype=torch.uint8)
        index, self._pixels = (torch.cat(parts) for parts in zip(nothing, *batches, strict=True))
        self._rows = mine[index]

    @property
    def num_bytes(self) -> int:
        """Memory that this process's share takes, in bytes."""
        return self._pixels.numel()

    def features(self, encoder: FrozenEncoder) -> tuple[Tensor, Tensor]:
        """Compute the CLS features of all images; each process encodes its share.

        Returns:
            Rows (n,) of the set, ascending, and features (n, D) float32, both on the encoder's device and the same on
            all processes. Features that are not finite do not raise, which would leave the other processes waiting:
            those of the whole share are NaN.
        """
        index = torch.full((self._share,), -1)  # -1: a row without an image
        config: Any = encoder.module.config
        values = torch.zeros(self._share, config.hidden_size)
        count = len(self._rows)
        index[:count] = self._rows
        if count:
            try:
                values[:count] = encoder.encode(self._pixels, ("cls",))["cls"]
            except NonFiniteFeaturesError:
                values[:count] = math.nan
        index, values = gather(index.to(encoder.device)), gather(values.to(encoder.device))
        order = index.argsort()
        order = order[index[order] >= 0]
        return index[order], values[order]
