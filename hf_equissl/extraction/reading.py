"""Read batches of pictures, each of one shard only, in an order that depends on nothing but the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..data import ImageSource
from ..data.shards import Shard as SourceShard
from ..utils.redaction import redact
from .preprocessing import Preprocessing
from .settings import ExtractionError


@dataclass(frozen=True)
class Shard:
    """A range of rows of the source; of a stream, one of the source's own shards, whose length is not known.

    Attributes:
        number: Number of the shard, from 0.
        start: First row; 0 for a stream.
        stop: One behind the last row; ``None`` for a stream.
    """

    number: int
    start: int = 0
    stop: int | None = None


@dataclass
class Batch:
    """Some images of one shard.

    Attributes:
        shard: Number of the shard.
        last: Whether the shard ends here.
        pixels: (b, 3, S, S), uint8 or normalised floats; ``None`` where no image decodes.
        index: Row of each image in the source; of a stream, in the source's shard.
        names: Path of each image as the source has it.
        labels: Class of each image; ``None`` where it has none.
        skipped: (row, name, reason) of images that do not decode.
    """

    shard: int
    last: bool
    pixels: Tensor | None
    index: list[int]
    names: list[str | None]
    labels: list[int | None]
    skipped: list[tuple[int, str, str]]

    def pin_memory(self) -> Batch:
        """Pin the pixels' memory; ``DataLoader(pin_memory=True)`` calls it."""
        if self.pixels is not None:
            self.pixels = self.pixels.pin_memory()
        return self


@dataclass(frozen=True)
class _Reader:
    source: ImageSource
    preprocessing: Preprocessing

    def batch(self, shard: int, rows: Iterable[tuple[int, Mapping[str, Any]]], last: bool) -> Batch:
        made = Batch(shard, last, None, [], [], [], [])
        pixels = []
        for index, row in rows:
            name = read_name(self.source, row)
            try:
                pixels.append(self.preprocessing(self.source.decode(self.source.content(row))))
            except (OSError, ValueError) as error:  # ImageDecodeError is one of them
                made.skipped.append((index, name or f"row {index}", str(error)))
                continue
            except MemoryError:
                raise
            except Exception as error:  # libraries that fetch images raise their own
                raise _explain_failure(f"{self.source.item_name(row, index)}, shard {shard},", error) from error
            made.index.append(index)
            made.names.append(name)
            made.labels.append(self.source.label(row))
        made.pixels = torch.stack(pixels) if pixels else None
        return made


class _Rows(Dataset[Batch]):
    """A source that is read by row; an item is a batch: (shard, first row, one behind the last, whether it is last)."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader

    def __getitem__(self, job: tuple[int, int, int, bool]) -> Batch:
        shard, start, stop, last = job
        return self.reader.batch(shard, ((index, self._row(index)) for index in range(start, stop)), last)

    def _row(self, index: int) -> Mapping[str, Any]:
        try:
            return self.reader.source.row(index)
        except Exception as error:  # the format's reader raises its own
            raise _explain_failure(f"{self.reader.source.name}, row {index},", error) from error


class _Stream(IterableDataset[Batch]):
    """A source that is streamed: every worker reads whole shards of the source."""

    def __init__(self, reader: _Reader, shards: Sequence[Shard], batch_size: int, limit: int | None) -> None:
        self.reader, self.shards, self.batch_size, self.limit = reader, shards, batch_size, limit

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for shard in self.shards[first::step]:
            rows = enumerate(stream_rows(self.reader.source, shard.number, self.limit))
            while table := list(islice(rows, self.batch_size)):
                yield self.reader.batch(shard.number, table, last=False)
            yield self.reader.batch(shard.number, (), last=True)


def _explain_failure(what: str, error: Exception) -> ExtractionError:
    return ExtractionError(
        f"{what} cannot be read: {type(error).__name__}: {error}. The same command goes on where it stopped; if this "
        "comes back, mend the image or take it out of the data."
    )


def stream_rows(source: ImageSource, number: int, limit: int | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of shard ``number`` of a streamed source; with a ``limit``, the first rows of the whole stream.

    Raises:
        ImageSourceError: A shard, which is named, cannot be read.
    """
    files = source.dataset.num_shards
    if limit is None:
        return SourceShard(source, number, files).rows()
    return islice(chain.from_iterable(SourceShard(source, file, files).rows() for file in range(files)), limit)


def read_name(source: ImageSource, row: Mapping[str, Any]) -> str | None:
    """Return the path of a row's image as the source has it, ``None`` where it has none."""
    value = row[source.image_column]
    path = value.get("path") if isinstance(value, Mapping) else value
    return redact(path) if isinstance(path, str) and path else None


def image_batches(
    source: ImageSource,
    preprocessing: Preprocessing,
    shards: Sequence[Shard],
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool = False,
    limit: int | None = None,
) -> Iterable[Batch]:
    """Read the images of some shards. Batches of a stream's shards may alternate, those of one shard come in order."""
    reader = _Reader(source, preprocessing)
    # A generator of its own: otherwise starting workers would draw a number from the caller's.
    options: dict[str, Any] = {"batch_size": None, "pin_memory": pin_memory, "generator": torch.Generator()}
    if source.streaming:
        workers = min(num_workers, len(shards))
        return DataLoader(_Stream(reader, shards, batch_size, limit), num_workers=workers, **options)
    jobs = [
        (shard.number, start, min(start + batch_size, shard.stop), start + batch_size >= shard.stop)
        for shard in shards
        if shard.stop is not None
        for start in range(shard.start, shard.stop, batch_size)
    ]
    sampler: Any = jobs
    return DataLoader(_Rows(reader), sampler=sampler, num_workers=min(num_workers, len(jobs)), **options)
