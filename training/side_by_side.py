"""Commands side by side, one thread each, with their progress in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

LOG_TAIL = 15  # lines shown of a command that failed
# One thread per command. Large buffers stay with the allocator: given back, every step would fault them in again.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "TOKENIZERS_PARALLELISM": "false",
}


class CommandError(RuntimeError):
    """A command failed. The message holds the end of its output."""


@dataclass
class Lane:
    """Commands that run one after the other.

    Attributes:
        title: Name in the progress line.
        run: Folder; the output of ``x.py`` is written to ``x.log`` in it.
        stage: What is being done, for people.
        bar: How the progress bar of the running command begins.
        log: Output of the running command.
        process: The running command.
    """

    title: str
    run: Path
    stage: str = field(default="waiting", init=False)
    bar: str = field(default="", init=False)
    log: Path | None = field(default=None, init=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def call(self, stage: str, script: Path, *words: object, bar: str) -> None:
        """Run a Python script to its end.

        Args:
            stage: What it does, for people.
            script: Its path.
            *words: Its arguments.
            bar: How its progress bar begins.

        Raises:
            CommandError: If it fails.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        self.log = self.run / f"{script.stem}.log"
        command = [sys.executable, str(script), *map(str, words)]
        with self.log.open("wb") as file:
            environment = {**ENVIRONMENT, **os.environ}
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            self.stage, self.bar = stage, bar
            code = self.process.wait()
        if code:
            end = "\n".join(self.log.read_text(errors="replace").replace("\r", "\n").splitlines()[-LOG_TAIL:])
            raise CommandError(f"{script.name} stopped with code {code} ({self.title}). The end of {self.log}:\n{end}")

    def finish(self) -> None:
        """Say that nothing is left to do."""
        self.stage, self.log = "done", None

    def stop(self) -> None:
        """Stop the running command, if any."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def progress(self) -> str:
        """The stage, and how far it is by the last progress bar in the log."""
        if self.log is None:
            return self.stage
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            text = file.read().decode(errors="replace")
        # As tqdm writes it: "pretraining:  30%|###    | 120/400 [01:02<02:24, 1.9it/s]".
        bars = re.findall(re.escape(self.bar) + r": +\d+%\|[^|]*\| (\d+)/(\d+) \[", text)
        return f"{self.stage} {bars[-1][0]}/{bars[-1][1]}" if bars else self.stage


LaneT = TypeVar("LaneT", bound=Lane)


def follow(lanes: Sequence[LaneT], work: Callable[[LaneT], None]) -> None:
    """Do ``work`` for all lanes side by side, or one after the other on a single core, and say how far they are.

    Raises:
        CommandError: The first of any lane; the others are stopped. Likewise for what else ``work`` raises.
    """
    start, live = time.monotonic(), sys.stdout.isatty()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=min(cores, len(lanes))) as pool:
        futures: list[Future[None]] = [pool.submit(work, lane) for lane in lanes]
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5 if live else 15.0, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                text = f"[{clock(time.monotonic() - start)}]  " + "  |  ".join(
                    f"{lane.title}: {lane.progress()}" for lane in lanes
                )
                print(f"\r{text:<78}" if live else text, end="" if live else "\n", flush=True)
        finally:
            for future in waiting:
                future.cancel()
            for lane in lanes:
                lane.stop()
            if live:
                print(flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
