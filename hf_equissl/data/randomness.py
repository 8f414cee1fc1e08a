"""Generators that depend on (seed, epoch, sample) and on nothing else."""

from __future__ import annotations

import numpy as np

_WORD = (1 << 64) - 1
# Second counter word: keeps generators for different uses apart. The first word counts draws.
_SAMPLE, _ORDER = 0, 1


def sample_generator(seed: int, epoch: int, sample_id: int, attempt: int = 0) -> np.random.Generator:
    """Make the generator of one sample in one epoch: Philox, keyed by (seed, epoch), started at (sample, attempt).

    Philox is counter-based, so any (seed, epoch, sample) can be opened directly and no two streams overlap.

    Args:
        seed: Seed of the run.
        epoch: Pass over the data set.
        sample_id: Row number, or a digest for streams; taken modulo 2^64.
        attempt: 0 for the sample's views, 1, 2, ... for the substitutes of a file that does not decode.
    """
    return _generator(seed, epoch, _SAMPLE, sample_id, attempt)


def order_generator(seed: int, epoch: int, reader: int = 0) -> np.random.Generator:
    """Make the generator of an epoch's order of samples, another one for each ``reader`` of a stream."""
    return _generator(seed, epoch, _ORDER, reader, 0)


def _generator(seed: int, epoch: int, use: int, sample_id: int, attempt: int) -> np.random.Generator:
    key = np.array([seed & _WORD, epoch & _WORD], dtype=np.uint64)
    counter = np.array([0, use, sample_id & _WORD, attempt], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
