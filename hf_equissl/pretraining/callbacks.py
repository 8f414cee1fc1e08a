"""Callbacks of the Trainer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from ..data.throughput import NOTABLE_WAIT
from ..objectives.progress import TrainingProgress
from .arguments import EquiSSLTrainingArguments
from .schedules import last_layer_is_held, teacher_momentum, weight_decay

if TYPE_CHECKING:
    from .model import EquiSSLForPreTraining


class ScheduleCallback(TrainerCallback):
    """What changes from step to step beside the learning rate: temperatures, weight decay, the last layer, the teacher.

    Everything follows from the step's number alone, so a resumed run goes on where it stopped.

    Attributes:
        steps_per_epoch: Length of an epoch in schedules, known once training begins.
        values: Values of the current step that are worth a log line.
    """

    def __init__(self) -> None:
        self.steps_per_epoch: int | None = None
        self.values: dict[str, float] = {}

    def on_train_begin(  # type: ignore[override]
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Find out how long an epoch is."""
        self.steps_per_epoch = args.epoch_steps
        if self.steps_per_epoch is None and has_length(train_dataloader):
            self.steps_per_epoch = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))

    def on_step_begin(  # type: ignore[override]
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: EquiSSLForPreTraining,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        **kwargs: Any,
    ) -> None:
        """Set the step's values, before its first micro-batch."""
        progress = self._progress(args, state)
        model.begin_step(progress)
        self.values = {"teacher_momentum": teacher_momentum(args, progress)} if model.needs.teacher else {}
        if args.weight_decay_end is not None:
            self.values["weight_decay"] = weight_decay(args, progress)
        for index, group in enumerate(optimizer.param_groups):
            if group.get("decayed") and "weight_decay" in self.values:
                group["weight_decay"] = self.values["weight_decay"]
            if group.get("last_layer") and args.freeze_last_layer_by == "learning_rate":
                held = last_layer_is_held(args, progress)
                group["lr"] = 0.0 if held else lr_scheduler.get_last_lr()[index]

    def on_pre_optimizer_step(  # type: ignore[override]
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        """Drop the gradients of a last layer that is held, after they were clipped, as DINO and iBOT do."""
        if args.freeze_last_layer_by != "gradient" or not last_layer_is_held(args, self._progress(args, state)):
            return
        for group in optimizer.param_groups:
            if group.get("last_layer"):
                for parameter in group["params"]:
                    parameter.grad = None

    def on_optimizer_step(  # type: ignore[override]
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: EquiSSLForPreTraining,
        **kwargs: Any,
    ) -> None:
        """Let the teacher follow the student's new weights."""
        model.update_teacher(teacher_momentum(args, self._progress(args, state)))

    def _progress(self, args: EquiSSLTrainingArguments, state: TrainerState) -> TrainingProgress:
        return TrainingProgress(state.global_step, state.max_steps, self.steps_per_epoch)


class EquiSSLProgressCallback(ProgressCallback):
    """One bar: steps done, time left, images per second over all ranks, loss. Log lines stay in ``log_history``."""

    def on_train_begin(  # type: ignore[override]
        self, args: EquiSSLTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where a resumed run stands."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("pretraining")
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step

    def on_log(  # type: ignore[override]
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss parts and the throughput behind the bar, and the wait for data where it is worth a word."""
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        shown = {key: f"{logs[key]:.3g}" for key in logs if key == "loss" or key.startswith("loss_")}
        if "images_per_second" in logs:
            shown["img/s"] = f"{logs['images_per_second']:.1f}"
            if logs["data_wait"] > NOTABLE_WAIT:
                shown["waits for data"] = f"{logs['data_wait']:.0%}"
        self.training_bar.set_postfix(shown)
