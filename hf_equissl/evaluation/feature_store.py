"""Features as they are computed, written into place: they lie in memory once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

# Setting -> type in which features are kept. Whatever reads them computes in float32.
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FeatureStore:
    """One buffer for several kinds of features of at most ``rows`` images, side by side in its columns.

    Kinds that lie side by side, such as the parts of "backbone", are one kind without a copy (``joined``).

    Args:
        names: Kinds of features, in the order of their columns.
        rows: The most images that there can be. Pages that are not written take no memory.
        dtype: Type in which they are kept.
    """

    def __init__(self, names: Sequence[str], rows: int, dtype: torch.dtype = torch.float32) -> None:
        self.names, self._rows, self._dtype = tuple(names), rows, dtype
        self._count = 0
        self._buffer: Tensor | None = None
        self._columns: dict[str, tuple[int, int]] = {}

    def add(self, features: Mapping[str, Tensor]) -> None:
        """Write the features of the next images, each (b, .)."""
        if self._buffer is None:
            end = 0
            for name in self.names:
                self._columns[name] = end, end + features[name].shape[1]
                end = self._columns[name][1]
            self._buffer = torch.empty(self._rows, end, dtype=self._dtype)
        count = len(features[self.names[0]])
        for name, (begin, end) in self._columns.items():
            self._buffer[self._count : self._count + count, begin:end] = features[name]
        self._count += count

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def join(self, names: Sequence[str]) -> Tensor | None:
        """Return kinds of features side by side, (m, .); ``None`` where they do not lie so."""
        if self._buffer is None or not all(name in self._columns for name in names):
            return None
        places = [self._columns[name] for name in names]
        if any(before[1] != after[0] for before, after in pairwise(places)):
            return None
        return self._buffer[: self._count, places[0][0] : places[-1][1]]
