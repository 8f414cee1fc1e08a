"""A fine-tuning run that is ready to start: model, data, settings and folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..planning.arithmetic import schedule
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..running.output_folder import (
    trained_steps,
)
from ..views.pipelines import ViewPipeline
from .adapters import Description
from .classifier import count_parameters
from .labelled_images import LabelledImages
from .settings import METHODS, FineTuningSettings


@dataclass
class FineTuningRun:
    """A checked run, ready to train.

    Attributes:
        settings: With the learning rate filled in.
        args: Arguments of the Trainer.
        model: The classifier, or a PEFT model around it.
        classifier: The classifier itself.
        description: What the result will be.
        images: Both splits.
        pipeline: One training view.
        encoder_digest: Of the encoder with its input settings, as the probes name it in their records.
        checkpoint: Where training goes on, or ``None``.
        finished: The folder of the result, if the run is over already.
    """

    settings: FineTuningSettings
    args: EquiSSLTrainingArguments
    model: Any
    classifier: PreTrainedModel
    description: Description
    images: LabelledImages
    pipeline: ViewPipeline
    encoder_digest: str
    checkpoint: str | None

    @property
    def folder(self) -> Path:
        """Where the finished model or adapter goes."""
        return Path(self.settings.output_dir) / ("adapter" if self.settings.is_adapter else "model")

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is that of the last step."""
        return self.checkpoint is not None and trained_steps(self.checkpoint) >= self.steps

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return schedule(self.args, self.args.world_size, len(self.images.train)).steps or 0

    def summary(self) -> str:
        """What will happen, for people."""
        settings, args = self.settings, self.args
        trained, total = count_parameters(self.model)
        batch = f"{settings.batch_size} x {args.world_size} x {settings.accumulation}"
        return "\n".join(
            [
                f"{settings.method}: {METHODS[settings.method].description}; {trained:,} of {total:,} weights are "
                f"trained ({trained / total:.2%}); the head reads {self.description.pooling}",
                f"{len(self.images.train)} training images, {len(self.images.test)} test images "
                f"({self.images.test_split}), {len(self.images.classes)} classes, {self.description.image_size} pixels",
                f"batch {batch} = {args.global_batch_size}, learning rate {settings.learning_rate:.4g}, "
                f"{settings.epochs:g} epochs = {self.steps} steps",
                f"resuming from {self.checkpoint}" if self.checkpoint else f"starting in {settings.output_dir}",
            ]
        )
