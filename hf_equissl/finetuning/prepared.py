"""A fine-tuning run that is ready to start: model, data, settings and folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints import Manifest
from ..planning.arithmetic import schedule
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..utils.devices import precision_lines
from .adapters import Description
from .settings import METHODS, FineTuningSettings
from .tasks.base import Splits, Task
from .weights import count_parameters


@dataclass
class FineTuningRun:
    """A checked run, ready to train.

    Attributes:
        settings: All settings, with everything filled in that follows from others.
        args: Arguments of the Trainer.
        task: What is learned, bound to what the encoder reads.
        splits: The samples.
        model: The network, or a PEFT model around it.
        network: The encoder with the task's head.
        description: What the result will be.
        encoder_digest: Digest of the encoder with its input settings, as the probes name it in their records.
        checkpoint: Where training goes on, or ``None``.
    """

    settings: FineTuningSettings
    args: EquiSSLTrainingArguments
    task: Task
    splits: Splits
    model: Any
    network: nn.Module
    description: Description
    encoder_digest: str
    checkpoint: str | None

    @property
    def folder(self) -> Path:
        """Where the finished model or adapter goes."""
        return Path(self.settings.output_dir) / ("adapter" if self.settings.is_adapter else "model")

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is that of the last step."""
        return self.checkpoint is not None and Manifest.read(self.checkpoint).step >= self.steps

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return schedule(self.args, self.args.world_size, len(self.splits.train)).steps or 0

    def summary(self) -> str:
        """Say what will happen, for people."""
        settings, args, splits = self.settings, self.args, self.splits
        trained, total = count_parameters(self.model)
        batch = f"{settings.batch_size} x {args.world_size} x {settings.accumulation}"
        classes = f", {len(splits.classes)} classes" if splits.classes else ""
        method = METHODS[settings.method].description.format(head=self.task.head)
        return "\n".join(
            [
                *precision_lines(args.precision, args.device),
                *splits.remarks,
                f"{settings.method}: {method}; {trained:,} of {total:,} weights are trained ({trained / total:.2%}); "
                f"the head reads {self.description.pooling}",
                f"{len(splits.train)} training images, {len(splits.test)} test images ({splits.test_split}){classes}, "
                f"{self.description.image_size} pixels",
                f"batch {batch} = {args.global_batch_size}, learning rate {settings.learning_rate:.4g}, "
                f"{settings.epochs:g} epochs = {self.steps} steps",
                f"resuming from {self.checkpoint}" if self.checkpoint else f"starting in {settings.output_dir}",
            ]
        )
