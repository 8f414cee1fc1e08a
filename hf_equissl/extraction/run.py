"""Extract features: every process computes whole shards; processes meet only at the beginning and at the end."""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from ..data.throughput import DataWait
from .pipeline import Result, attach_features
from .reading import Batch, Shard, image_batches
from .record import check_bad_share
from .settings import ExtractionError
from .shards import INDEX, LABEL, NAME, ParquetShard, SafetensorsShard, open_shard, remove_leftovers
from .work import Extraction

logger = logging.getLogger(__name__)

# Batches of features that may wait for the disk.
_QUEUE = 4


@dataclass
class Share:
    """The work of one process.

    Attributes:
        images: Number of images whose features it has made.
        seconds: Time from the first image asked for to the last shard on disk.
        skipped: Images that do not decode, as ``name: reason``.
        data_wait: Share of the time in which the encoder stood still for its images.
    """

    images: int = 0
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)
    data_wait: float = 0.0

    @property
    def speed(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0


def extract(work: Extraction, shards: list[Shard], *, num_workers: int, progress: bool, title: str) -> Share:
    """Compute and write some shards.

    Args:
        work: The extraction.
        shards: This process's share of them.
        num_workers: Processes that decode.
        progress: Whether to show a bar.
        title: Title of the bar.

    Raises:
        ExtractionError: It cannot go on; what is whole is kept.
    """
    share, begun = Share(), time.perf_counter()
    if not shards:
        return share
    batches = image_batches(
        work.source,
        work.preprocessing,
        shards,
        batch_size=work.settings.batch_size,
        num_workers=num_workers,
        pin_memory=work.encoder.device.type == "cuda",
        limit=work.settings.limit,
    )
    total = None if work.images is None else sum((shard.stop or 0) - shard.start for shard in shards)
    files, wait = _Files(work), DataWait(work.encoder.device)
    waiting: deque[Future[None]] = deque()
    # One thread writes while the encoder computes the next batches.
    with (
        tqdm(total=total, unit="img", desc=title, disable=not progress, smoothing=0.05) as bar,
        ThreadPoolExecutor(1) as writer,
    ):
        try:
            for batch, made in attach_features(wait.over(batches), lambda batch: _begin(work, batch)):
                waiting.append(writer.submit(files.add, batch, made))
                while len(waiting) > _QUEUE:
                    waiting.popleft().result()
                share.images += len(batch.index)
                _report(work, share, batch)
                bar.update(len(batch.index) + len(batch.skipped))
            elapsed, waited = wait.take()
            share.data_wait = waited / elapsed if elapsed else 0.0
            for write in waiting:
                write.result()
        except BaseException as error:
            writer.submit(remove_leftovers, work.folder, work.settings.split_name, own=True)
            if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
                raise ExtractionError(
                    f"a process that decodes images was killed ({str(error).splitlines()[0]}), as the system does when "
                    "memory runs out: lower --num_workers or --batch_size. The same command goes on."
                ) from error
            raise
    share.seconds = time.perf_counter() - begun
    return share


def _begin(work: Extraction, batch: Batch) -> Result:
    return (lambda: {}) if batch.pixels is None else work.begin(batch.pixels)


class _Files:
    """The shards that are being written; of a stream, there may be several at a time."""

    def __init__(self, work: Extraction) -> None:
        self.work = work
        self._columns = work.columns
        self._open: dict[int, ParquetShard | SafetensorsShard] = {}
        self._records: dict[int, dict[str, Any]] = {}

    def add(self, batch: Batch, made: dict[str, Tensor]) -> None:
        """Append one batch to its shard, and finish the shard where it is the last."""
        try:
            self._add(batch, made)
        except OSError as error:
            done = len(self.work.shards) - len(self.work.list_remaining())
            raise ExtractionError(
                f"{self.work.path(self.work.shards[batch.shard])} cannot be written ({error.strerror or error}). "
                f"{done} of {len(self.work.shards)} shards are whole and kept; when there is room, the same command "
                "goes on."
            ) from error

    def _add(self, batch: Batch, made: dict[str, Tensor]) -> None:
        number = batch.shard
        if number not in self._open:
            self._open[number] = open_shard(self.work.path(self.work.shards[number]), self._columns)
            self._records[number] = {"extraction": self.work.digest, "shard": number, "rows": 0, "skipped": []}
        record = self._records[number]
        if batch.index:
            columns: dict[str, Any] = {INDEX: np.array(batch.index), NAME: batch.names}
            columns |= {name: value.numpy() for name, value in made.items()}
            if LABEL in self._columns:
                columns[LABEL] = batch.labels
            self._open[number].add(columns)
        record["rows"] += len(batch.index)
        record["skipped"] += batch.skipped
        if batch.last:
            self._open.pop(number).close(self._records.pop(number))


def _report(work: Extraction, share: Share, batch: Batch) -> None:
    for _, name, reason in batch.skipped:
        share.skipped.append(f"{name}: {reason}")
        logger.warning("Skipped %s: %s", name, reason)
    if batch.skipped and work.images is not None:  # a stream has no known length: its share is judged at the end
        check_bad_share(work, len(share.skipped), work.images, share.skipped)


def summarise(work: Extraction, shares: list[Share], num_workers: int) -> dict[str, Any] | None:
    """Sum up speed and settings of one command for the record; ``None`` where it had nothing to do."""
    images = sum(share.images for share in shares)
    if not images:
        return None
    seconds = max(share.seconds for share in shares)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": len(shares),
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 2),
        "images_per_second_of_processes": [round(share.speed, 2) for share in shares],
        "data_wait": round(max(share.data_wait for share in shares), 4),
        "batch_size": work.settings.batch_size,
        "num_workers": num_workers,
        "device": work.encoder.device.type,
    }
