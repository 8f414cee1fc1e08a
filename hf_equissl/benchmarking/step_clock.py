"""The measured side of ``scaling``: a process that trains as it is told, and a clock for its steps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.distributed import PrefixStore, Store, TCPStore
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from ..distributed.engines import Engine, find_running_engine
from ..pretraining.trainer import EquiSSLTrainer
from ..recipes.recipe import Recipe
from ..running.run import build_training, prepare
from ..utils.devices import synchronize
from ..utils.machine import usable_cores
from ..utils.suggestions import RecipeError

TASK = "EQUISSL_SCALING_TASK"  # environment variable: what a launched process has to measure
PATIENCE = timedelta(hours=1)  # processes wait for each other so long, since data sets may be slow to open
STEP = "scaling: step"
COLLECTIVES = ("gloo:", "ncclDevKernel", "ncclKernel")  # beginnings of their names in a profile


@dataclass(frozen=True)
class Steps:
    """Steps of one measurement: those that do not count, those that do, and those under the profiler."""

    warmup: int
    timed: int
    profiled: int

    @property
    def total(self) -> int:
        """Number of all steps."""
        return self.warmup + self.timed + self.profiled


@dataclass(frozen=True)
class Task:
    """What a launched process has to measure.

    Attributes:
        engine: The engine that must wrap the model.
        port: Port of the store that the launching command keeps.
        prefix: Prefix of this launch's keys there.
        count: Number of processes that measure at the same time.
        first: Number of this launch's first process among them.
        images: Folder with images, unless the recipe names a data set.
        output_dir: Folder of the run, which is thrown away.
    """

    engine: str
    port: int
    prefix: str
    count: int
    first: int
    images: str | None
    output_dir: str


def given_task() -> Task | None:
    """Read the task of this process, if a measuring command launched it."""
    text = os.environ.get(TASK)
    return None if text is None else Task(**json.loads(text))


class Meeting:
    """Lets the processes of a measurement wait for each other, with any engine or none."""

    def __init__(self, task: Task) -> None:
        self.count, self.number = task.count, task.first + int(os.environ.get("RANK", "0"))
        self.store: Store = PrefixStore(
            task.prefix, TCPStore("127.0.0.1", task.port, is_master=False, timeout=PATIENCE)
        )

    def wait(self, name: str) -> None:
        """Wait until all processes have called it."""
        if self.store.add(name, 1) == self.count:
            self.store.set(f"{name} complete", "")
        self.store.wait([f"{name} complete"])

    def tell(self, key: str, text: str) -> None:
        """Leave a text for the command that launched this process."""
        self.store.set(key, text)


class StepClock(TrainerCallback):
    """Times whole steps of a Trainer, and says what wraps its model.

    Args:
        trainer: The Trainer that it is added to.
        meeting: Lets all processes begin a step together.
        steps: How many steps of which kind.
        asked: The engine that the launch asked for.

    Raises:
        RecipeError: When training begins, another engine wraps the model.
    """

    def __init__(self, trainer: EquiSSLTrainer, meeting: Meeting, steps: Steps, asked: Engine) -> None:
        self.trainer, self.meeting, self.steps, self.asked = trainer, meeting, steps, asked
        self.wrapped = ""
        self.wall: list[float] = []
        self.cpu: list[float] = []
        activities = [ProfilerActivity.CPU]
        if trainer.args.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self._window: AbstractContextManager[Any] = record_function(STEP)
        self._start = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what wraps the model."""
        wrapped = self.trainer.model_wrapped
        running = find_running_engine(self.trainer.accelerator, wrapped)
        if running != self.asked:
            raise RecipeError(
                f"{self.asked.value} was asked for, and {running.value} wraps the model ({type(wrapped).__name__}): "
                "the times would be those of another engine."
            )
        self.wrapped = type(wrapped).__name__

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for all processes, and start the clock."""
        if self.steps.profiled and state.global_step == self.steps.warmup + self.steps.timed:
            self.profiler.start()
        synchronize(args.device)
        self.meeting.wait(f"step {state.global_step}")
        self._window = record_function(STEP)
        self._window.__enter__()
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the device, and note the step's times."""
        synchronize(args.device)
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])
        self._window.__exit__(None, None, None)
        if self.steps.profiled and state.global_step == self.steps.total:
            self.profiler.stop()

    def result(self) -> dict[str, Any]:
        """Return seconds of the steps that count, and the share of the profiled ones that collectives take."""
        counted = slice(self.steps.warmup, self.steps.warmup + self.steps.timed)
        share = collective_share(self.profiler.events() or []) if self.steps.profiled else None
        result = {"wrapped": self.wrapped, "wall": self.wall[counted], "cpu": self.cpu[counted], "collectives": share}
        cores = usable_cores() if self.trainer.args.device.type == "cpu" else None
        return {**result, "threads": torch.get_num_threads(), "cores": cores}


def collective_share(events: Iterable[FunctionEvent]) -> float:
    """Compute the share of the profiled steps in which at least one collective is under way."""
    spans: list[tuple[float, float]] = []
    steps: list[tuple[float, float]] = []
    for event in events:
        span = event.time_range.start, event.time_range.end
        # On GPUs a step's name stands on the device's time line, too.
        if event.name == STEP and event.device_type == torch.autograd.DeviceType.CPU:
            steps.append(span)
        elif event.name.startswith(COLLECTIVES):
            spans.append(span)
    busy = 0.0
    for begin, end in steps:
        at = begin
        for start, stop in sorted(spans):
            busy += max(0.0, min(stop, end) - max(start, at))
            at = max(at, min(stop, end))
    return busy / sum(end - begin for begin, end in steps)


def measure(recipe: Recipe, task: Task, steps: Steps) -> None:
    """Train for ``steps`` steps and tell the command that launched this process what they took.

    Raises:
        RecipeError: The recipe cannot be trained so, or another engine wraps the model.
    """
    meeting = Meeting(task)
    try:
        _pin(meeting.number, task.count)
        run = prepare(recipe, task.output_dir, resume="never")
        _, trainer = build_training(run)
        clock = StepClock(trainer, meeting, steps, Engine(task.engine))
        trainer.add_callback(clock)
        trainer.train()
    except Exception as error:
        # The launcher's own report of a failed process hides what it says.
        if isinstance(error, ValueError | OSError):
            meeting.tell("error", str(error))
        else:
            meeting.tell("failure", f"{type(error).__name__}: {error}")
        raise
    meeting.tell(f"result {meeting.number}", json.dumps(clock.result()))


def _pin(number: int, count: int) -> None:
    """Give each process on CPUs a core of its own, where there are enough."""
    if not torch.accelerator.is_available() and count <= usable_cores() and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number]})
