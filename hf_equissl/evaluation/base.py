"""What every evaluator is: it reads a frozen encoder and returns result records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..encoders.base_image import resized_side
from ..encoders.frozen import FrozenEncoder, as_frozen
from .images import EvaluationData
from .results import ResultRecord


class Evaluator(ABC):
    """A measurement of a frozen encoder on fixed data.

    ``evaluator(encoder)`` measures every task; ``evaluate`` measures one task for some seeds, which is the unit that
    an interrupted run repeats. The encoder's weights, mode and device stay as they are. The same encoder, data,
    settings and seed give the same number.

    Attributes:
        name: Registry key.
        primary_metric: Name of the metric to quote.
        tasks: What it measures, one record per task, metric and kind of features.
        features: Kinds of features that it reads; the first one is the primary kind.
        seeds: Seeds of the heads.
        command: The command line that records carry.
    """

    name: ClassVar[str]
    primary_metric: ClassVar[str]
    tasks: tuple[str, ...]

    def __init__(self, data: EvaluationData, *, features: Sequence[str], seeds: int | Sequence[int] = 3) -> None:
        """Keep the data and the settings that all evaluators share; ``seeds`` = 3 means 0, 1, 2."""
        self.data = data
        self.features = tuple(features)
        self.seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
        self.command: str | None = None
        if not self.seeds:
            raise ValueError(f"{type(self).__name__} needs at least one seed, got seeds={seeds!r}.")
        if not self.features:
            raise ValueError(f"{type(self).__name__} needs at least one kind of features.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics that ``evaluate`` records."""
        return (self.primary_metric,)

    def __call__(self, encoder: FrozenEncoder | nn.Module | str | Path) -> list[ResultRecord]:
        """Measure every task for every seed."""
        encoder = as_frozen(encoder)
        return [record for task in self.tasks for record in self.evaluate(encoder, task, self.seeds)]

    @abstractmethod
    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Measure one task for the given seeds."""

    @abstractmethod
    def settings(self, task: str) -> dict[str, Any]:
        """Every setting of this evaluator that can change the number, except seeds, as plain types."""

    def protocol(self, encoder: FrozenEncoder, task: str) -> dict[str, Any]:
        """``settings`` together with those of the data and of the encoder's input."""
        side = resized_side(encoder.image_size)
        return {
            **self.settings(task),
            "image_size": encoder.image_size,
            **({} if side == encoder.image_size else {"resized_side": side}),
            "encoder_precision": encoder.precision,
            "train_split": self.data.train.split,
            "train_images": len(self.data.train),
            "test_images": len(self.data.test),
        }

    def records(
        self,
        encoder: FrozenEncoder,
        task: str,
        features: str,
        metrics: Mapping[str, Sequence[float]],
        seeds: Sequence[int],
        details: dict[str, list[Any]] | None = None,
    ) -> list[ResultRecord]:
        """One record per metric; ``details`` go to the record of the primary metric."""
        return [
            ResultRecord(
                evaluator=self.name,
                task=task,
                metric=metric,
                features=features,
                values=tuple(float(value) for value in values),
                seeds=tuple(seeds),
                primary=metric == self.primary_metric and features == self.features[0],
                dataset=self.data.test.dataset,
                split=self.data.test.split,
                protocol=self.protocol(encoder, task),
                encoder=encoder.name,
                encoder_digest=encoder.digest(),
                details=details or {} if metric == self.primary_metric else {},
                command=self.command,
            )
            for metric, values in metrics.items()
        ]

    def keys(self, encoder: FrozenEncoder, task: str) -> list[str]:
        """``ResultRecord.key`` of every record that ``evaluate`` makes of this encoder and task."""
        return [
            self.records(encoder, task, features, {metric: [0.0]}, [0])[0].key
            for features in self.features
            for metric in self.metrics
        ]

    def missing_seeds(self, encoder: FrozenEncoder, task: str, known: Sequence[ResultRecord]) -> tuple[int, ...]:
        """Seeds of ``task`` that ``known`` records of this very encoder and protocol do not cover."""
        found = {record.key: set(record.seeds) for record in known}
        covered = [found.get(key, set()) for key in self.keys(encoder, task)]
        return tuple(seed for seed in self.seeds if not all(seed in seeds for seeds in covered))
