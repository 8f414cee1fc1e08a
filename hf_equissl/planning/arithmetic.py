"""Batch, learning-rate and step arithmetic of a run, and what its schedules say at a given step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from ..objectives.progress import TrainingProgress
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLForPreTraining
from ..pretraining.schedules import teacher_momentum, weight_decay


@dataclass(frozen=True)
class Schedule:
    """Batch, learning rate and steps of a run, and the arithmetic behind them.

    Attributes:
        per_device, processes, accumulation: Their product is the global batch.
        images: Images in the data set, ``None`` where that is not known.
        steps: Optimizer steps, ``None`` where they follow from an unknown number of images.
        steps_per_epoch: Optimizer steps per pass over the images.
        epochs: Passes over the images.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up, ``None`` where ``steps`` is.
    """

    per_device: int
    processes: int
    accumulation: int
    images: int | None
    steps: int | None
    steps_per_epoch: int | None
    epochs: float | None
    learning_rate: float
    warmup_steps: int | None

    @property
    def batch(self) -> int:
        """Images per optimizer step."""
        return self.per_device * self.processes * self.accumulation

    def hours(self, flops: float, utilisation: float, device_tflops: float) -> float | None:
        """Estimate the hours of the run if devices reach ``utilisation`` of ``device_tflops``; ``None`` without steps.

        Args:
            flops: FLOPs per image.
            utilisation: Model-FLOPs utilisation, in (0, 1].
            device_tflops: Peak of one device, in 10^12 operations per second.
        """
        if self.steps is None:
            return None
        return self.steps * self.batch * flops / (self.processes * device_tflops * 1e12 * utilisation) / 3600


@dataclass(frozen=True)
class Milestone:
    """What the schedules say at one step; ``None`` for what this run does not have.

    Attributes:
        name: e.g. "end of warm-up".
        step: Counted from 0.
        learning_rate: Learning rate of a group with multiplier 1.
        weight_decay: Weight decay of the groups with decay.
        teacher_momentum: Momentum of the update that ends the step.
        scheduled: What the objectives change over the run, by name, e.g. the teacher's temperature.
    """

    name: str
    step: int
    learning_rate: float | None
    weight_decay: float
    teacher_momentum: float | None
    scheduled: dict[str, float]


def schedule(args: EquiSSLTrainingArguments, processes: int, images: int | None) -> Schedule:
    """Compute batch, learning rate and steps for a launch of ``processes`` processes."""
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    per_epoch = None
    if images is not None:
        batch = per_device * processes * accumulation
        per_epoch = images // batch if args.dataloader_drop_last else math.ceil(images / batch)
    steps = args.max_steps if args.max_steps > 0 else None
    if steps is None and per_epoch is not None:
        steps = math.ceil(args.num_train_epochs * per_epoch)
    exponent = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[args.learning_rate_scaling]
    grown = per_device * processes * accumulation / args.global_batch_size  # against the processes that args know
    known = args.base_learning_rate is not None
    return Schedule(
        per_device=per_device,
        processes=processes,
        accumulation=accumulation,
        images=images,
        steps=steps,
        steps_per_epoch=per_epoch,
        epochs=steps / per_epoch if steps and per_epoch else None,
        learning_rate=args.learning_rate * (grown**exponent if known else 1.0),
        warmup_steps=args.get_warmup_steps(steps) if steps else None,
    )


def milestones(args: EquiSSLTrainingArguments, plan: Schedule, model: EquiSSLForPreTraining) -> list[Milestone]:
    """List the values of all schedules at the first step, the end of the warm-up, the middle and the last step.

    Args:
        args: State the schedules.
        plan: Says how many steps there are; without known steps there are no milestones.
        model: Its objectives say what they schedule, and whether there is a teacher.
    """
    if not plan.steps:
        return []
    rate = _learning_rate(args, plan)
    steps = {"start": 0, "end of warm-up": plan.warmup_steps or 0, "middle": plan.steps // 2, "end": plan.steps - 1}
    rows = []
    for name, step in steps.items():
        progress = TrainingProgress(step, plan.steps, args.epoch_steps or plan.steps_per_epoch)
        rows.append(
            Milestone(
                name=name,
                step=step,
                learning_rate=None if rate is None else rate(step),
                weight_decay=weight_decay(args, progress),
                teacher_momentum=teacher_momentum(args, progress) if model.needs.teacher else None,
                scheduled={} if progress.steps_per_epoch is None else model.read_schedules(progress),
            )
        )
    return rows


def _learning_rate(args: EquiSSLTrainingArguments, plan: Schedule) -> Callable[[int], float] | None:
    """Make the function step -> learning rate of the Trainer's scheduler; ``None`` if it depends on more than steps."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=plan.learning_rate)
    kwargs: Any = args.lr_scheduler_kwargs
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, plan.warmup_steps, plan.steps, kwargs)
    if not isinstance(scheduler, LambdaLR):
        return None
    return lambda step: float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step))
