"""Weak scaling: what a training step costs on more processes with as many images each, and where the time goes.

A step is one of ``EquiSSLTrainer`` as ``running.run`` builds it: views, forward (of the teacher, too), backward,
clipping, optimizer, the teacher's update. Reading images is no part of it: the clock starts when every process has its
batch. Neither is the flag that says in the background whether a process was asked to stop.
All processes start a step together and it is over when the last one is done, so a measured step's time is the largest
of its processes. Times:

- ``t1``: one process alone, no engine around the model;
- ``side``: N such processes at the same time, which share the machine and exchange nothing;
- ``tN``: N processes under an engine.

``tN = t1 + (side - t1) + (tN - side)``. As shares of tN the three are the *efficiency* of weak scaling; what is lost
because processes share memory, caches, power (*sharing*); and what the engine adds (*exposed*): exchange that no
computation hides, copies into buckets or shards, and terms of a loss that see the batch of all processes.
*In collectives* is measured on its own, by PyTorch's profiler in a few steps more: the share of the step in which at
least one collective is under way, waiting for others included, hidden behind computation or not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore

from ..distributed.engines import Engine
from ..utils.suggestions import RecipeError
from .overhead import synthetic_images
from .step_clock import PATIENCE, TASK, Steps, Task
from .timing import take_turns

CONFIGS = {engine: engine.value for engine in (Engine.DDP, Engine.FSDP2)} | {
    engine: f"deepspeed_{engine.value}" for engine in (Engine.ZERO1, Engine.ZERO2, Engine.ZERO3)
}
LOG_TAIL = 25  # lines shown of a launch that failed


@dataclass(frozen=True)
class Setup:
    """Processes that run at the same time.

    Attributes:
        engine: The engine around the model; ``SINGLE``: none.
        processes: Number of processes under one engine.
        copies: Number of such trainings side by side, which exchange nothing.
    """

    engine: Engine = Engine.SINGLE
    processes: int = 1
    copies: int = 1

    @property
    def count(self) -> int:
        """Number of processes on the machine."""
        return self.processes * self.copies

    @property
    def title(self) -> str:
        """Name for people, and key in reports."""
        name = "no exchange" if self.copies > 1 else self.engine.value
        return f"{name} x {self.count}"


class MeasurementError(RuntimeError):
    """A launch failed in a way that its options cannot mend."""


def settings(steps: Steps, batch_size: int) -> dict[str, Any]:
    """Make the values that a measured run sets in its recipe: steps, their size, and nothing between them."""
    own: dict[str, Any] = {
        "training.max_steps": steps.total,
        "training.per_device_train_batch_size": batch_size,
        "training.save_strategy": "no",
        "training.logging_strategy": "steps",
        "training.logging_steps": steps.total + 1,
        "training.logging_first_step": False,
        "training.report_to": "none",
        "training.disable_tqdm": True,
        "training.push_to_hub": False,
        "monitor.every_steps": None,
        "data.streaming": False,
    }
    if not torch.accelerator.is_available():  # a worker would take time from the process that is measured
        own["training.dataloader_num_workers"] = 0
        own["training.dataloader_prefetch_factor"] = None
        own["training.dataloader_persistent_workers"] = False
    return own


def setups(engines: Sequence[Engine], processes: Sequence[int]) -> list[Setup]:
    """List what is measured: one process, then for each number of processes no exchange and each engine."""
    several = sorted({number for number in processes if number > 1})
    groups = [[Setup(copies=number), *(Setup(engine, number) for engine in engines)] for number in several]
    return [Setup(), *(setup for group in groups for setup in group)]


@dataclass
class Launcher:
    """Starts measurements, each in processes of its own.

    Attributes:
        script: Script that calls ``measure`` when it finds a task.
        words: Arguments of the script.
        configs: Folder with accelerate's YAML files.
        folder: Folder for logs and runs, which is thrown away.
        images: Folder with images, as in ``Task``.
        environment: Variables of the processes, where the user has not set them.
        say: Called with a line for each measurement.
    """

    script: Path
    words: Sequence[str]
    configs: Path
    folder: Path
    images: Path | None
    environment: Mapping[str, str]
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        self.launches = 0

    def __call__(self, setup: Setup) -> list[dict[str, Any]]:
        """Measure once; returns ``StepClock.result`` of each process.

        Raises:
            RecipeError: A process says what can be mended.
            MeasurementError: A process failed; the message holds what it says, or the end of its output.
        """
        self.launches += 1
        prefix = f"launch {self.launches}"
        logs = [self.folder / f"{prefix}-{number}.log" for number in range(setup.copies)]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for number, log in enumerate(logs):
                environment = {**self.environment, **os.environ, **self._devices(setup, number)}
                environment[TASK] = json.dumps(asdict(self._task(setup, prefix, number)))
                command = self._command(setup)
                with log.open("wb") as out:
                    started.append(
                        subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
                    )
            failed = _wait(started)
        finally:
            _stop(started)
        answers = PrefixStore(prefix, self.store)
        if failed is not None:
            for key, kind in (("error", RecipeError), ("failure", MeasurementError)):
                if answers.check([key]):
                    raise kind(f"{setup.title}: {answers.get(key).decode()}")
            end = "\n".join(logs[failed].read_text(errors="replace").splitlines()[-LOG_TAIL:])
            raise MeasurementError(f"{setup.title} stopped with code {started[failed].returncode}:\n{end}")
        results = [json.loads(answers.get(f"result {number}")) for number in range(setup.count)]
        self.say(f"{setup.title}: {median(_slowest(results)):.3f} s")
        return results

    def _task(self, setup: Setup, prefix: str, number: int) -> Task:
        return Task(
            engine=setup.engine.value,
            port=self.store.port,
            prefix=prefix,
            count=setup.count,
            first=number * setup.processes,
            images=None if self.images is None else str(self.images),
            output_dir=str(self.folder / f"{prefix}-{number}"),
        )

    def _command(self, setup: Setup) -> list[str]:
        launch = [sys.executable]
        if setup.engine is not Engine.SINGLE:
            config = self.configs / f"{CONFIGS[setup.engine]}.yaml"
            launch += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
            launch += ["--num_processes", str(setup.processes), "--main_process_port", "0"]
        return [*launch, str(self.script), *self.words]

    @staticmethod
    def _devices(setup: Setup, number: int) -> dict[str, str]:
        """Choose a GPU for each process without an engine, and CPUs for DeepSpeed where there is nothing else."""
        if not torch.accelerator.is_available():
            return {"DS_ACCELERATOR": "cpu"}
        if setup.engine is not Engine.SINGLE or not torch.cuda.is_available():
            return {}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        return {"CUDA_VISIBLE_DEVICES": devices[number]}


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all are done or one fails; returns the number of the one that failed, or ``None``."""
    while True:
        codes = [process.poll() for process in processes]
        for number, code in enumerate(codes):
            if code:
                return number
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.2)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs. Launchers end their processes when asked to; the rest is in their process group."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_images(folder: Path, count: int, size: int) -> Path:
    """Write ``count`` synthetic JPEG files for images of ``size`` pixels; returns the folder."""
    folder.mkdir(parents=True)
    for number, image in enumerate(synthetic_images(count, size)):
        image.save(folder / f"{number:05d}.jpg")
    return folder


def measure_rounds(
    launcher: Launcher, wanted: Sequence[Setup], repeats: int
) -> dict[Setup, list[list[dict[str, Any]]]]:
    """Measure every setup ``repeats`` times, in turns, so that whatever else the machine does falls on all."""
    tasks: dict[str, Callable[[], Any]] = {setup.title: partial(launcher, setup) for setup in wanted}
    results = take_turns(tasks, repeats, rehearse=False)
    return {setup: results[setup.title] for setup in wanted}


def summarize(results: dict[Setup, list[list[dict[str, Any]]]], images: int) -> list[dict[str, Any]]:
    """Summarize measurements in the terms of the module.

    Args:
        results: What ``measure_rounds`` returns.
        images: Images per process and step.

    Returns:
        By setup: ``steps``, seconds of each step by round; ``seconds``, ``seconds_min``, ``seconds_max`` of all rounds;
        ``cpu_seconds``, processor time of a process's step, median; ``images_per_second``; ``wrapped``; ``threads`` and
        ``cores`` of a process; ``efficiency``, ``sharing``, ``exposed`` and ``collectives``, medians of the rounds,
        and each with ``_rounds``. The last four are ``None`` where they have no meaning.
    """
    steps = {setup: [_slowest(processes) for processes in rounds] for setup, rounds in results.items()}
    middle = {setup: [median(seconds) for seconds in rounds] for setup, rounds in steps.items()}
    rows = []
    for setup, rounds in results.items():
        every = [seconds for one in steps[setup] for seconds in one]
        first = rounds[0][0]
        row: dict[str, Any] = {
            "setup": setup.title,
            "engine": setup.engine.value,
            "processes": setup.processes,
            "copies": setup.copies,
            **{key: first[key] for key in ("wrapped", "threads", "cores")},
            "steps": steps[setup],
            "seconds": median(every),
            "seconds_min": min(every),
            "seconds_max": max(every),
            "cpu_seconds": median(s for processes in rounds for process in processes for s in process["cpu"]),
            "images_per_second": images * setup.count / median(every),
        }
        for name, values in _shares(setup, middle, rounds).items():
            row[name] = None if values is None else median(values)
            row[f"{name}_rounds"] = values
        rows.append(row)
    return rows


def _slowest(processes: Sequence[dict[str, Any]]) -> list[float]:
    """Compute the seconds of each step, which is over when the last process is done."""
    return [max(step) for step in zip(*(process["wall"] for process in processes), strict=True)]


def _shares(
    setup: Setup, middle: dict[Setup, list[float]], rounds: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, list[float] | None]:
    own, alone = middle[setup], middle[Setup()]
    efficiency = [one / several for one, several in zip(alone, own, strict=True)]
    if setup.count == 1:
        return {"efficiency": efficiency, "sharing": None, "exposed": None, "collectives": None}
    side = middle[Setup(copies=setup.count)]
    sharing = [(two - one) / several for one, two, several in zip(alone, side, own, strict=True)]
    if setup.copies > 1:
        return {"efficiency": efficiency, "sharing": sharing, "exposed": None, "collectives": None}
    exposed = [(several - two) / several for two, several in zip(side, own, strict=True)]
    profiled = [[process["collectives"] for process in processes] for processes in rounds]
    collectives = None if profiled[0][0] is None else [mean(shares) for shares in profiled]
    return {"efficiency": efficiency, "sharing": sharing, "exposed": exposed, "collectives": collectives}
