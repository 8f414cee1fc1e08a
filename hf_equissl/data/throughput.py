"""How fast training goes, and whether it waits for its data: logged beside each loss."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging

from ..distributed.collectives import gather, is_main_process

logger = logging.get_logger(__name__)
# The only entries of a log line that the clock decides: a resumed run repeats all others.
LOG_KEYS = ("images_per_second", "data_wait", "loader_images_per_second")
# Share of the time above which waiting is worth a word, and log lines in a row above it that are worth a warning.
NOTABLE_WAIT = 0.1
PATIENCE = 3


class Throughput:
    """Counts between two log lines. Nothing is exchanged between processes, nor the device waited for, in between.

    On an accelerator, which works on while the host already asks for the next batch, only the time counts in which the
    device had nothing left to do: that between an event before the request and one after it.

    Args:
        device: Where training runs.
        workers: ``dataloader_num_workers``.
    """

    def __init__(self, device: torch.device, workers: int) -> None:
        self.device, self.workers = device, workers
        self._begin: float | None = None
        self._waits_in_a_row, self._warned = 0, False
        self._clear()

    def _clear(self) -> None:
        self._images, self._loader_seconds, self._waited = 0, 0.0, 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the request for a step's batches. The first, for which workers start, is not counted."""
        before, start = self._event(), time.perf_counter()
        yield
        after, end = self._event(), time.perf_counter()
        if self._begin is None:
            self._begin = end
        elif before is not None and after is not None:
            self._events.append((before, after))
        else:
            self._waited += end - start

    def _event(self) -> torch.Event | None:
        if self.device.type == "cpu":
            return None
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def add(self, images: int, seconds: float) -> None:
        """Count one batch that is trained on, for which a worker was busy for ``seconds``."""
        self._images += images
        self._loader_seconds += seconds

    def drain(self) -> dict[str, float]:
        """Rates since the last call, for a log line. All processes have to call it, after the step's loss was read.

        Returns:
            ``images_per_second``: trained on by all processes, with everything that happens between two log lines.
            ``data_wait``: share of that time in which training stood still for its data; of the process that waited
            longest, as the others wait for it.
            ``loader_images_per_second``: what all workers together could deliver.
        """
        if self._begin is None or not self._images:
            return {}
        now = time.perf_counter()
        elapsed = now - self._begin
        waited = self._waited + sum(before.elapsed_time(after) for before, after in self._events) / 1000
        loader = self._images * max(1, self.workers) / max(self._loader_seconds, 1e-9)
        here = torch.tensor([[self._images / elapsed, waited / elapsed, loader]], device=self.device)
        with torch.no_grad():
            rate, wait, capacity = gather(here).unbind(1)
        values = rate.sum().item(), wait.max().item(), capacity.sum().item()
        self._begin = now
        self._clear()
        self._warn(*values)
        return dict(zip(LOG_KEYS, values, strict=True))

    def _warn(self, rate: float, wait: float, capacity: float) -> None:
        """Once, when the wait persists."""
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
