"""Where a run stands, and the curves that values follow over it."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
