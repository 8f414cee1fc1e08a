"""A run's folder, read once: what was trained, how far, and by which settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from ..checkpoints import ARGUMENTS_FILE, ENCODER_FOLDER, MANIFEST, list_checkpoints, newest_checkpoint
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLPreTrainingConfig
from ..pretraining.run_record import RECORD_FILE, RunRecord
from ..utils.redaction import redact_values
from ..utils.strict_yaml import load_yaml
from .places import RECIPE_FILE, check_run_folder
from .privacy import last_component
from .terms import Terms, terms_of_recipe

# Arguments that say where and how a run reports, not what it computes.
_NOT_SETTINGS = (
    "output_dir",
    "run_name",
    "report_to",
    "run_report",
    "picture_steps",
    "logging_",
    "log_",
    "save_",
    "hub_",
    "push_",
    "disable_tqdm",
    "accelerator_config",
)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, as far as a publication needs it.

    Attributes:
        path: The folder.
        checkpoint: The newest complete checkpoint.
        config: Configuration of its ``EquiSSLForPreTraining``.
        steps: Optimizer steps of that checkpoint.
        planned_steps: Step at which the run ends.
        history: ``log_history`` of the Trainer.
        arguments: Training arguments that differ from their defaults.
        recipe: The recipe that ``training/pretrain.py`` stored; ``None`` for a run from Python.
        record: Content of ``run.json``.
    """

    path: Path
    checkpoint: Path
    config: EquiSSLPreTrainingConfig
    steps: int
    planned_steps: int
    history: tuple[Mapping[str, Any], ...]
    arguments: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    record: RunRecord

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a run's folder.

        Raises:
            ValueError: It is not a folder, holds no complete checkpoint or no ``run.json``, or a file in it is damaged;
                a newer checkpoint is damaged.
        """
        path = Path(path)
        check_run_folder(path)
        found = newest_checkpoint(path)
        if found is None:
            raise ValueError(_no_checkpoint(path))
        checkpoint = Path(found)
        _refuse_older(checkpoint)
        state = _json(checkpoint / "trainer_state.json")
        config = _json(checkpoint / "config.json")
        if config.get("model_type") != EquiSSLPreTrainingConfig.model_type:
            raise ValueError(
                f"{checkpoint} holds a model of type {config.get('model_type')!r}, expected "
                f"{EquiSSLPreTrainingConfig.model_type!r}. Give the folder of a pretraining run."
            )
        if not (path / RECORD_FILE).is_file():
            raise ValueError(f"{path} has no {RECORD_FILE}. Continue the run for a step, which writes it.")
        recipe = path / RECIPE_FILE
        arguments = checkpoint / ARGUMENTS_FILE
        return cls(
            path=path,
            checkpoint=checkpoint,
            config=EquiSSLPreTrainingConfig.from_dict(config),
            steps=int(state["global_step"]),
            planned_steps=int(state.get("max_steps") or state["global_step"]),
            history=tuple(redact_values(state.get("log_history", ()))),
            arguments=_choose_changed(_json(arguments)) if arguments.is_file() else {},
            recipe=_recipe(recipe) if recipe.is_file() else None,
            record=RunRecord.load(path),
        )

    @property
    def name(self) -> str:
        """The recipe's name, otherwise the folder's."""
        return str((self.recipe or {}).get("name") or self.path.resolve().name)

    @property
    def data(self) -> str:
        """The training data as the user named them, without the split."""
        return self.section("data").get("source") or self.record.data.rpartition(" (")[0] or self.record.data

    def passes(self, steps: int) -> float | None:
        """Compute how often each training image was seen after ``steps``; ``None`` for a stream."""
        if self.record.num_images is None:
            return None
        return steps * self.record.global_batch / self.record.num_images

    @property
    def base_model(self) -> str | None:
        """Origin of the first weights: a Hub id, or the name of a run, folder or file; ``None`` if they were random."""
        model = self.section("model")
        source = model.get("init_from")
        # A run keeps the commit of an encoder from the Hub; "runs/rot" alone may have been a folder.
        if source is None or model.get("init_revision"):
            return source
        run, _, name = source.rstrip("/").rpartition("/")
        of_run = bool(run) and (name == ENCODER_FOLDER or name.startswith("checkpoint-"))
        return last_component(run if of_run else source)

    @property
    def transformation(self) -> str | None:
        """Name of the transformation family that the recipe's views are made with."""
        return (self.section("views").get("transformation") or {}).get("name")

    def terms(self, dataset: str | None = None) -> tuple[Terms, ...]:
        """Find the terms of what the run is made of; ``dataset`` is the Hub id that its publisher knows its data by."""
        return terms_of_recipe(self.recipe, data=self.data, dataset=dataset)

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section of the recipe; empty where there is none."""
        return (self.recipe or {}).get(name) or {}

    def objectives(self) -> dict[str, Any]:
        """Return the objectives that were trained, as a recipe names them; those of weight 0 are not built."""
        return {"invariance": self.config.invariance, "equivariance": self.config.trained}


def _refuse_older(checkpoint: Path) -> None:
    """Refuse to publish ``checkpoint`` in the place of a newer one that was complete once and is damaged."""
    for newer in reversed(list_checkpoints(checkpoint.parent)):
        if newer == checkpoint:
            return
        if (newer / MANIFEST).is_file():
            raise ValueError(
                f"{newer} is damaged (the warning says where), and {checkpoint.name} would be published in its place. "
                f"Train on from {checkpoint.name} with the run's command, or delete {newer.name} to publish that."
            )


def _no_checkpoint(path: Path) -> str:
    if (path / "config.json").is_file():
        run = path.resolve().parent
        hint = f" Did you mean the run's folder, {run}?" if newest_checkpoint(run) else ""
        return f"{path} holds a model, not a run.{hint}"
    if any((path / name).is_file() for name in (RECIPE_FILE, RECORD_FILE)):
        hint = "Give the folder of a run that has saved one: training.save_strategy must not be 'no'."
    else:
        hint = f"Nor {RECIPE_FILE} or {RECORD_FILE}: is it the folder that --output_dir of the training named?"
    return f"{path} holds no complete checkpoint (a folder checkpoint-N with checkpoint.json). {hint}"


def _recipe(path: Path) -> dict[str, Any]:
    return redact_values(load_yaml(path.read_text(encoding="utf-8"), str(path)))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Publish from a run whose checkpoint is whole.") from error


def _choose_changed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the training arguments that differ from their defaults and change a result."""
    defaults = {item.name: item.default for item in fields(EquiSSLTrainingArguments)}
    known = {key: value for key, value in arguments.items() if key in defaults and not key.startswith(_NOT_SETTINGS)}
    # Values that the arguments fill in themselves (None, empty, switched off) were not chosen.
    chosen = {key: value for key, value in known.items() if value not in (None, [], {}) and value != defaults[key]}
    return {key: value for key, value in chosen.items() if value is not False or defaults[key] is not None}
