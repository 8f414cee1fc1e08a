"""The data set of cropped views of a streamed source, divided among ranks and workers and resumed where it stood."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.asyn
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..views.pipelines import ViewPipeline
from .dataset import MAX_ATTEMPTS, SkippedImage, complete_sample, give_up, image_digest
from .errors import ImageDecodeError, ImageSourceError
from .positions import StreamLayout, StreamPosition, StreamStart, read_start, write_positions
from .randomness import order_generator, sample_generator
from .shards import ShardRow, digest, divide, list_shards, piece_rows, read_amplification, shuffle
from .sources import ImageSource

__all__ = ["StreamingViewDataset"]

# After so many passes without a row a worker of an endless stream gives up; before, the next may bring it some.
_EMPTY_PASSES = 8
# Shards read more often than this by all readers together are worth a word.
_MUCH_READING = 1.3


class StreamingViewDataset(IterableDataset[dict[str, Any]]):
    """Crops of the images of a streamed source.

    The sample's id is a digest of its encoded bytes: its views depend on (seed, epoch, image), not on workers or ranks;
    which images share a batch does.

    **Epochs.** In each epoch the shards are put in a new order and divided anew among all workers of all ranks
    (``shards.divide``), so that every row has one reader. Readers have equal shares, however many shards there are, if
    shards have as many rows, and more rows than there are readers. A shard that several readers share is read by each
    of them (``reading_note``). Each worker then draws from a buffer; shards are read one after the other, so they
    should have been written in random order. By default the stream goes on when it ends, one epoch later, each worker
    for itself: nobody waits, and where shares are unequal some workers begin the next epoch a little earlier.
    ``Trainer`` then needs ``max_steps``; schedules have an epoch length of their own (``epoch_steps``).

    **Resuming.** Each sample says where its worker stood (``position``). ``note_batch`` takes note of a batch that
    training has used, ``save_positions`` writes the notes of this rank into a checkpoint, and ``load_positions`` lets
    the next pass go on there, with the same batches bit for bit. Shards that are behind are not opened; rows that lie
    in the buffer, and those before them in their shard, are read once more, and no image of the past is decoded.

    Do not let accelerate divide or dispatch the loader again: leave it unprepared, or prepare it as for one process.

    Args:
        source: A source loaded with ``streaming=True``.
        pipeline: Crops, and says how many draws a sample carries.
        seed: Seed of the run.
        shuffle_buffer: Encoded images among which each worker draws the next. 0 keeps everything in order.
        rank, world_size: This process among those that share the stream.
        repeat: Whether to start again when the stream ends.

    Raises:
        ValueError: The source is not streamed, or ``rank`` is not below ``world_size``.
        ImageSourceError: A shard cannot be read.
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
            raise ValueError(f"{source.name} is not streamed. Use ImageViewDataset, or load it with streaming=False.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to world_size - 1 = {world_size - 1}.")
        self.source, self.pipeline, self.seed, self.repeat = source, pipeline, seed, repeat
        self.shuffle_buffer, self.rank, self.world_size = shuffle_buffer, rank, world_size
        self.shards = list_shards(source, world_size)
        self._digest = digest(self.shards)
        # In shared memory: workers that persist across epochs hold their own copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._start = StreamStart()
        self._consumed: dict[int, StreamPosition] = {}
        self._last_worker = -1

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; reaches workers that already run."""
        self._epoch.fill_(epoch)

    def reading_note(self, num_workers: int) -> str | None:
        """Say in a line if files are read much more often than once per epoch, because too many readers share them."""
        readers = self.world_size * max(1, num_workers)
        times = read_amplification(len(self.shards), readers)
        if times <= _MUCH_READING or not self.source.files:  # a list of paths costs nothing to read
            return None
        return (
            f"note: {len(self.shards)} shards for {self.world_size} processes x {max(1, num_workers)} workers: each "
            f"shard is read {times:.1f} times per epoch, as workers that share one read it whole. Write a multiple of "
            f"{readers} shards, or more than {4 * readers}, or use fewer workers."
        )

    # ---- positions ----

    def note_batch(self, position: StreamPosition) -> None:
        """Take note of a batch that training has used; ``position`` is that of its last sample."""
        self._consumed[position.worker] = position
        self._last_worker = position.worker

    def save_positions(self, folder: Path, num_workers: int) -> None:
        """Write where this rank stands into a checkpoint: ``data_position-<rank>.json``."""
        turn = (self._last_worker + 1) % max(1, num_workers)
        write_positions(folder, self.rank, self._layout(num_workers), self._start.epoch, turn, self._consumed)

    def load_positions(self, folder: Path | None, num_workers: int) -> None:
        """Let the next pass go on where a checkpoint stands; ``None``: at the beginning.

        With other ranks, workers, shards, buffer or seed it begins the next epoch, with a warning.

        Raises:
            ValueError: The files are damaged.
        """
        self._start = StreamStart() if folder is None else read_start(folder, self.rank, self._layout(num_workers))
        self._consumed = {position.worker: position for position in self._start.positions}
        self._last_worker = self._start.turn - 1
        self.set_epoch(self._start.epoch)

    def _layout(self, num_workers: int) -> StreamLayout:
        workers = max(1, num_workers)
        return StreamLayout(
            self.world_size, workers, len(self.shards), self.shuffle_buffer, self.seed, files=self._digest
        )

    # ---- samples ----

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield samples as ``ImageViewDataset`` makes them, with ``position``; ``index`` is the digest.

        Raises:
            ImageDecodeError: Too many files in a row do not decode.
            ImageSourceError: A shard cannot be read, or there is not one row for this worker.
        """
        info = get_worker_info()
        workers, number = (info.num_workers, info.id) if info else (1, 0)
        if info:
            fsspec.asyn.reset_lock()  # a lock taken when this process was forked would never be free
        worker = (number + self._start.turn) % workers  # the loader asks number 0 first
        start = self._start.of(worker)
        epoch = start.epoch if start else int(self._epoch)
        skipped: list[SkippedImage] = []
        empty = 0
        while True:
            good, begin = 0, time.perf_counter()
            for read, position in self._one_pass(epoch, worker, workers, start):
                row = read.content
                try:
                    content = self.source.content(row)
                    digest = image_digest(content)
                    rng = sample_generator(self.seed, epoch, digest)
                    item = self.source.item(row, rng, content)
                except ImageDecodeError as error:
                    name = self.source.item_name(row, f"{self.shards[read.shard].name}, row {read.number}")
                    skipped.append(SkippedImage(name, str(error)))
                    if len(skipped) >= MAX_ATTEMPTS:
                        raise give_up(self.source.name, skipped) from error
                    continue
                sample = self.pipeline.crop(item, rng)
                sample = complete_sample(sample, digest, skipped, begin)
                yield sample | {"position": position}
                good, skipped, begin = good + 1, [], time.perf_counter()
            if skipped and not good and not start:
                raise give_up(self.source.name, skipped)
            if not self.repeat:
                return
            empty = 0 if good or start else empty + 1
            if empty == _EMPTY_PASSES:
                raise ImageSourceError(
                    f"{self.source.name}: no image is left for worker {worker} of rank {self.rank}. There are fewer "
                    f"than {self.world_size} processes x {workers} workers. Set dataloader_num_workers lower."
                )
            epoch, start = epoch + 1, None

    def _one_pass(
        self, epoch: int, worker: int, workers: int, start: StreamPosition | None
    ) -> Iterator[tuple[ShardRow, StreamPosition]]:
        """Yield the rows of one worker of this rank in the epoch's order, each with the position behind it."""
        readers, reader = self.world_size * workers, self.rank * workers + worker
        own = order_generator(self.seed, epoch, 1 + reader)
        order = list(range(len(self.shards)))
        if self.shuffle_buffer:
            common = order_generator(self.seed, epoch)
            order = common.permutation(len(order)).tolist()
            # Each epoch brings a reader other rows, of a shard that many share, too.
            reader = int(common.permutation(readers)[reader])
        pieces = divide(order, readers, reader)
        if self.shuffle_buffer:
            # Otherwise all readers would end with the shards that they share.
            pieces = [pieces[place] for place in own.permutation(len(pieces))]
        starts = start.starts if start else ()

        def rows_from(first: int) -> Iterator[ShardRow]:
            nonlocal starts  # a new tuple: positions on their way to the training process hold the old one
            number = max((place for place, begin in enumerate(starts) if begin <= first), default=0)
            row = first
            for place in range(number, len(pieces)):
                if place == len(starts):
                    starts = (*starts, row)
                for content in piece_rows(self.shards, pieces[place], readers, row - starts[place]):
                    row += 1
                    yield content

        stood = (start.read, start.given) if start else (0, 0)
        for row, read, given in shuffle(rows_from, max(1, self.shuffle_buffer), own, *stood):
            yield row, StreamPosition(worker, epoch, read, given, starts)
