"""The result record: a number with everything that is needed to read it, and how records are kept and shown as text."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..utils.files import write_text
from ..utils.redaction import redact_values
from ..utils.versions import library_versions
from .metric import EFFECTIVE_RANK, FEATURE_STD, R2, R2_SCALAR, TOP1, TOP5, Metric

FORMAT_VERSION = 1
# Older records do not say what their metric is: it is one of these.
_BEFORE = {metric.name: metric for metric in (TOP1, TOP5, R2, R2_SCALAR, EFFECTIVE_RANK, FEATURE_STD)}
# Properties that ``to_dict`` writes down, too.
_DERIVED = ("value", "std", "comparability")
# Entries of a protocol that follow from the encoder: what they say of two encoders may differ.
_OF_THE_ENCODER = {"trained_parameters", "parameters"}
# What records of hf_equissl.finetuning name as their evaluator.
FINE_TUNING = "finetune"


@dataclass(frozen=True)
class ResultRecord:
    """One metric of one encoder on one data set under one protocol, over one or more seeds.

    Attributes:
        evaluator: Registry key of the evaluator.
        task: What was asked: a transformation family, "classification", "representation", ...
        metric: Name of the number: "r2", "r2_scalar", "top1", ...
        features: Which features of the encoder: "backbone", "cls", "equivariant", ...
        values: The number for each seed.
        seeds: The seeds, in the order of ``values``.
        primary: Whether this is the number to quote for the task.
        dataset: The source that was given.
        split: The split that the number is measured on.
        protocol: Every setting that can change the number, except seeds.
        encoder: Path or Hub id, or the class of a module that was handed over.
        encoder_digest: Digest of the encoder's weights and input settings.
        details: Further numbers, one list entry per seed, e.g. R2 of each parameter.
        about: What the metric is: unit, digits, direction. Default: what is known of a metric of that name.
        hub_task: Task type of the Hub, e.g. "image-classification". Default: by the task.
        command: The command line, where there was one.
        versions: Library versions.
        date: UTC, ISO 8601.
    """

    evaluator: str
    task: str
    metric: str
    features: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    primary: bool
    dataset: str
    split: str
    protocol: dict[str, Any]
    encoder: str
    encoder_digest: str
    details: dict[str, list[Any]] = field(default_factory=dict)
    about: Metric = None  # type: ignore[assignment]  # filled in below
    hub_task: str = ""
    command: str | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if len(self.values) != len(self.seeds) or not self.values:
            raise ValueError(f"A record needs one value per seed, got values {self.values} and seeds {self.seeds}.")
        if not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"{self.evaluator}, {self.task}: {self.metric} is not finite: {self.values}.")
        for name, entries in self.details.items():
            if len(entries) != len(self.seeds):
                raise ValueError(f"details[{name!r}] has {len(entries)} entries for {len(self.seeds)} seeds.")
        for name in ("dataset", "split", "encoder", "command", "protocol", "details"):  # all of them may be published
            object.__setattr__(self, name, redact_values(getattr(self, name)))
        if self.about is None or self.about.name != self.metric:
            object.__setattr__(self, "about", _BEFORE.get(self.metric, Metric(self.metric)))
        if not self.hub_task:
            kind = "image-classification" if self.task == "classification" else "image-feature-extraction"
            object.__setattr__(self, "hub_task", kind)

    @property
    def name(self) -> str:
        """What was measured: "rotation r2", "linear top1", "finetune lora top1", "effective_rank"."""
        if self.task == "representation":
            return self.metric
        what = self.evaluator if self.task == "classification" else self.task
        return " ".join(filter(None, (what, self.protocol.get("method"), self.metric)))

    @property
    def text(self) -> str:
        """The mean over seeds for readers, with the standard deviation where there are several."""
        return self.about.text(self.value, self.std)

    @property
    def value(self) -> float:
        """Mean of the values over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds, ``None`` with a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def key(self) -> str:
        """Identity of the measurement: equal keys differ in seeds only and may be merged."""
        parts = (self.evaluator, self.task, self.metric, self.features, self.dataset, self.split, self.encoder)
        return json.dumps([*parts, self.encoder_digest, _plain(self.protocol)], sort_keys=True)

    @property
    def comparability(self) -> str:
        """Digest of all that can change the number but the encoder, its features, the seeds and library versions.

        Numbers of equal digests may be compared; others may not, and stand in columns of their own.
        """
        parts = (self.evaluator, self.task, self.metric, self.dataset, self.split)
        protocol = {name: value for name, value in self.protocol.items() if name not in _OF_THE_ENCODER}
        text = json.dumps([*parts, _plain(protocol)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def merge(self, other: ResultRecord) -> ResultRecord:
        """Add the seeds of ``other`` to this record; where both have a seed, ``other`` wins."""
        if self.key != other.key:
            raise ValueError(f"Records of different measurements cannot be merged: {self.key} and {other.key}.")
        rows: dict[int, tuple[float, dict[str, Any]]] = {}
        for record in (self, other):
            for position, seed in enumerate(record.seeds):
                details = {name: entries[position] for name, entries in record.details.items()}
                rows[seed] = (record.values[position], details)
        seeds = tuple(sorted(rows))
        names = [name for name in other.details if all(name in rows[seed][1] for seed in seeds)]
        return replace(
            other,
            seeds=seeds,
            values=tuple(rows[seed][0] for seed in seeds),
            details={name: [rows[seed][1][name] for seed in seeds] for name in names},
        )

    def to_dict(self) -> dict[str, Any]:
        """Turn the record into plain types, with what follows from them spelled out for readers of the file."""
        return {**{name: getattr(self, name) for name in _DERIVED}, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> ResultRecord:
        """Read what ``to_dict`` wrote."""
        names = {item.name for item in fields(cls)}
        unknown = set(entry) - names - set(_DERIVED)
        if unknown:
            raise ValueError(f"Unknown fields in a result record: {sorted(unknown)}.")
        given = {name: entry[name] for name in names if name in entry}
        given |= {"values": tuple(entry["values"]), "seeds": tuple(entry["seeds"])}
        return cls(**given | ({"about": Metric(**entry["about"])} if entry.get("about") else {}))


def _plain(value: Any) -> Any:
    """Turn tuples into lists, so that what is written and what is read back compare equal."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def merge_records(records: Iterable[ResultRecord]) -> list[ResultRecord]:
    """Merge records with equal keys, in the order of first appearance."""
    merged: dict[str, ResultRecord] = {}
    for record in records:
        merged[record.key] = merged[record.key].merge(record) if record.key in merged else record
    return list(merged.values())


def column_titles(records: Iterable[ResultRecord], title: Callable[[ResultRecord], str]) -> dict[str, str]:
    """Name one column per ``comparability``: its title, numbered from the second on where unlike ones share it."""
    named: dict[str, str] = {}
    for record in records:
        if record.comparability not in named:
            first = label = title(record)
            number = 2
            while label in named.values():
                label, number = f"{first} ({number})", number + 1
            named[record.comparability] = label
    return named


def save_records(records: Iterable[ResultRecord], path: str | os.PathLike[str]) -> None:
    """Write records as JSON, atomically."""
    content = {"format": FORMAT_VERSION, "results": [record.to_dict() for record in records]}
    write_text(Path(path), json.dumps(content, indent=2, allow_nan=False) + "\n")


def load_records(path: str | os.PathLike[str]) -> list[ResultRecord]:
    """Read what ``save_records`` wrote.

    Raises:
        ValueError: if the file is not such a file, with what was found.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Move it away, or choose another output folder.") from error
    known = isinstance(content, dict) and content.get("format") == FORMAT_VERSION
    if not known or not isinstance(content.get("results"), list):
        raise ValueError(f"{path} is not a result file of format {FORMAT_VERSION}.")
    try:
        return [ResultRecord.from_dict(entry) for entry in content["results"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Move it away, or choose another output folder.") from error
