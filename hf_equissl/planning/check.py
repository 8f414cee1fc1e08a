"""Check a plan against a few real steps: the most memory that each phase of them took."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Trainer, TrainerCallback

from ..pretraining.model import EquiSSLForPreTraining
from ..recipes.recipe import Recipe
from ..utils.machine import resident_peak
from ..utils.suggestions import RecipeError

STEPS = 3  # the first is not counted: it brings the optimizer's state into being
# What a check sets in a recipe: few steps, images that this process reads itself, and nothing that stays behind.
OVERRIDES: dict[str, Any] = {
    "monitor": {},
    "training.max_steps": STEPS,
    "training.warmup_steps": 0,
    "training.save_strategy": "no",
    "training.push_to_hub": False,
    "training.dataloader_num_workers": 0,
    "training.dataloader_prefetch_factor": None,
    "training.report_to": "none",
    "training.disable_tqdm": True,
}
_RESET = Path("/proc/self/clear_refs")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _SMALL = -1, -3, 1 << 16  # two options of malloc.h, and a size in bytes


@dataclass
class PeakMeter:
    """Measures the most memory of each phase beyond ``baseline``: of the GPU's tensors, or on CPUs of the process.

    Raises:
        RecipeError: The operating system does not say what a process takes.
    """

    device: torch.device
    baseline: int = 0
    phases: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            return
        if not _RESET.exists():
            raise RecipeError("--check_memory reads the peak of a process from /proc, which only Linux has.")
        # Freed tensors go back to the system at once: else what was held long ago would count as held now.
        library = ctypes.CDLL(None)
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            library.mallopt(option, _SMALL)

    def start(self) -> None:
        """Make what is held now the baseline."""
        gc.collect()
        self.baseline = 0
        self._reset()
        self.baseline = self._peak()
        self.phases.clear()

    def close(self, phase: str) -> None:
        """Count the most since the last call for ``phase``."""
        self.phases[phase] = max(self.phases.get(phase, 0), self._peak())
        self._reset()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.baseline
        return resident_peak() - self.baseline

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _RESET.write_text("5")  # the peak becomes what is held now: proc(5)


class PhaseCallback(TrainerCallback):
    """Closes a phase of the step at each of the Trainer's events; hooks of the model close the others."""

    def __init__(self, meter: PeakMeter) -> None:
        self.meter = meter

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Close the backward pass, when all gradients are there."""
        self.meter.close("backward")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the optimizer's step, when weights are new and gradients gone."""
        self.meter.close("optimizer")
        if state.global_step == 1:
            self.meter.phases.clear()


def measure_phases(build: Callable[[], tuple[EquiSSLForPreTraining, Trainer]], meter: PeakMeter) -> dict[str, int]:
    """Train a few steps and measure the most memory of each phase.

    Args:
        build: Makes model and Trainer, whose memory counts.
        meter: Measures the training device.

    Returns:
        Phase -> bytes. What the optimizer does inside of DeepSpeed's backward pass counts there; "views" is the time
        before the model runs.
    """
    meter.start()
    model, trainer = build()
    model.register_forward_pre_hook(lambda *_: meter.close("views"))
    model.register_forward_hook(lambda *_: meter.close("forward"))
    if model.teacher is not None:
        model.teacher.register_forward_pre_hook(lambda *_: meter.close("forward"))
        model.teacher.register_forward_hook(lambda *_: meter.close("teacher"))
    trainer.add_callback(PhaseCallback(meter))
    trainer.train()
    return dict(meter.phases)


@contextmanager
def scratch_folder(world: int) -> Iterator[Path]:
    """Make a folder for all processes of one launcher on this machine, and remove it afterwards.

    Raises:
        RecipeError: The processes are on several machines.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", str(world))) != world:
        raise RecipeError("--check_memory: one machine only. Start it with as many processes as this one has GPUs.")
    if world == 1:
        with tempfile.TemporaryDirectory(prefix="equissl_check_") as alone:
            yield Path(alone)
        return
    # All processes have the same launcher, and no two that run share a process id.
    folder = Path(tempfile.gettempdir()) / f"equissl_check_{os.getppid()}"
    is_main = os.environ.get("RANK", "0") == "0"
    own = folder / os.environ.get("RANK", "0")
    own.mkdir(parents=True)  # what lies there already is not ours
    try:
        yield folder
    finally:
        shutil.rmtree(own, ignore_errors=True)
        if is_main:
            shutil.rmtree(folder / "run", ignore_errors=True)
        with suppress(OSError):  # the last one to leave
            folder.rmdir()


def images_needed(recipe: Recipe, world: int) -> int:
    """Count the images that one step of all processes takes."""
    training = recipe.training
    batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    return int(batch * world)


def noise_images(folder: Path, count: int, side: int = 64) -> None:
    """Write ``count`` small images of noise, the same on every call."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(count):
        pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05}.png")
