"""Data sets of cropped views for a DataLoader, and the order in which they are read."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from ..views.base import Item
from ..views.pipelines import ViewPipeline
from .errors import ImageDecodeError
from .randomness import order_generator, sample_generator
from .sources import ImageSource

__all__ = ["EpochSampler", "ImageViewDataset", "SampleDataset", "SkippedImage"]

# Substitutes that are tried for one bad file before the data set is given up.
MAX_ATTEMPTS = 20


@dataclass(frozen=True)
class SkippedImage:
    """A file that did not decode.

    Attributes:
        name: Its path, or the data set and row.
        reason: What the decoder said.
    """

    name: str
    reason: str


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, index)`` for every sample, so that workers need not be told the epoch.

    The order depends on (seed, epoch) alone. Every rank walks the same order; accelerate's ``BatchSamplerShard`` gives
    each its batches.

    Args:
        num_samples: Number of rows.
        seed: Seed of the run.
        shuffle: Whether each epoch has a new order; otherwise all have that of the rows.
        multiple: An epoch consists of a multiple of so many samples; what remains of its order is left out. Given the
            number of images of an optimizer step, an epoch has as many steps however a step is split into processes
            and micro-batches.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True, multiple: int = 1) -> None:
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self.length = num_samples // multiple * multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Make one pass, in the epoch that was set when it began."""
        epoch = self.epoch
        if self.shuffle:
            order = order_generator(self.seed, epoch).permutation(self.num_samples)
        else:
            order = np.arange(self.num_samples)
        return ((epoch, index) for index in order[: self.length].tolist())


class SampleDataset(ABC, Dataset[dict[str, Any]]):
    """Samples by ``(epoch, index)``, each made with a generator that depends on (seed, epoch, index) alone.

    A sample that does not decode is replaced by another, drawn from (seed, epoch, index, attempt), and reported under
    ``skipped``.

    Args:
        name: What messages call the samples.
        count: How many samples there are.
        seed: Seed of the run.
    """

    def __init__(self, name: str, count: int, seed: int) -> None:
        self.name, self.count, self.seed = name, count, seed
        self._samplers: list[EpochSampler] = []

    @abstractmethod
    def read(self, index: int, rng: np.random.Generator) -> Any:
        """Decode one sample; what is drawn to choose it comes from ``rng``.

        Raises:
            ImageDecodeError: it does not decode.
        """

    @abstractmethod
    def make(self, sample: Any, rng: np.random.Generator) -> dict[str, Any]:
        """Turn what ``read`` returned into what a collator takes; all that is random is drawn from ``rng``."""

    @abstractmethod
    def item_name(self, index: int) -> str:
        """Return what messages call a sample."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.count

    def sampler(self, shuffle: bool = True, multiple: int = 1) -> EpochSampler:
        """Make a sampler over this data set that follows ``set_epoch``; ``multiple`` as in ``EpochSampler``."""
        sampler = EpochSampler(len(self), self.seed, shuffle, multiple)
        self._samplers.append(sampler)
        return sampler

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch to the samplers made by ``sampler``.

        ``DataLoaderShard.set_epoch`` reaches a sampler through at most one wrapper. On several ranks, a loader that
        resumes within an epoch has two (``SkipBatchSampler`` around ``BatchSamplerShard``); then accelerate tells the
        data set instead, and without this method the order of epoch 0 would come back.
        """
        for sampler in self._samplers:
            sampler.set_epoch(epoch)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Make one sample.

        Returns:
            What ``make`` returns, ``index`` (of the sample that was read), ``skipped``, and ``seconds`` (that it took).

        Raises:
            ImageDecodeError: Neither this sample nor any of the substitutes decodes.
        """
        if not isinstance(key, tuple):
            raise TypeError(f"Expected (epoch, index), got {key!r}. Read this data set with its own sampler().")
        begin = time.perf_counter()
        epoch, slot = key
        index, skipped = slot, []
        for attempt in range(1, MAX_ATTEMPTS + 1):
            # The generator of the slot, not of the substitute: that image may come up in this epoch by itself.
            rng = sample_generator(self.seed, epoch, slot)
            try:
                sample = self.read(index, rng)
                break
            except ImageDecodeError as error:
                skipped.append(SkippedImage(self.item_name(index), str(error)))
            substitute = sample_generator(self.seed, epoch, slot, attempt)
            index = int(substitute.integers(len(self)))
        else:
            raise give_up(self.name, skipped)
        return complete_sample(self.make(sample, rng), index, skipped, begin)


class ImageViewDataset(SampleDataset):
    """Crops of the images of a source, by ``(epoch, index)``; a sample is what ``ViewPipeline.crop`` returns.

    Args:
        source: A source that is not streamed.
        pipeline: Crops, and draws what belongs to a sample.
        seed: Seed of the run.
    """

    def __init__(self, source: ImageSource, pipeline: ViewPipeline, seed: int) -> None:
        if source.streaming:
            raise ValueError(f"{source.name} is streamed. Use StreamingViewDataset, or load it with streaming=False.")
        super().__init__(source.name, len(source), seed)
        self.source, self.pipeline = source, pipeline

    def read(self, index: int, rng: np.random.Generator) -> Item:
        """Decode what is under one key."""
        return self.source.item(self.source.row(index), rng)

    def make(self, sample: Item, rng: np.random.Generator) -> dict[str, Any]:
        """Crop, and draw what belongs to this sample."""
        return self.pipeline.crop(sample, rng)

    def item_name(self, index: int) -> str:
        """Return the path of an image, or the data set and row."""
        return self.source.item_name(self.source.row(index), index)


def image_digest(content: bytes) -> int:
    """Compute the id of an image: 64 bits of BLAKE2b of its encoded bytes, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def complete_sample(sample: dict[str, Any], index: int, skipped: list[SkippedImage], begin: float) -> dict[str, Any]:
    """Add what a sample holds beside its views; ``begin`` is ``time.perf_counter()`` when its making began."""
    sample["index"], sample["skipped"], sample["seconds"] = index, skipped, time.perf_counter() - begin
    return sample


def give_up(source: str, skipped: list[SkippedImage]) -> ImageDecodeError:
    """Make the error of a source of which nothing decodes."""
    listed = "; ".join(f"{item.name} ({item.reason})" for item in skipped[:5])
    return ImageDecodeError(
        f"{source}: {len(skipped)} images in a row did not decode. The first: {listed}. "
        "Check that the column and the files really hold images."
    )
