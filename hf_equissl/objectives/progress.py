"""Where a run stands, and the curves that values follow over it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done, 0 before the first.
        max_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps per epoch, ``None`` for a stream without a stated epoch length.
    """

    step: int
    max_steps: int
    steps_per_epoch: int | None = None

    @property
    def epoch(self) -> float:
        """Epochs done, with fraction.

        Raises:
            ValueError: The length of an epoch is not known.
        """
        return self.step / self.steps_in(1)

    def steps_in(self, epochs: float) -> float:
        """Count the steps in so many epochs.

        Raises:
            ValueError: The length of an epoch is not known.
        """
        if self.steps_per_epoch is None:
            raise ValueError(
                "A schedule of this run is stated in epochs, and a stream has no length. Say how many steps an epoch "
                "has: --training.epoch_steps N."
            )
        return epochs * self.steps_per_epoch


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Follow half a cosine from ``start`` at step 0 to ``end`` at ``steps``, constant after it (DINO's schedules)."""
    if steps <= 0 or step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def linear_ramp(start: float, end: float, step: int, steps: int) -> float:
    """Follow a line from ``start`` at step 0 to ``end`` at step ``steps - 1``, constant after (``numpy.linspace``)."""
    if steps <= 1 or step >= steps - 1:
        return end
    return start + (end - start) * step / (steps - 1)


@dataclass(frozen=True)
class TeacherTemperature:
    """A line from ``warmup`` to ``final`` over the first epochs, constant after them.

    Attributes:
        final: Temperature after the warm-up.
        warmup: Temperature at the start.
        warmup_epochs: Length of the line, rounded up to whole epochs by the clock "epoch"; 0 has none.
        clock: "epoch" changes it between epochs only (DINO, iBOT), "step" at every optimizer step (DINOv2).
    """

    final: float
    warmup: float
    warmup_epochs: float
    clock: Literal["epoch", "step"]

    def __post_init__(self) -> None:
        if min(self.final, self.warmup) <= 0 or self.warmup_epochs < 0:
            raise ValueError(
                f"Teacher temperatures must be above 0 and their warm-up 0 epochs or more, got {self.warmup} to "
                f"{self.final} over {self.warmup_epochs} epochs."
            )

    @property
    def start(self) -> float:
        """Return the value at the first step."""
        return self.warmup if self.warmup_epochs > 0 else self.final

    def at(self, progress: TrainingProgress) -> float:
        """Return the value for the step that comes next."""
        if self.warmup_epochs <= 0:
            return self.final
        if self.clock == "epoch":
            position, length = int(progress.epoch), math.ceil(self.warmup_epochs)
        else:
            position, length = progress.step, round(progress.steps_in(self.warmup_epochs))
        # A line of one point is its start, as numpy.linspace has it.
        return self.warmup if position == 0 else linear_ramp(self.warmup, self.final, position, length)
