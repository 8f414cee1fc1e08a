"""What every evaluator is: it reads a frozen encoder and returns result records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..encoders.base_image import resized_side
from ..encoders.frozen import FrozenEncoder, as_frozen
from ..utils.options import Option
from ..utils.versions import library_versions
from .data import EvaluationData
from .images import ImageSet
from .metrics import Metric
from .results import ResultRecord


@dataclass(frozen=True)
class Plot:
    """A picture of an evaluator's records.

    Attributes:
        file: Its name.
        title: What it is.
        draw: ``draw(records, path)`` saves it; ``ImportError`` without matplotlib.
        caption: ``caption(records)`` says in a sentence or two what there is to see.
    """

    file: str
    title: str
    draw: Callable[[Sequence[ResultRecord], Path], object]
    caption: Callable[[Sequence[ResultRecord]], str]


class Evaluator(ABC):
    """A measurement of a frozen encoder on fixed data.

    ``evaluator(encoder)`` measures every task; ``evaluate`` measures one task for some seeds, which is the unit that
    an interrupted run repeats. The encoder's weights, mode and device stay as they are. The same encoder, data,
    settings and seed give the same number.

    What a class declares is all that the command, tables, records and cards know of it; with
    ``EVALUATORS.register`` it becomes one of theirs.

    Attributes:
        name: Registry key.
        metrics: What it may record; the first one is the number to quote, unless ``primary_metric`` says otherwise.
        unmeasured: What a card says is unknown of an encoder on which it was not run, e.g. "robustness to noise".
        reading: A sentence that says how its numbers are read, for cards; units and directions are said anyway.
        hub_task: Task type under which the Hub lists its numbers.
        has_related_tasks: Whether its tasks are of one kind, so that a mean over them says something.
        data_type: What it is given. Another class than ``EvaluationData`` has a ``load`` of its own.
        needs_labels: Whether every image must have a class.
        needs_tokens: Whether it reads the patch tokens (``FrozenEncoder.maps``), which some encoders do not have.
        reads_stored: Whether it reads ``ImageSet.features``, which records name where ``feature_storage`` rounds them.
        options: Options that it adds to the command. Evaluators may share one.
        protocols: Protocol -> the settings that differ from the constructor's defaults.
        plots: Pictures of its records.
        tasks: What an instance measures, one record per task, metric, kind of features and test set.
        features: Kinds of features that it reads; the first one is the primary kind.
        seeds: Seeds of the heads.
        command: The command line that records carry.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    unmeasured: ClassVar[str] = ""
    reading: ClassVar[str] = ""
    hub_task: ClassVar[str] = "image-feature-extraction"
    has_related_tasks: ClassVar[bool] = False
    data_type: ClassVar[type[EvaluationData]] = EvaluationData
    needs_labels: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
    reads_stored: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = ()
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    plots: ClassVar[tuple[Plot, ...]] = ()
    tasks: tuple[str, ...]

    def __init__(self, data: EvaluationData, *, features: Sequence[str], seeds: int | Sequence[int] = 3) -> None:
        """Keep the data and the settings that all evaluators share; ``seeds`` = 3 means 0, 1, 2.

        Raises:
            ValueError: there are no seeds, no features, or no labels where they are needed.
        """
        self.data = data
        self.features = tuple(features)
        self.seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
        self.command: str | None = None
        if not self.seeds:
            raise ValueError(f"{type(self).__name__} needs at least one seed, got seeds={seeds!r}.")
        if not self.features:
            raise ValueError(f"{type(self).__name__} needs at least one kind of features.")
        if self.needs_labels:
            for part in (data.train, *data.tests):
                part.require_labels(type(self).__name__)

    @classmethod
    def applies_to(cls, data: EvaluationData) -> bool:
        """Return whether it is run on ``data`` without being asked for."""
        return isinstance(data, cls.data_type) and (data.is_labelled or not cls.needs_labels)

    @classmethod
    def variant(cls, record: ResultRecord) -> str:
        """Return what tells a record apart in a table from others of its task, e.g. " [reflect]"; often nothing."""
        return ""

    def features_of(self, encoder: FrozenEncoder) -> tuple[str, ...]:
        """List the kinds of features that are read of this encoder, the primary one first.

        Those of an encoder that gives one vector per image are all the same: it is measured once.
        """
        return self.features if len(encoder.backbone_parts) > 1 else self.features[:1]

    @property
    def primary_metric(self) -> str:
        """Name of the metric to quote on these data."""
        return self.metrics[0].name

    @property
    def recorded(self) -> tuple[Metric, ...]:
        """Those of ``metrics`` that are recorded on these data."""
        return self.metrics

    def __call__(self, encoder: FrozenEncoder | nn.Module | str | Path) -> list[ResultRecord]:
        """Measure every task for every seed."""
        encoder = as_frozen(encoder)
        return [record for task in self.tasks for record in self.evaluate(encoder, task, self.seeds)]

    @abstractmethod
    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Measure one task for the given seeds, on each of the test sets."""

    @abstractmethod
    def settings(self, task: str) -> dict[str, Any]:
        """Return every setting of this evaluator that can change the number, except seeds, as plain types."""

    def check(self, encoder: FrozenEncoder) -> None:
        """Raise ``ValueError`` where ``encoder`` lacks what is read."""
        encoder.check_features(self.features_of(encoder))
        if self.needs_tokens:
            encoder.check_maps()

    def protocol(self, encoder: FrozenEncoder, task: str, test: ImageSet | None = None) -> dict[str, Any]:
        """Return ``settings`` together with those of the data and of the encoder's input."""
        side = resized_side(encoder.image_size)
        stored = self.data.train.feature_storage if self.reads_stored else "fp32"
        return {
            **self.settings(task),
            "image_size": encoder.image_size,
            **({} if side == encoder.image_size else {"resized_side": side}),
            "encoder_precision": encoder.precision,
            **({} if stored == "fp32" else {"feature_storage": stored}),
            **self.data.train.decoding.difference(),
            "train_split": self.data.train.split,
            "train_images": len(self.data.train),
            "test_images": len(test or self.data.test),
        }

    def records(
        self,
        encoder: FrozenEncoder,
        task: str,
        features: str,
        values: Mapping[str, Sequence[float]],
        seeds: Sequence[int],
        details: dict[str, list[Any]] | None = None,
        test: ImageSet | None = None,
    ) -> list[ResultRecord]:
        """Make one record per metric.

        Args:
            encoder: What was measured.
            task: One of ``tasks``.
            features: One of ``features``.
            values: Name of a metric -> its value for each seed.
            seeds: The seeds.
            details: More about the record of the primary metric.
            test: What was judged; default: the first test set, whose primary metric is the number to quote.
        """
        test = test or self.data.test
        known = {metric.name: metric for metric in self.metrics}
        primary = self.primary_metric
        return [
            ResultRecord(
                evaluator=self.name,
                task=task,
                metric=metric,
                features=features,
                values=tuple(float(value) for value in numbers),
                seeds=tuple(seeds),
                primary=metric == primary and features == self.features_of(encoder)[0] and test is self.data.test,
                dataset=test.dataset,
                split=test.split,
                protocol=self.protocol(encoder, task, test),
                encoder=encoder.name,
                encoder_digest=encoder.digest(),
                details=details or {} if metric == primary else {},
                about=known[metric],
                hub_task=self.hub_task,
                command=self.command,
                versions=library_versions((known[metric].library,)),
            )
            for metric, numbers in values.items()
        ]

    def keys(self, encoder: FrozenEncoder, task: str) -> list[str]:
        """List the ``ResultRecord.key`` of every record that ``evaluate`` makes of this encoder and task."""
        nothing = {metric.name: [0.0] for metric in self.recorded}
        return [
            record.key
            for test in self.data.tests
            for features in self.features_of(encoder)
            for record in self.records(encoder, task, features, nothing, [0], test=test)
        ]

    def missing_seeds(self, encoder: FrozenEncoder, task: str, known: Sequence[ResultRecord]) -> tuple[int, ...]:
        """List the seeds of ``task`` that ``known`` records of this very encoder and protocol do not cover."""
        found = {record.key: set(record.seeds) for record in known}
        covered = [found.get(key, set()) for key in self.keys(encoder, task)]
        return tuple(seed for seed in self.seeds if not all(seed in seeds for seeds in covered))
