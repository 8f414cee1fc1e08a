"""Tools to measure with: a stopwatch, turns, and what a time depends on."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..utils.devices import describe_cpu, synchronize
from ..utils.versions import __version__


class Stopwatch:
    """Names the ends of consecutive parts. On CUDA it records events and never waits inside a step.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float, float, Any]] = []

    def start(self) -> None:
        """Wait for the device, and start."""
        self._marks = []
        synchronize(self.device)
        self.mark("")

    def mark(self, name: str) -> None:
        """Call the time since the last mark ``name``."""
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((name, time.perf_counter(), time.process_time(), event))

    def stop(self) -> dict[str, Any]:
        """Wait for the device; returns seconds of the whole and of each part, by the clock and of processor time."""
        synchronize(self.device)
        first, last = self._marks[0], self._marks[-1]
        # What a device does is over later than the last mark; a CPU has nothing left to do there.
        wall, cpu = (time.perf_counter(), time.process_time()) if self.device.type != "cpu" else last[1:3]
        parts: dict[str, float] = {}
        cpu_parts: dict[str, float] = {}
        for before, after in pairwise(self._marks):
            seconds = after[1] - before[1] if after[3] is None else before[3].elapsed_time(after[3]) / 1000
            parts[after[0]] = parts.get(after[0], 0.0) + seconds
            cpu_parts[after[0]] = cpu_parts.get(after[0], 0.0) + after[2] - before[2]
        return {"wall": wall - first[1], "cpu": cpu - first[2], "parts": parts, "cpu_parts": cpu_parts}


def take_turns(tasks: dict[str, Callable[[], Any]], repeats: int, rehearse: bool = True) -> dict[str, list[Any]]:
    """Do each task ``repeats`` times, in turns whose order alternates; returns their results.

    Args:
        tasks: Name -> task.
        repeats: Number of results of each.
        rehearse: Whether to throw a first round away; not for tasks that warm up by themselves.
    """
    results: dict[str, list[Any]] = {name: [] for name in tasks}
    for number in range(0 if rehearse else 1, repeats + 1):
        for name in list(tasks) if number % 2 else reversed(tasks):
            outcome = tasks[name]()
            if number:
                results[name].append(outcome)
    return results


def measure_seconds(task: Callable[[], None]) -> dict[str, float]:
    """Measure the seconds of ``task`` by the clock (``wall``) and of processor time, all threads (``cpu``)."""
    wall, cpu = time.perf_counter(), time.process_time()
    task()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def environment(device: torch.device) -> dict[str, Any]:
    """Collect what a time depends on: processor, threads, versions, commit. No paths, no host name."""
    packages = ("torch", "transformers", "accelerate", "datasets", "pillow", "numpy")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": describe_cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "hf_equissl": __version__,
        **{name: version(name) for name in packages},
        "commit": _commit(Path(__file__).resolve().parents[2]),
    }


def _commit(root: Path) -> str | None:
    """Find the checkout's commit, with "+" where files differ from it; ``None`` outside of a checkout."""
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root)]
    try:
        done = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    if done.returncode:
        return None
    changed = subprocess.run([*words, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return done.stdout.strip() + ("+" if changed else "")
