"""Stop a run in the middle, on all processes at the same step, so that it can go on later without a difference."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..distributed.agreement import SharedFlag, first_message
from ..distributed.signals import Preempted, Signals
from ..pretraining.run_record import note_preemption

__all__ = ["PreemptionCallback"]


class PreemptionCallback(TrainerCallback):
    """Saves after a signal, at the same step on all processes, and ends training.

    A signal may reach one process only, or each at another step. Their flags are exchanged in the background
    (``SharedFlag``), so with several processes training ends one step later than with one. Where a checkpoint is
    written anyway they are compared at once, and it is the last one: nothing is written twice. In the last step
    there is nothing left to stop.

    Args:
        signals: Entered by the caller, who reads ``stopped`` afterwards.

    Attributes:
        stopped: Whether training was ended here.
    """

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to exchange flags.

        Raises:
            Preempted: On all processes, if one was asked to stop before.
        """
        self.stopped = False
        self._flag = SharedFlag(args.ddp_timeout)
        self.signals.begin_training()
        if self._flag.now(self._asked):
            self.stopped = True
            text = f"{self._who}: asked to stop before the first step, nothing to save."
            if state.is_world_process_zero:
                self.signals.leave_marker(text)
            self._flag.now(True)  # a launcher ends the others when one ends: not before the marker is written
            raise Preempted(f"{text} The same command starts again.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if a process was asked to."""
        if state.global_step < state.max_steps and self._flag.in_step(self._asked):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop behind a checkpoint that was just written."""
        if state.global_step < state.max_steps and not self.stopped and self._flag.now(self._asked):
            self.stopped = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the Trainer, which takes the epoch for over, from saving again and evaluating in the middle of it."""
        if self.stopped:
            control.should_save = False
            control.should_evaluate &= float(state.epoch or 0).is_integer()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the last exchange."""
        self._flag.now(self._asked)

    def stop(self, state: TrainerState, output_dir: Path) -> NoReturn:
        """Leave word for the scheduler and in ``run.json``, then stop. Called on all processes, after training.

        Raises:
            Preempted: On all of them, once the files are written: a launcher ends the others when one ends.
        """
        text = f"{self._who}: stopped at step {state.global_step} of {state.max_steps}, with a complete checkpoint."
        if state.is_world_process_zero:
            self.signals.leave_marker(text)
            with contextlib.suppress(OSError):  # a full disk is no reason to let the others wait
                note_preemption(output_dir)
        self._flag.now(True)
        raise Preempted(f"{text} The same command goes on from there.")

    @property
    def _who(self) -> str:
        """The signal of the first process that got one, with which the marker begins. All processes have to ask."""
        return first_message(self.signals.received) or "a signal"

    @property
    def _asked(self) -> bool:
        return self.signals.received is not None
