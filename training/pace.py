"""How long the quick start takes, told from its first seconds, and how many steps fit into ten minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_equissl.training.side_by_side import Lane, clock, lanes_at_once

LONGEST = 600.0  # seconds that the whole may take
TRIAL = 10.0  # seconds of training after which its speed is known
# The probes of one encoder take about as long as so many steps of its training, in bf16 and in fp32.
PROBE_STEPS = 250
RESTART = 15.0  # seconds that stopping and starting anew costs
FEWEST_STEPS, STEP_UNIT = 300, 50  # after 200 steps the reconstruction has not yet shown in the features


class TooSlowError(Exception):
    """The runs would take longer than ``LONGEST``.

    Attributes:
        steps: How many fit.
        expected: Seconds that the whole would have taken.
    """

    def __init__(self, steps: int, expected: float) -> None:
        self.steps, self.expected = steps, expected
        super().__init__(f"would take {clock(expected)}")


@dataclass
class Pace:
    """Says once when the end is expected, by the speed of the first seconds.

    Attributes:
        start: When the command started (``time.monotonic``).
        may_shorten: Whether a run that would take too long is stopped for a shorter one.
    """

    start: float
    may_shorten: bool
    told: bool = field(default=False, init=False)

    def watch(self, lanes: Sequence[Lane]) -> str | None:
        """Measure the lanes that train; give the expectation in words, once.

        Raises:
            TooSlowError: the end lies too far off, fewer steps would do, and the run may be shortened.
        """
        training = [lane for lane in lanes if lane.stage == "pretraining"]
        speeds = [lane.seconds_per_step(TRIAL) for lane in training]
        if self.told or not training or None in speeds:
            return None
        self.told = True
        elapsed, rounds = time.monotonic() - self.start, -(-len(lanes) // lanes_at_once(len(lanes)))
        # The slowest lane says the end; on a single core one lane waits for the other.
        seconds, (done, steps) = max(
            (speed, progress)
            for speed, lane in zip(speeds, training, strict=True)
            if speed is not None and (progress := lane.steps_done()) is not None
        )
        left = seconds * (rounds * (steps + PROBE_STEPS) - done)
        if self.may_shorten and elapsed + left > LONGEST:
            fitting = steps_that_fit(seconds, LONGEST - elapsed - RESTART, rounds)
            if fitting < steps:
                raise TooSlowError(fitting, elapsed + left)
        end = time.strftime("%H:%M", time.localtime(time.time() + left))
        return f"{seconds:.2g} s per step: done in about {clock(left)}, at {end}"


def steps_that_fit(seconds_per_step: float, budget: float, rounds: int) -> int:
    """Count the training steps that leave time for the probes within ``budget`` seconds; ``FEWEST_STEPS`` at least."""
    fitting = budget / rounds / seconds_per_step - PROBE_STEPS
    return max(FEWEST_STEPS, int(fitting // STEP_UNIT) * STEP_UNIT)
