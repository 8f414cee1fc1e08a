"""Where the readers of a stream stand, kept in checkpoints so that a resumed run sees the rows that come next."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)
_FILE = "data_position-{rank}.json"


class StreamPosition(NamedTuple):
    """Where one worker stood when it had made a sample.

    Attributes:
        worker: Number of the worker among those of its rank.
        epoch: Epoch of its pass.
        read: Number of rows of the pass that it had read.
        given: Number of rows that had left its buffer, with this sample's.
        starts: Number of the first row of each piece of a shard that it had begun.
    """

    worker: int
    epoch: int
    read: int
    given: int
    starts: tuple[int, ...]


@dataclass(frozen=True)
class StreamLayout:
    """What decides who reads which row when: positions hold for the same layout only.

    Attributes:
        ranks: Processes that share the stream.
        workers: Workers of each process, which counts as one itself where it has none.
        shards: Number of files, or of parts of files.
        shuffle_buffer: Rows in the buffer.
        seed: Seed of the order.
        files: Digest of the names of the shards, in their order.
    """

    ranks: int
    workers: int
    shards: int
    shuffle_buffer: int
    seed: int
    files: str = ""

    def __str__(self) -> str:
        """Say it in one line, for people."""
        return (
            f"{self.ranks} processes x {self.workers} workers, {self.shards} shards, shuffle_buffer "
            f"{self.shuffle_buffer}, seed {self.seed}"
        )


@dataclass(frozen=True)
class StreamStart:
    """Where a stream begins.

    Attributes:
        epoch: Epoch of workers without a position.
        turn: The worker whose batch comes first.
        positions: Where each worker stood that had begun.
    """

    epoch: int = 0
    turn: int = 0
    positions: tuple[StreamPosition, ...] = ()

    def of(self, worker: int) -> StreamPosition | None:
        """Return the position of a worker; ``None`` where it has none."""
        return next((position for position in self.positions if position.worker == worker), None)


def write_positions(
    folder: Path, rank: int, layout: StreamLayout, epoch: int, turn: int, positions: dict[int, StreamPosition]
) -> None:
    """Write one rank's file into a checkpoint. Workers without a position are in ``epoch``."""
    plain: dict[str, Any] = {"layout": asdict(layout), "epoch": epoch, "turn": turn}
    plain["workers"] = [positions[worker]._asdict() for worker in sorted(positions)]
    (folder / _FILE.format(rank=rank)).write_text(json.dumps(plain) + "\n", encoding="utf-8")


def read_start(folder: Path, rank: int, layout: StreamLayout) -> StreamStart:
    """Find where ``rank`` goes on.

    With another layout no row can be found again. Then all ranks begin the epoch after the latest one that any worker
    had begun, with a warning: what was not seen of the epochs before is left out, and nothing is seen twice in one.

    Raises:
        ValueError: A file is damaged.
    """
    files = sorted(folder.glob(_FILE.format(rank="*")))
    if not files:
        _warn(rank, f"{folder} does not say where its stream stood. It begins with epoch 1.")
        return StreamStart(epoch=1)
    try:
        saved = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
        own = saved.get(_FILE.format(rank=rank))
        written = StreamLayout(**next(iter(saved.values()))["layout"])
        if own is not None and written == layout:
            positions = (StreamPosition(**each | {"starts": tuple(each["starts"])}) for each in own["workers"])
            return StreamStart(own["epoch"], own["turn"], tuple(positions))
        epochs = [worker["epoch"] for ranks in saved.values() for worker in (ranks, *ranks["workers"])]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: {_FILE.format(rank='*')} cannot be read ({error}).") from error
    epoch = 1 + max(epochs)
    others = " The files differ: in names, order or number." if written.files != layout.files else ""
    _warn(
        rank,
        f"{folder}: the stream was read by {written}; this run has {layout}.{others} It goes on with epoch {epoch}, "
        f"and images of epoch {epoch - 1} that were not seen yet are left out. To go on exactly where it stood, start "
        f"{written.ranks} processes with --training.dataloader_num_workers {written.workers}, on the same data.",
    )
    return StreamStart(epoch=epoch)


def _warn(rank: int, message: str) -> None:
    if rank == 0:
        logger.warning(message)
