"""What a training run was: kept beside its checkpoints, so that a model card can say it truthfully."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging

from ..data.jpeg import name_decoder
from ..utils.coercion import check_arguments
from ..utils.devices import describe_cpu, describe_device
from ..utils.files import write_text
from ..utils.redaction import drop_secrets, redact
from ..utils.versions import library_versions
from ..views.cropping import RESIZER
from .arguments import EquiSSLTrainingArguments

logger = logging.get_logger(__name__)
RECORD_FILE = "run.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SettingChange:
    """A setting that a run went on with from ``step`` on, in place of another.

    Attributes:
        step: Optimizer steps that were taken before.
        setting: A training argument; or "steps": at how many the run ends; or "resizer": what resizes crops.
        before, after: Its values.
    """

    step: int
    setting: str
    before: Any
    after: Any

    @property
    def text(self) -> str:
        """Describe the change, with the step from which it holds."""
        return f"after step {self.step} {self.setting} is {_format(self.after)} instead of {_format(self.before)}"


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


@dataclass(frozen=True)
class RunRecord:
    """One pretraining run, over all its interruptions.

    Attributes:
        command: The command line of the last start.
        data: What the user named, with the split.
        num_images: Images of the data set; ``None`` for a stream.
        data_fingerprint: ``ImageSource.fingerprint`` of the data set; empty where it was not taken.
        image_size: Side of the global crops, pixels.
        image_mean, image_std: Normalisation of the views, three numbers each.
        seed: Seed of weights and views.
        batch: ``per_device``, ``processes``, ``accumulation``; their product is an optimizer step's batch.
        precision: "fp32", "bf16" or "fp16".
        hardware: ``device`` (name), ``devices`` (how many), ``cpu`` (its kind, ``utils.devices.describe_cpu``),
            ``threads`` (per process).
        versions: Versions of Python and the libraries.
        started: First start, UTC, ISO 8601.
        starts: How often it was started: 1 for a run without interruption.
        steps: Optimizer steps taken.
        seconds: Wall time of training, without what an interruption lost.
        finished: End of the last step, or ``None``: still running, or stopped on the way.
        preempted: When a signal stopped it, or ``None``: it goes on, or ended in another way.
        changes: Settings that changed on the way, by step; all others are those of every step.
        decoder: What decoded plain JPEG files, with its version; whichever it is, pixels are the same.
        resizer: What resized crops; empty in records of versions that knew none but Pillow.
    """

    command: str
    data: str
    num_images: int | None
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    seed: int
    batch: dict[str, int]
    precision: str
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    started: str = ""
    starts: int = 1
    steps: int = 0
    seconds: float = 0.0
    finished: str | None = None
    preempted: str | None = None
    data_fingerprint: str = ""
    changes: tuple[SettingChange, ...] = ()
    decoder: str = ""
    resizer: str = ""

    def __post_init__(self) -> None:
        """Keep no secret that an address or a command holds: this is written down and published."""
        for name in ("command", "data"):
            object.__setattr__(self, name, redact(getattr(self, name)))

    @property
    def global_batch(self) -> int:
        """Images per optimizer step."""
        return self.batch["per_device"] * self.batch["processes"] * self.batch["accumulation"]

    def save(self, folder: str | Path) -> Path:
        """Write ``run.json`` into ``folder``, in one step."""
        path = Path(folder) / RECORD_FILE
        write_text(path, json.dumps({"format": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: no training run has begun in ``folder``.
            ValueError: the file is not such a file.
        """
        path = Path(folder) / RECORD_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}). It is written anew when the run is continued.") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT_VERSION:
            raise ValueError(f"{path} is not a run record of format {FORMAT_VERSION}.")
        names = {item.name for item in fields(cls)}
        if unknown := sorted(content.keys() - names):
            raise ValueError(f"{path} holds unknown entries {unknown}: it was written by another version.")
        try:
            changes = content.pop("changes", ())
            record = cls(**check_arguments(content, cls, RECORD_FILE))
            if not record.batch.keys() >= {"per_device", "processes", "accumulation"}:
                raise ValueError(f"batch: {record.batch}")
            return replace(record, changes=tuple(SettingChange(**change) for change in changes))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}). It is written anew when the run is continued.") from error

    @classmethod
    def find(cls, folder: str | Path) -> Self | None:
        """Read what ``save`` wrote; ``None`` where there is nothing, or nothing that can be read."""
        try:
            return cls.load(folder)
        except (OSError, ValueError):
            return None


def command_line() -> str:
    """Return the command of this process as one would type it, without tokens."""
    script = sys.argv[0]
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    start = ["-m", module.name.removesuffix(".__main__")] if module is not None and module.name else [script]
    return shlex.join(["python", *drop_secrets([*start, *sys.argv[1:]])])


def hardware(args: EquiSSLTrainingArguments) -> dict[str, Any]:
    """Describe the devices of a run."""
    return {
        "device": describe_device(args.device),
        "devices": args.world_size,
        "cpu": describe_cpu(),
        "threads": torch.get_num_threads(),
    }


class RunRecordCallback(TrainerCallback):
    """Writes ``run.json`` when training begins, with every checkpoint, and when it ends."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self._since = 0.0
        self._before = 0.0

    def on_train_begin(  # type: ignore[override]
        self, args: EquiSSLTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on with the record of the run that is resumed."""
        self._since = time.monotonic()
        if state.global_step > 0:
            earlier = RunRecord.find(str(args.output_dir))
            if earlier is not None:  # else it is lost, and the checkpoint is what counts
                self._before = earlier.seconds
                changes = self.record.changes or earlier.changes
                self.record = replace(self.record, started=earlier.started, starts=earlier.starts + 1, changes=changes)
        self._write(args, state)

    def on_save(  # type: ignore[override]
        self, args: EquiSSLTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how far the run is, after the checkpoint."""
        self._write(args, state)

    def on_train_end(  # type: ignore[override]
        self, args: EquiSSLTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the end, if it is one and not a stop on the way."""
        self._write(args, state, finished=_now() if state.global_step >= state.max_steps else None)

    def _write(self, args: EquiSSLTrainingArguments, state: TrainerState, finished: str | None = None) -> None:
        if not state.is_world_process_zero:
            return
        seconds = self._before + time.monotonic() - self._since
        record = replace(self.record, steps=state.global_step, seconds=round(seconds, 1), finished=finished)
        try:
            record.save(os.fspath(str(args.output_dir)))
        except OSError as error:  # a full disk: what was trained weighs more
            logger.warning(f"{RECORD_FILE} cannot be written in {args.output_dir} ({error}). The run goes on.")


def new_record(
    args: EquiSSLTrainingArguments,
    *,
    data: str,
    num_images: int | None,
    image_size: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    data_fingerprint: str = "",
) -> RunRecord:
    """Make the record of a run that begins now; the arguments are called as the attributes of ``RunRecord``."""
    return RunRecord(
        command=command_line(),
        data=data,
        num_images=num_images,
        image_size=image_size,
        image_mean=tuple(map(float, image_mean)),
        image_std=tuple(map(float, image_std)),
        seed=args.seed,
        batch={
            "per_device": args.per_device_train_batch_size,
            "processes": args.world_size,
            "accumulation": args.gradient_accumulation_steps,
        },
        precision=args.precision,
        hardware=hardware(args),
        versions=library_versions(("accelerate",)),
        started=_now(),
        data_fingerprint=data_fingerprint,
        decoder=name_decoder(),
        resizer=RESIZER,
    )


def note_preemption(folder: str | Path) -> None:
    """Say in ``run.json`` that a signal stopped the run now."""
    if (record := RunRecord.find(folder)) is not None:  # a run that was stopped earlier has no record
        replace(record, preempted=_now()).save(folder)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
