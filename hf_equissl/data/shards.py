"""The shards of a stream: who reads which rows in an epoch, and in which order they leave the buffer."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np

from .errors import ImageSourceError
from .sources import ImageSource

logger = logging.getLogger(__name__)
# With fewer files than this for each rank, parquet files are cut at their row groups.
FILES_PER_RANK = 16
# Number of rows that are fetched together: few, because a worker holds them encoded beside its buffer.
_ROWS_AT_ONCE = 8
_DRAWS_AT_ONCE = 1024
# Files whose row groups are looked up at a time: they stand at a file's end, a round trip or more away.
_FOOTERS_AT_ONCE = 16
# How often a remote shard is opened again when its connection breaks, and the first pause in seconds, which doubles.
_REOPENINGS = 5
_PAUSE = 1.0

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Shard:
    """Rows that are read one after the other: a file, or a part of one.

    Attributes:
        source: All files.
        file, files: Number of the file, and how many there are.
        part, parts: Number of the part, and how many the file has.
        row_groups: For a file with parts, a stream whose shards they are, so that the file's end is read once.
    """

    source: ImageSource
    file: int
    files: int
    part: int = 0
    parts: int = 1
    row_groups: datasets.IterableDataset | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The file, where its name is known, and the part."""
        paths = self.source.files
        name = paths[self.file] if paths else f"{self.source.name}, shard {self.file + 1} of {self.files}"
        return name if self.parts == 1 else f"{name}, row group {self.part}"

    def rows(self, first: int = 0) -> Iterator[dict[str, Any]]:
        """Yield rows from number ``first`` on. Those before it are read, too, and passed over.

        A remote file whose connection broke is opened again a few times, and goes on behind the last row.

        Raises:
            ImageSourceError: The shard cannot be read; it is named.
        """
        for opened in itertools.count():
            try:
                for row in self._rows(first):
                    first += 1
                    yield row
                return
            except MemoryError:
                raise
            except Exception as error:  # Readers of every format raise their own.
                if not _is_disconnected(error) or "://" not in self.name or opened == _REOPENINGS:
                    raise _explain_unreadable(self.name, error) from error
                pause = _PAUSE * 2**opened
                logger.warning(f"{self.name}: {error}. It is opened again at row {first}, in {pause:.0f} s.")
                time.sleep(pause)

    def _rows(self, first: int) -> Iterator[dict[str, Any]]:
        _check_end(self.name)
        if self.row_groups is None:
            stream = _open(self.source, self.file)
        else:
            stream = self.row_groups.shard(self.parts, self.part)
        if first:
            stream = stream.skip(first)
        # Not iter(stream): that would divide the rows among the workers of a DataLoader once more.
        for batch in stream.iter(_ROWS_AT_ONCE):
            yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


def _is_disconnected(error: Exception) -> bool:
    """Whether another try may help: readers of addresses call a server that is away a missing file, too."""
    cause = error.__cause__
    away = isinstance(error, FileNotFoundError) and cause is not None and not isinstance(cause, FileNotFoundError)
    return away or isinstance(error, (ConnectionError, TimeoutError))


def list_shards(source: ImageSource, ranks: int) -> list[Shard]:
    """List the shards of a stream: its files, or their row groups where few parquet files are read by many ranks.

    Raises:
        ImageSourceError: A file whose row groups are asked for cannot be read; it is named.
    """
    files = source.dataset.num_shards
    whole = [Shard(source, file, files) for file in range(files)]
    if files >= FILES_PER_RANK * ranks:
        return whole
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        cut = list(pool.map(_cut, whole, _each_file(source.dataset)))
    return [shard for parts in cut for shard in parts]


def _each_file(rows: datasets.IterableDataset) -> Iterator[datasets.IterableDataset]:
    """Yield the files of a stream one by one; in two steps, because taking one of n costs n."""
    groups = 1 + math.isqrt(rows.num_shards - 1)
    for number in range(groups):
        group = rows.shard(groups, number)
        yield from (group.shard(group.num_shards, file) for file in range(group.num_shards))


def _cut(shard: Shard, rows: datasets.IterableDataset) -> list[Shard]:
    """Cut a file into its row groups; return the file itself where it has one, or none."""
    try:
        row_groups = rows.reshard()
    except Exception as error:
        raise _explain_unreadable(shard.name, error) from error
    parts = row_groups.num_shards
    if parts == 1:
        return [shard]
    return [Shard(shard.source, shard.file, shard.files, part, parts, row_groups) for part in range(parts)]


def digest(shards: Sequence[Shard]) -> str:
    """Compute a digest of which shards these are, and of their order: of parts, and of files by name without folder."""
    total = hashlib.blake2b(digest_size=8)
    for source_digest in dict.fromkeys(shard.source.digest for shard in shards):
        total.update(source_digest.encode())
    for shard in shards:
        total.update(f" {shard.file} {shard.part}/{shard.parts}".encode())
    return total.hexdigest()


def _check_end(path: str) -> None:
    """Refuse a tar file on this machine that was cut off: between two members its reader takes that for the end."""
    if not path.endswith(".tar") or "://" in path:
        return
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size % tarfile.BLOCKSIZE:
            raise ValueError(f"{size} bytes are no whole number of blocks, it was cut off")
        file.seek(max(0, size - tarfile.BLOCKSIZE))
        if any(file.read()):
            raise ValueError("it lacks the empty blocks that end a tar file, it was cut off or never closed")


def _open(source: ImageSource, file: int) -> datasets.IterableDataset:
    return source.dataset.shard(source.dataset.num_shards, file)


def _explain_unreadable(name: str, error: Exception) -> ImageSourceError:
    return ImageSourceError(
        f"{name} cannot be read: {type(error).__name__}: {error}. Check that it is complete; fetch or write it again, "
        "or take it out of the data set."
    )


class Piece(NamedTuple):
    """A reader's rows of a shard: those whose number modulo the number of readers lies in [low, high)."""

    shard: int
    low: int
    high: int


def divide(order: Sequence[int], readers: int, reader: int) -> list[Piece]:
    """List one reader's pieces of shards, such that every row has exactly one reader.

    Whole shards as long as there is one for each reader. Those left over are fewer than readers: each reader gets the
    same share of them, by row numbers, of at most two shards, which it shares with others that read them, too. Rows
    are not divided, so shares are equal up to a row for each piece: of a shard with fewer rows than readers some get
    none.

    Args:
        order: Numbers of the shards, the same on all readers.
        readers, reader: How many read, and which of them this is.
    """
    whole = len(order) - len(order) % readers
    pieces = [Piece(shard, 0, readers) for shard in order[reader:whole:readers]]
    rest = order[whole:]
    begin, end = reader * len(rest), (reader + 1) * len(rest)  # a shard is ``readers`` long
    for number, shard in enumerate(rest):
        low, high = max(0, begin - number * readers), min(readers, end - number * readers)
        if low < high:
            pieces.append(Piece(shard, low, high))
    return pieces


def read_amplification(shards: int, readers: int) -> float:
    """Compute how many readers read a shard, on average: each one that has a piece of it reads it whole.

    1 where readers divide the shards; more than ``readers / shards`` where there are fewer shards.
    """
    # Laid end to end, rows are cut ``readers - 1`` times, where a reader's share ends; some cuts fall between shards.
    return 1 + (readers - math.gcd(shards, readers)) / shards


class ShardRow(NamedTuple):
    """A row, and where it lies: the number of its shard, and its own number there."""

    content: dict[str, Any]
    shard: int
    number: int


def piece_rows(shards: Sequence[Shard], piece: Piece, readers: int, first: int = 0) -> Iterator[ShardRow]:
    """Read the rows of a piece, from its own row number ``first`` on."""
    rounds, rest = divmod(first, piece.high - piece.low)
    begin = rounds * readers + piece.low + rest
    for number, row in enumerate(shards[piece.shard].rows(begin), begin):
        if piece.low <= number % readers < piece.high:
            yield ShardRow(row, piece.shard, number)


def shuffle(
    rows_from: Callable[[int], Iterator[_Row]], size: int, rng: np.random.Generator, read: int = 0, given: int = 0
) -> Iterator[tuple[_Row, int, int]]:
    """Yield rows in a random order, as far as a buffer of ``size`` rows allows: each is drawn from the next ``size``.

    Which row lies where in the buffer follows from ``rng`` alone. To go on where it stood, its rows are read once more:
    those back to the oldest that is still there, about ``size`` x (ln(size) + 1) rows.

    Args:
        rows_from: Yields rows in their own order, from a number on.
        size: Rows in the buffer. 1 keeps their own order.
        rng: A fresh generator, whether one goes on or begins.
        read, given: Rows that were read and rows that were given back before, where one goes on.

    Yields:
        A row, and ``read`` and ``given`` with it.
    """
    places = _draws(rng, size)
    drawn = max(0, read - size)
    held = np.arange(min(size, read))  # the number of the row in each place
    # Of several draws of one place the last one counts.
    held[np.fromiter(itertools.islice(places, drawn), np.int64, drawn)] = size + np.arange(drawn)
    oldest = int(held.min(initial=read))
    wanted = set(held.tolist())
    rows = rows_from(oldest)
    again = {number: row for number, row in zip(range(oldest, read), rows, strict=False) if number in wanted}
    buffer = [again.pop(number) for number in held.tolist()]
    for row in rows:
        read += 1
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = next(places)
        given += 1
        yield buffer[place], read, given
        buffer[place] = row
    last = max(0, read - size)
    for place in rng.permutation(len(buffer))[given - last :]:
        given += 1
        yield buffer[place], read, given


def _draws(rng: np.random.Generator, size: int) -> Iterator[int]:
    """Draw from [0, size) without end, in blocks: one by one would be slow."""
    while True:
        yield from rng.integers(size, size=_DRAWS_AT_ONCE).tolist()
