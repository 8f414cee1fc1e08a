"""Commands side by side, one thread each, with their progress in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from hf_equissl.utils.commands import say
from hf_equissl.utils.machine import usable_cores

LOG_TAIL = 15  # lines shown of a command that failed
LOG_SECONDS = 15.0  # between two lines about the progress where no terminal shows it in one
MOST_SHOWN = 2  # lanes that the progress line names, whatever they do
WAITING, DONE = "waiting", "done"
# One thread per command: two wait for each other wherever something else works on one of their cores (measured: steps
# of 9 s in place of 0.7). Nothing is pinned: the system moves a command to whatever core is free. Large buffers stay
# with the allocator (glibc's; others ignore this): given back, every step would fault them in again.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "TOKENIZERS_PARALLELISM": "false",
}


class CommandError(RuntimeError):
    """A command failed. The message holds the end of its output."""


class StoppedError(CommandError):
    """A lane was stopped: its command was ended, or not begun."""


@dataclass
class Lane:
    """Commands that run one after the other.

    Attributes:
        title: Name in the progress line.
        run: Folder; the output of ``x.py`` is written to ``x.log`` in it.
        stage: What is being done, for people.
        bar: How the progress bar of the running command begins; empty where that has no name.
        log: Output of the running command.
        process: The running command.
        first_seen: When its bar was first seen to have moved (``time.monotonic``), and how far it was.
        environment: Variables of its commands beside this process's.
        stopped: Whether it was stopped; it begins no further command.
        failure: Why it stands still.
    """

    title: str
    run: Path
    stage: str = field(default=WAITING, init=False)
    bar: str = field(default="", init=False)
    log: Path | None = field(default=None, init=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    first_seen: tuple[float, int] | None = field(default=None, init=False, repr=False)
    environment: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    stopped: bool = field(default=False, init=False)
    failure: str = field(default="", init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def work(self) -> None:
        """Do all that it is there for, by ``call``; of a lane that is followed without a function for it.

        Raises:
            CommandError: A command failed, or the lane was stopped.
        """
        raise NotImplementedError

    def call(self, stage: str, script: Path, *words: object, bar: str) -> None:
        """Run a Python script to its end.

        Args:
            stage: What it does, for people.
            script: Its path.
            *words: Its arguments.
            bar: How its progress bar begins.

        Raises:
            CommandError: If it fails.
            StoppedError: If the lane was stopped.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        self.log = self.run / f"{script.stem}.log"
        command = [sys.executable, str(script), *map(str, words)]
        with self._lock:
            if self.stopped:
                raise StoppedError(f"{self.title} was stopped")
            self.process = start_process(command, self.log, {**ENVIRONMENT, **os.environ, **self.environment})
            self.stage, self.bar, self.first_seen = stage, bar, None
        code = self.process.wait()
        if self.stopped:
            raise StoppedError(f"{self.title} was stopped")
        if code:
            end = "\n".join(self.log.read_text(errors="replace").replace("\r", "\n").splitlines()[-LOG_TAIL:])
            raise CommandError(f"{script.name} stopped with code {code} ({self.title}). The end of {self.log}:\n{end}")

    def finish(self) -> None:
        """Note that nothing is left to do."""
        self.stage, self.log = DONE, None

    def stop(self) -> None:
        """Stop the running command, if any; it may have something to save first."""
        with self._lock:
            self.stopped = True
            if self.process is not None and self.process.poll() is None:
                self.process.terminate()

    def progress(self) -> str:
        """Say the stage, and how far it is by the last progress bar in the log."""
        done = self.steps_done()
        return f"{self.stage} {done[0]}/{done[1]}" if done else self.stage

    def steps_done(self) -> tuple[int, int] | None:
        """Read off the last progress bar in the log how many steps are done, of how many; ``None`` without a bar."""
        log = self.log  # the lane's own thread turns to the next command's log meanwhile
        if log is None or not log.is_file():
            return None
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            text = file.read().decode(errors="replace")
        # As tqdm writes it: "pretraining:  30%|###    | 120/400 [01:02<02:24, 1.9it/s]".
        start = re.escape(self.bar) + ": +" if self.bar else r"(?:^|[\r\n]) *"
        bars = re.findall(start + r"\d+%\|[^|]*\| (\d+)/(\d+) \[", text)
        if not bars:
            return None
        done, total = int(bars[-1][0]), int(bars[-1][1])
        if done > 0 and self.first_seen is None:
            self.first_seen = (time.monotonic(), done)
        return done, total

    def seconds_per_step(self, after: float) -> float | None:
        """Measure the seconds of a step since the bar first moved; ``None`` until ``after`` seconds and three steps."""
        done = self.steps_done()
        if done is None or self.first_seen is None:
            return None
        seconds, steps = time.monotonic() - self.first_seen[0], done[0] - self.first_seen[1]
        return seconds / steps if seconds >= after and steps >= 3 else None


def start_process(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command whose output replaces the file ``log``."""
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


LaneT = TypeVar("LaneT", bound=Lane)


def lanes_at_once(count: int) -> int:
    """Tell how many of ``count`` lanes run side by side: as many as there are cores."""
    return min(usable_cores(), count)


def follow(
    lanes: Sequence[LaneT],
    work: Callable[[LaneT], None],
    watch: Callable[[], str | None] | None = None,
    at_once: int | None = None,
) -> None:
    """Do ``work`` for all lanes side by side, or one after the other on a single core, and say how far they are.

    Args:
        lanes: What is followed.
        work: All commands of a lane.
        watch: Called every half second, to stop all by raising, or for what it returns to be said with the progress.
        at_once: How many lanes run side by side; default: ``lanes_at_once``.

    Raises:
        CommandError: The first of any lane; the others are stopped, as by anything that ``work`` or ``watch`` raises.
    """
    start, live, said, width = time.monotonic(), sys.stdout.isatty(), 0.0, 0
    with ThreadPoolExecutor(max_workers=at_once or lanes_at_once(len(lanes))) as pool:
        futures: list[Future[None]] = [pool.submit(work, lane) for lane in lanes]
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                more = watch() if watch is not None else None
                if not live and waiting and time.monotonic() - said < LOG_SECONDS:
                    continue
                said = time.monotonic()
                text = f"[{clock(time.monotonic() - start)}]  {_overview(lanes)}" + (f"  |  {more}" if more else "")
                width = max(width, len(text), 78)  # else the end of a longer line would stay
                print(f"\r{text:<{width}}" if live else text, end="" if live else "\n", flush=True)
        finally:
            for future in waiting:
                future.cancel()
            for lane in lanes:
                lane.stop()
            if live:
                print(flush=True)


def follow_on_devices(
    lanes: Sequence[LaneT], at_once: int, devices: Sequence[str], watch: Callable[[], str | None] | None = None
) -> None:
    """``follow`` lanes that know their ``work``, each command on a device of its own; one that fails stops no other.

    Args:
        lanes: What is followed; what a lane raised is its ``failure``.
        at_once: How many run side by side.
        devices: Numbers of GPUs, as ``CUDA_VISIBLE_DEVICES`` has them; empty without one.
        watch: As in ``follow``.
    """
    free: SimpleQueue[int] = SimpleQueue()
    for number in range(at_once):
        free.put(number)

    def work(lane: LaneT) -> None:
        number = free.get()
        try:
            lane.environment = {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]} if devices else {}
            lane.work()
        except StoppedError:
            pass
        except (CommandError, ValueError, OSError) as error:
            lane.failure = str(error)
            say(f"\n{lane.title} failed, the others go on. {error}")
        finally:
            free.put(number)
            lane.finish()

    follow(lanes, work, watch, at_once)


def _overview(lanes: Sequence[Lane]) -> str:
    """Say how far the lanes are, of many only those in which something runs."""
    if len(lanes) <= MOST_SHOWN:
        return "  |  ".join(f"{lane.title}: {lane.progress()}" for lane in lanes)
    running = [lane for lane in lanes if lane.stage not in (WAITING, DONE)]
    done = sum(lane.stage == DONE for lane in lanes)
    return "  |  ".join([f"{done}/{len(lanes)} done", *(f"{lane.title}: {lane.progress()}" for lane in running)])


def clock(seconds: float) -> str:
    """Write seconds as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
