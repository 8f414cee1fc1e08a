"""How fast training goes, and whether it waits for its data: logged beside each loss."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from transformers.utils import logging

from ..distributed.collectives import gather, is_main_process

logger = logging.get_logger(__name__)
# The only entries of a log line that the clock decides: a resumed run repeats all others.
LOG_KEYS = ("images_per_second", "data_wait", "loader_images_per_second")
# Share of the time above which waiting is worth a word, and log lines in a row above it that are worth a warning.
NOTABLE_WAIT = 0.1
PATIENCE = 3
T = TypeVar("T")


class DataWait:
    """Measures for how long a device stands still for its data, from the first batch on.

    On an accelerator, which works on while the host already asks for the next batch, only the time counts in which the
    device had nothing left to do: that between an event before the request and one after it.

    Args:
        device: Device that the data are for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begin: float | None = None
        self._waited = 0.0
        self._events: deque[tuple[torch.Event, torch.Event]] = deque()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure a request for data. The first, for which workers start, is not counted."""
        before, start = self._event(), time.perf_counter()
        yield
        after, end = self._event(), time.perf_counter()
        if self._begin is None:
            self._begin = end
        elif before is not None and after is not None:
            self._events.append((before, after))
            self._collect()
        else:
            self._waited += end - start

    def over(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the same batches, and measure the time for which each is waited for."""
        source = iter(batches)
        while True:
            with self.waiting():
                batch = next(source, None)
            if batch is None:
                return
            yield batch

    def take(self) -> tuple[float, float]:
        """Return the seconds since the last call or the first batch, and those of waiting in them; begin anew.

        It waits for the device to pass the last request: call it when the result of the last batch was read.
        """
        if self._events:
            self._events[-1][1].synchronize()
        now = time.perf_counter()
        self._collect()
        elapsed, waited = 0.0 if self._begin is None else now - self._begin, self._waited
        self._begin, self._waited = now, 0.0
        return elapsed, waited

    def _event(self) -> torch.Event | None:
        if self.device.type == "cpu":
            return None
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def _collect(self) -> None:
        """Add up the times between events that the device has passed, which would pile up."""
        while self._events and self._events[0][1].query():
            before, after = self._events.popleft()
            self._waited += before.elapsed_time(after) / 1000


class Throughput(DataWait):
    """Counts between two log lines. Nothing is exchanged between processes, nor the device waited for, in between.

    Args:
        device: Device that trains.
        workers: ``dataloader_num_workers``.
    """

    def __init__(self, device: torch.device, workers: int) -> None:
        super().__init__(device)
        self.workers = workers
        self._waits_in_a_row, self._warned = 0, False
        self._images, self._loader_seconds = 0, 0.0

    def add(self, images: int, seconds: float) -> None:
        """Count one batch that is trained on, for which a worker was busy for ``seconds``."""
        self._images += images
        self._loader_seconds += seconds

    def drain(self) -> dict[str, float]:
        """Compute rates since the last call, for a log line. All processes call it, after the step's loss was read.

        Returns:
            ``images_per_second``: trained on by all processes, with everything that happens between two log lines.
            ``data_wait``: share of that time in which training stood still for its data; of the process that waited
            longest, as the others wait for it.
            ``loader_images_per_second``: what all workers together could deliver.
        """
        if self._begin is None or not self._images:
            return {}
        elapsed, waited = self.take()
        loader = self._images * max(1, self.workers) / max(self._loader_seconds, 1e-9)
        here = torch.tensor([[self._images / elapsed, waited / elapsed, loader]], device=self.device)
        with torch.no_grad():
            rate, wait, capacity = gather(here).unbind(1)
        values = rate.sum().item(), wait.max().item(), capacity.sum().item()
        self._images, self._loader_seconds = 0, 0.0
        self._warn(*values)
        return dict(zip(LOG_KEYS, values, strict=True))

    def _warn(self, rate: float, wait: float, capacity: float) -> None:
        """Warn once, when the wait persists."""
        self._waits_in_a_row = self._waits_in_a_row + 1 if wait > NOTABLE_WAIT else 0
        if self._warned or self._waits_in_a_row < PATIENCE:
            return
        self._warned = True
        if not is_main_process():
            return
        logger.warning(
            f"Training stood still for its data {wait:.0%} of the time since the last log line: it makes {rate:.0f} "
            f"images/s, and the loader can deliver {capacity:.0f}. {'Raise' if self.workers else 'Set'} "
            f"dataloader_num_workers (now {self.workers} in each process; this machine has {os.cpu_count()} cores), "
            "store smaller images, or put them nearer."
        )
