"""Which settings a run keeps to its end, and which may change on the way: those take effect, and the record says so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler
from transformers.trainer import SCHEDULER_NAME

from ..checkpoints import ARGUMENTS_FILE, Manifest
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.run_record import RunRecord, SettingChange
from ..views.cropping import FORMER_RESIZER, RESIZER

# Training arguments that a run keeps: the state in a checkpoint was made by them, or follows them piece by piece. They
# say which images meet in which step, how and in what the optimizer keeps its state, what the teacher averages, and
# what schedules call an epoch. The global batch, which the checkpoint holds, counts as well; how it is split over
# processes does not.
KEPT = (
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "bf16",
    "fp16",
    "optim",
    "optim_args",
    "optim_target_modules",
    "decay_one_dimensional",
    "freeze_patch_embedding",
    "epoch_steps",
    "layer_decay",
    "patch_embedding_lr_multiplier",
    "freeze_last_layer_epochs",
    "freeze_last_layer_by",
    "teacher_momentum",
    "teacher_momentum_end",
)
# Training arguments that may change: they act on the steps that are still to come. So does the number of steps. All
# others (where results go, what is logged and saved, who loads images, the engine) leave the weights as they are.
TAKE_EFFECT = (
    "learning_rate",  # whether it is given, or follows from base_learning_rate and the batch
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "weight_decay_end",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "grad_clipping",
    "tf32",
    "torch_compile",
)
STEPS, RESIZED_BY = "steps", "resizer"
# The settings among those that the learning rate of the next step follows from.
_OF_LEARNING_RATE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", STEPS)


def find_changes(checkpoint: str, args: EquiSSLTrainingArguments, steps: int | None) -> tuple[SettingChange, ...]:
    """Compare the settings of this start with those under which ``checkpoint`` was written.

    Args:
        checkpoint: Where the run goes on.
        args: Arguments of this start.
        steps: Number of steps at which it ends.

    Returns:
        What changes here, and what has changed before, by step; empty for the checkpoint of a version that kept no
        arguments.
    """
    folder, step = Path(checkpoint), Manifest.read(checkpoint).step
    now = {**{name: _to_plain(getattr(args, name)) for name in TAKE_EFFECT}, STEPS: steps}
    try:
        before = json.loads((folder / ARGUMENTS_FILE).read_text(encoding="utf-8"))
        before[STEPS] = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"]
    except (OSError, ValueError, KeyError):
        before = now
    here = [
        SettingChange(step, name, before[name], value)
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    record = RunRecord.find(folder.parent)
    if record is None:
        return tuple(here)
    # Later changes concern steps that this start does not go on from. Which arguments change at this one, the
    # checkpoint says anew; of what resizes crops it says nothing.
    resized = [change for change in record.changes if change.setting == RESIZED_BY]
    earlier = [change for change in record.changes if change.step < step or (change.step == step and change in resized)]
    before_resizer = next((change.before for change in resized if change.step > step), record.resizer)
    if (before_resizer or FORMER_RESIZER) != RESIZER:
        here.append(SettingChange(step, RESIZED_BY, before_resizer or FORMER_RESIZER, RESIZER))
    return (*earlier, *here)


def describe_changes(
    changes: Iterable[SettingChange], checkpoint: str, args: EquiSSLTrainingArguments
) -> tuple[str, ...]:
    """Say in lines for people what changes at ``checkpoint``, and what becomes of the learning rate."""
    step = Manifest.read(checkpoint).step
    here = {change.setting: change for change in changes if change.step == step}
    lines = [f"note: {change.text}" for change in here.values()]
    if here.keys() & set(_OF_LEARNING_RATE):
        before, after = _learning_rates(Path(checkpoint), step, args, here)
        if before is not None and after is not None and before != after:
            lines.append(f"note: the learning rate goes on at {after:.4g}; it would have been {before:.4g}")
    return tuple(lines)


def _learning_rates(
    checkpoint: Path, step: int, args: EquiSSLTrainingArguments, changes: Mapping[str, SettingChange]
) -> tuple[float | None, float | None]:
    """Find the learning rate of the next step as the checkpoint has it, and as this start makes it."""
    try:
        saved = torch.load(checkpoint / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        before = float(saved["_last_lr"][0])
        steps = changes[STEPS].after if STEPS in changes else None
        if steps is None:
            steps = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"]
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
        return before, args.learning_rate * schedule.lr_lambdas[0](step)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None, None  # a schedule of another kind, which says its rates in the log


def _to_plain(value: Any) -> Any:
    """Return what JSON gives back of a value."""
    return json.loads(json.dumps(value.value if isinstance(value, Enum) else value))
