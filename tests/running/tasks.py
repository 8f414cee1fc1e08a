"""Processes of ``training/pretrain.py`` as Slurm starts them: without a launcher, each with its own log and code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hf_equissl.checkpoints import MANIFEST
from tests.distributed.launching import free_port
from tests.processes import PRELOADED, WITH_DEEPSPEED, environment, limit, start, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training" / "pretrain.py"
PATIENCE = 300.0  # seconds, on a quiet machine
END = 60.0  # seconds in which all processes of a run that failed have to be gone
OPTIONS = [
    *("--recipe", "cifar10_vicreg_rot", "--model.hidden_size", "32", "--model.num_hidden_layers", "2"),
    *("--training.per_device_train_batch_size", "4", "--training.warmup_steps", "1"),
    *("--training.logging_steps", "2", "--training.disable_tqdm", "true"),
]


class Tasks:
    """The processes of one run.

    Args:
        folder: For their logs.
        options: Words behind the script; one list for all, or one for each.
        script: In place of ``training/pretrain.py``.
        variables: Of the environment, e.g. those of an engine.
    """

    def __init__(
        self,
        folder: Path,
        *options: Sequence[str],
        script: Path = SCRIPT,
        count: int = 2,
        variables: dict[str, str] | None = None,
    ) -> None:
        port = free_port()
        preloaded = WITH_DEEPSPEED if "ACCELERATE_USE_DEEPSPEED" in (variables or {}) else PRELOADED
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"task-{rank}.log" for rank in range(count)]
        self.processes = []
        for rank in range(count):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            words = [sys.executable, str(script), *OPTIONS, *options[min(rank, len(options) - 1)]]
            own = environment(**ranks, **place, **(variables or {}))
            self.processes.append(start(words, log=self.logs[rank], env=own, preloaded=preloaded))

    def wait_for_checkpoint(self, output: Path, step: int) -> None:
        """Until the checkpoint of a step is complete: the run is then somewhere behind it."""
        manifest = output / f"checkpoint-{step}" / MANIFEST
        wait_until(lambda: manifest.is_file() or any(p.poll() is not None for p in self.processes), PATIENCE)
        assert manifest.is_file(), f"ended before:\n{self.text}"

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Exit codes of all; an error if one still runs when time is out."""
        end = time.monotonic() + limit(timeout)
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {timeout} s:\n{self.text}") from None

    def kill(self) -> None:
        """End what is left, with all that it started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def text(self) -> str:
        """What all of them printed."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def the_error(self) -> str:
        """The one line that says what went wrong; nothing else may say it, and no traceback."""
        lines = [line for line in self.text.splitlines() if line.startswith(("error:", "preempted:"))]
        assert len(lines) == 1, self.text
        assert "Traceback (most recent call last)" not in self.text, self.text
        return lines[0]


@contextlib.contextmanager
def tasks(folder: Path, *options: Sequence[str], **kwargs: object) -> Iterator[Tasks]:
    """``Tasks`` of which nothing is left behind."""
    started = Tasks(folder, *options, **kwargs)  # type: ignore[arg-type]
    try:
        yield started
    finally:
        started.kill()
