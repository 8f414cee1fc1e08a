"""What a DataLoader reads of a task's samples, for training and for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data import ImageDecodeError, SampleDataset
from .tasks.base import Samples, Task

logger = logging.getLogger(__name__)


class TaskDataset(SampleDataset):
    """Training samples of a task, by ``(epoch, index)``."""

    def __init__(self, task: Task, samples: Samples, seed: int) -> None:
        super().__init__(samples.name, len(samples), seed)
        self.task, self.samples = task, samples

    def read(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Decode one sample."""
        return self.samples.read(index)

    def make(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Transform one sample with its own generator."""
        return self.task.transform(sample, rng)

    def item_name(self, index: int) -> str:
        """Return what messages call a sample."""
        return self.samples.item_name(index)


class EvaluationDataset(Dataset[dict[str, Any]]):
    """Test samples of a task, in order; ``missing`` says of each whether it is the task's blank one.

    That stands for a sample that does not decode; one warning names the latter.
    """

    def __init__(self, task: Task, samples: Samples) -> None:
        self.task, self.samples = task, samples

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Make one sample."""
        try:
            sample, missing = self.samples.read(index), 0
        except ImageDecodeError as error:
            logger.warning("Skipped %s: %s", self.samples.item_name(index), error)
            sample, missing = self.task.blank(), 1
        return {**self.task.transform(sample, None), "missing": missing}


class TaskCollator:
    """A task's ``collate``, and before it in the batch what the run wants to know of the samples."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch, with ``missing`` int64 (B,) or, in training, ``index`` int64 (B,) and the list ``skipped``."""
        batch = self.task.collate(samples)
        batch = {name: value for name, value in batch.items() if name not in ("index", "missing", "seconds", "skipped")}
        # First a tensor (B,), because that is where the Trainer reads the size of a batch.
        known = "missing" if "missing" in samples[0] else "index"
        numbers = torch.tensor([sample[known] for sample in samples])
        if known == "missing":
            return {known: numbers, **batch}
        return {known: numbers, **batch, "skipped": [item for sample in samples for item in sample["skipped"]]}
