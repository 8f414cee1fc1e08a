"""Data sets of cropped views for a DataLoader, and the order in which they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Sampler

from hf_equissl.views.pipelines import ViewPipeline

from .decoding import decode_image
from .errors import ImageDecodeError
from .randomness import order_generator, sample_generator
from .sources import ImageSource

__all__ = ["EpochSampler", "ImageViewDataset", "SkippedImage", "StreamingViewDataset"]

# Substitutes that are tried for one bad file before the data set is given up.
MAX_ATTEMPTS = 20

_Row = TypeVar("_Row")


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
        num_samples: Rows.
        seed: Of the run.
        shuffle: A new order each epoch, or row order.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Samples per epoch."""
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """One pass, in the epoch that was set when it began."""
        epoch = self.epoch
        if self.shuffle:
            order = order_generator(self.seed, epoch).permutation(self.num_samples)
        else:
            order = np.arange(self.num_samples)
        return ((epoch, index) for index in order.tolist())


class ImageViewDataset(Dataset[dict[str, Any]]):
    """Crops of the images of a source, by ``(epoch, index)``.

    The views of image i in epoch e depend on (seed, e, i) alone. An image that does not decode is replaced by another,
    drawn from (seed, epoch, index, attempt), and reported under ``skipped``.

    Args:
        source: A source that is not streamed.
        pipeline: Crops, and says how many draws a sample carries.
        seed: Of the run.
    """

    def __init__(self, source: ImageSource, pipeline: ViewPipeline, seed: int) -> None:
        if source.streaming:
            raise ValueError(f"{source.name} is streamed. Use StreamingViewDataset, or load it with streaming=False.")
        self.source, self.pipeline, self.seed = source, pipeline, seed
        self._samplers: list[EpochSampler] = []

    def __len__(self) -> int:
        """Images."""
        return len(self.source)

    def sampler(self, shuffle: bool = True) -> EpochSampler:
        """A sampler over this data set that follows ``set_epoch``."""
        sampler = EpochSampler(len(self), self.seed, shuffle)
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
        """One sample for ``ViewCollator``.

        Returns:
            What ``ViewPipeline.crop`` returns, ``draws`` (n,), ``index`` (of the image that is shown), ``skipped`` and,
            where the source has labels, ``label``.

        Raises:
            ImageDecodeError: Neither this image nor any of the substitutes decodes.
        """
        if not isinstance(key, tuple):
            raise TypeError(f"Expected (epoch, index), got {key!r}. Read this data set with its own sampler().")
        epoch, slot = key
        index, skipped = slot, []
        for attempt in range(1, MAX_ATTEMPTS + 1):
            row = self.source.row(index)
            try:
                image = decode_image(self.source.content(row))
                break
            except ImageDecodeError as error:
                skipped.append(SkippedImage(self.source.item_name(row, index), str(error)))
            substitute = sample_generator(self.seed, epoch, slot, attempt)
            index = int(substitute.integers(len(self)))
        else:
            raise _hopeless(self.source.name, skipped)
        # The slot's generator, not the substitute's: that image may come up in this epoch on its own.
        sample = _crop(self.pipeline, image, sample_generator(self.seed, epoch, slot))
        return _complete(sample, index, self.source.label(row), skipped)


class StreamingViewDataset(IterableDataset[dict[str, Any]]):
    """Crops of the images of a streamed source.

    The sample's id is a digest of its encoded bytes: its views depend on (seed, epoch, image), not on workers or ranks;
    which images share a batch does. Shards are divided among ranks here and among workers by ``datasets``; where ranks
    do not divide the number of shards, every rank reads all shards and keeps its share of the images.

    By default the stream starts again when it ends, one epoch later: ranks with unequal shares never wait for each
    other, and a resumed run skips the batches that it has seen. ``Trainer`` then needs ``max_steps``. Do not let
    accelerate divide or dispatch the loader again: leave it unprepared, or prepare it as for one process.

    Args:
        source: A source loaded with ``streaming=True``.
        pipeline: Crops, and says how many draws a sample carries.
        seed: Of the run.
        shuffle_buffer: Encoded images among which each worker draws the next; the order of shards is shuffled, too, but
            shards are read one after the other: they should have been written in random order. 0: in order.
        rank, world_size: This process among those that share the stream.
        repeat: Start again when the stream ends.
    """

    def __init__(
        self,
        source: ImageSource,
        pipeline: ViewPipeline,
        seed: int,
        *,
        shuffle_buffer: int = 1024,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = True,
    ) -> None:
        if not source.streaming:
            raise ValueError(f"{source.name} is not streamed. Use ImageViewDataset, or load it with streaming=True.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to world_size - 1 = {world_size - 1}.")
        self.source, self.pipeline, self.seed, self.repeat = source, pipeline, seed, repeat
        self.shuffle_buffer, self.rank, self.world_size = shuffle_buffer, rank, world_size
        # In shared memory: workers that persist across epochs hold their own copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; reaches workers that already run."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples as from ``ImageViewDataset``; ``index`` is the digest.

        Raises:
            ImageDecodeError: Too many files in a row do not decode.
        """
        epoch = int(self._epoch)
        skipped: list[SkippedImage] = []
        while True:
            read = 0
            for row in self._one_pass(epoch):
                try:
                    content = self.source.content(row)
                    image = decode_image(content)
                except ImageDecodeError as error:
                    skipped.append(SkippedImage(self.source.item_name(row), str(error)))
                    if len(skipped) >= MAX_ATTEMPTS:
                        raise _hopeless(self.source.name, skipped) from error
                    continue
                read += 1
                digest = image_digest(content)
                sample = _crop(self.pipeline, image, sample_generator(self.seed, epoch, digest))
                yield _complete(sample, digest, self.source.label(row), skipped)
                skipped = []
            if read == 0 and skipped:
                raise _hopeless(self.source.name, skipped)
            # A worker without a shard ends here, too.
            if not self.repeat or read == 0:
                return
            epoch += 1

    def _one_pass(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Rows of this rank and worker, in the epoch's order."""
        # Made anew for each pass: its epoch lies in memory that processes forked from here would share.
        stream = split_dataset_by_node(self.source.dataset, self.rank, self.world_size)
        if not self.shuffle_buffer:
            yield from stream
            return
        # For datasets the "epoch" is the seed of the order of shards, the same on all ranks; 0 would be file order.
        stream.set_epoch(1 + int(order_generator(self.seed, epoch).integers(1 << 31)))
        # A buffer of our own: that of datasets comes before the division of images among ranks, which is only without
        # overlap if all ranks fill their buffers alike, and its threads sleep for five seconds after each pass.
        worker = torch.utils.data.get_worker_info()
        reader = 1 + self.rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        yield from _shuffled(stream, self.shuffle_buffer, order_generator(self.seed, epoch, reader))


def _shuffled(rows: Iterable[_Row], size: int, rng: np.random.Generator) -> Iterator[_Row]:
    """``rows`` in a random order, as far as a buffer of ``size`` rows allows."""
    buffer: list[_Row] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = row
    for place in rng.permutation(len(buffer)):
        yield buffer[place]


def image_digest(content: bytes) -> int:
    """The id of an image: 64 bits of BLAKE2b of its encoded bytes, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _crop(pipeline: ViewPipeline, image: Image.Image, rng: np.random.Generator) -> dict[str, Any]:
    draws = torch.from_numpy(rng.random(pipeline.num_draws, dtype=np.float32))
    return {**pipeline.crop(image, rng), "draws": draws}


def _complete(sample: dict[str, Any], index: int, label: int | None, skipped: list[SkippedImage]) -> dict[str, Any]:
    sample["index"], sample["skipped"] = index, skipped
    if label is not None:
        sample["label"] = label
    return sample


def _hopeless(source: str, skipped: list[SkippedImage]) -> ImageDecodeError:
    listed = "; ".join(f"{item.name} ({item.reason})" for item in skipped[:5])
    return ImageDecodeError(
        f"{source}: {len(skipped)} images in a row did not decode. The first: {listed}. "
        "Check that the column and the files really hold images."
    )
