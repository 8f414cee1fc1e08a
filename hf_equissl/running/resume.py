"""Where a run starts or goes on: which checkpoint continues it, and under which launch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoints import ENCODER_FOLDER, Manifest, checkpoint_step, newest_checkpoint
from ..data import ImageSource
from ..distributed.engines import Engine, find_asked_engine
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.run_record import RunRecord, SettingChange
from ..recipes.overrides import as_mapping, expand_paths
from ..recipes.recipe import Recipe, drop_without_effect
from ..utils.redaction import redact_values
from ..utils.strict_yaml import load_yaml
from ..utils.suggestions import RecipeError
from .changes import KEPT, describe_changes, find_changes
from .checks import read_named_checkpoint
from .initial_weights import InitialWeights, adopt_encoder, load_initial_weights
from .precision import keep_precision

# The sections of a recipe that its weights follow from; a checkpoint continues only a run that agrees in them.
_IDENTITY = ("model", "objectives", "views")
# Which images, in which order, and what becomes black and white in them; a fingerprint compares the files themselves.
_IDENTITY_DATA: dict[str, Any] = {"split": "train", "streaming": False, "value_range": "full", "subset": None}


@dataclass(frozen=True)
class Launch:
    """What a start brings to a run beside its recipe.

    Attributes:
        per_device, processes, accumulation: Their product is the global batch.
        engine: What shares the model out; ``None`` in a dry run, which has none.
    """

    per_device: int
    processes: int
    accumulation: int
    engine: Engine | None = None

    @classmethod
    def of(cls, args: EquiSSLTrainingArguments, processes: int, dry: bool = False) -> Launch:
        """Make the launch of these arguments on so many processes."""
        engine = None if dry else find_asked_engine(args)
        return cls(args.per_device_train_batch_size, processes, args.gradient_accumulation_steps, engine)

    @property
    def batch(self) -> int:
        """Images per optimizer step."""
        return self.per_device * self.processes * self.accumulation


def is_finished(recipe: Recipe, folder: str | Path) -> bool:
    """Whether ``folder`` holds the encoder of exactly this recipe: written after the recipe that a run starts with.

    Raises:
        RecipeError: What the run there keeps as its recipe is damaged.
    """
    stored, encoder = Path(folder) / "recipe.yaml", Path(folder) / ENCODER_FOLDER / "config.json"
    if not (stored.is_file() and encoder.is_file()):
        return False
    before, asked = _read_both(recipe, stored)
    return encoder.stat().st_mtime >= stored.stat().st_mtime and before == asked


def name_difference(recipe: Recipe, folder: str | Path) -> str:
    """Name the first value in which the run in ``folder`` is not of this recipe, names and descriptions aside.

    Returns:
        "KEY is VALUE, not VALUE", the run's first; "" where there is none, or no run.

    Raises:
        RecipeError: What the run keeps as its recipe is damaged.
    """
    stored = Path(folder) / "recipe.yaml"
    if not stored.is_file():
        return ""
    sections = (*_IDENTITY, "training", "data")
    before, asked = (_flatten({key: of.get(key) for key in sections}) for of in _read_both(recipe, stored))
    for key in before | asked:
        if before.get(key) != asked.get(key):
            return f"{key} is {before.get(key)!r}, not {asked.get(key)!r}"
    return ""


def _read_both(recipe: Recipe, stored: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what a run keeps as its recipe, and write ``recipe`` as the run would have kept it."""
    before = drop_without_effect(_read_stored(stored))  # first: it says best what is wrong with the file
    recipe = keep_precision(_adopt_as_stored(recipe, stored.parent) or recipe, stored.parent)
    return before, drop_without_effect(redact_values(recipe.to_dict()))


def find_start(
    recipe: Recipe, output_dir: str | Path | None, resume: str, launch: Launch
) -> tuple[Recipe, str | None, InitialWeights | None]:
    """Find where a run starts or goes on. One that goes on needs nothing of the encoder that it once started from.

    Returns:
        The recipe, adopted if it starts from an encoder; the checkpoint to go on from, or ``None``; the weights to
        start from, or ``None`` with a checkpoint or for random weights.

    Raises:
        RecipeError: As ``find_checkpoint``, ``load_initial_weights`` and ``adopt_encoder``.
    """
    adopted = recipe if recipe.model.get("init_from") is None else None
    checkpoint = None
    if output_dir is not None:
        adopted = adopted or _adopt_as_stored(recipe, Path(resume).parent if _is_folder(resume) else Path(output_dir))
        checkpoint = find_checkpoint(adopted or recipe, output_dir, resume, launch)
    if recipe.model.get("init_from") is None or (adopted is not None and checkpoint is not None):
        return adopted or recipe, checkpoint, None
    initial = load_initial_weights(recipe)
    adopted = adopt_encoder(recipe, initial.encoder.config, initial.normalisation, initial.revision)
    if output_dir is not None:
        # The encoder may no longer be what it was for the run in this folder.
        find_checkpoint(adopted, output_dir, resume, launch)
    return adopted, checkpoint, None if checkpoint else initial


def _adopt_as_stored(recipe: Recipe, folder: Path) -> Recipe | None:
    """Repeat what ``adopt_encoder`` did for the run in ``folder``; ``None`` if that started from something else."""
    if recipe.model.get("init_from") is None or not (folder / "recipe.yaml").is_file():
        return None
    before = Recipe.load_kept(folder / "recipe.yaml")
    asked, used = redact_values(recipe.model), before.model
    revision = used.get("init_revision")
    same = all(asked.get(key) == used.get(key) for key in ("init_from", "init_subfolder"))
    if not same or asked.get("init_revision") not in (None, revision):
        return None
    normalisation = before.views.image_mean, before.views.image_std
    return adopt_encoder(recipe, before.build_encoder_config(), normalisation, revision)


def _is_folder(resume: str) -> bool:
    return resume not in ("auto", "never")


def find_checkpoint(recipe: Recipe, output_dir: str | Path, resume: str, launch: Launch) -> str | None:
    """Find the checkpoint to go on from; ``None`` to start.

    Raises:
        RecipeError: ``resume`` names no complete checkpoint; the folder holds checkpoints or the encoder of another
            recipe, or holds checkpoints although none shall be used: a later resume would find the wrong ones; or the
            checkpoint cannot be continued by this launch.
    """
    found = newest_checkpoint(output_dir)
    if resume == "never" and found:
        raise RecipeError(f"--resume never: {output_dir} holds {Path(found).name} already. Name a new folder.")
    _check_same_run(recipe, Path(output_dir), launch)
    if resume == "never":
        return None
    chosen = found
    if resume != "auto":
        named = read_named_checkpoint(resume)
        _check_same_run(recipe, Path(resume).parent, launch)
        chosen = str(Path(resume))
        if found and checkpoint_step(found) > named.step:
            raise RecipeError(
                f"--resume {resume}: {output_dir} holds {Path(found).name}, which is further. Name a new --output_dir "
                "to start a branch from the older checkpoint, or --resume auto to go on."
            )
    if chosen is not None:
        _check_launch(chosen, launch)
    return chosen


def _check_launch(checkpoint: str, launch: Launch) -> None:
    """Refuse a checkpoint that the engine of this launch cannot read. All but DeepSpeed read each other's by name."""
    saved, engine = Manifest.read(checkpoint), launch.engine
    anew = f"start anew from its weights: --init_from {checkpoint} and a new --output_dir"
    if saved.format == "weights":
        raise RecipeError(
            f"{checkpoint} was saved with save_only_model: it has no optimizer state and cannot be continued. Name a "
            f"new --output_dir, or {anew}."
        )
    if engine is None or not (saved.engine.is_deepspeed or engine.is_deepspeed):
        return
    if (saved.engine, saved.world_size) != (engine, launch.processes):
        remedy = (
            f"Start it on {_count(saved.world_size)} under {saved.engine} as before"
            if saved.engine.is_deepspeed
            else f"Start it under {saved.engine} as before (or another engine that is not DeepSpeed)"
        )
        raise RecipeError(
            f"{checkpoint} was written by {saved.engine} on {_count(saved.world_size)}, and this launch is {engine} on "
            f"{_count(launch.processes)}. DeepSpeed continues only what the same stage wrote on as many processes. "
            f"{remedy}, or {anew}."
        )


def _count(processes: int) -> str:
    return f"{processes} process{'es' if processes != 1 else ''}"


def describe_resume(checkpoint: str | None, launch: Launch) -> tuple[str, ...]:
    """Say in lines for people what a change of launch means for a run that goes on."""
    if checkpoint is None or launch.engine is None:
        return ()
    saved = Manifest.read(checkpoint)
    if (saved.engine, saved.world_size) == (launch.engine, launch.processes):
        return ()
    lines = [
        f"note: {Path(checkpoint).name} was written by {saved.engine} on {_count(saved.world_size)}; this launch goes "
        f"on as {launch.engine} on {_count(launch.processes)}"
    ]
    if saved.world_size != launch.processes:
        lines.append("note: drop path, if the model has it, draws anew: each process had random numbers of its own")
    return tuple(lines)


def check_continuation(
    checkpoint: str | None, args: EquiSSLTrainingArguments, steps: int | None, source: ImageSource
) -> tuple[tuple[SettingChange, ...], tuple[str, ...]]:
    """Check that a run has something left to train after its checkpoint, and that on the images it has seen so far.

    Returns:
        The settings that changed since the run's first steps, and lines for people about them; nothing of a new run or
        of one whose last step is done.

    Raises:
        RecipeError: The checkpoint is further than the run's last step, or the images are other ones.
    """
    done = None if checkpoint is None else Manifest.read(checkpoint).step
    if checkpoint is None or done == steps:
        return (), ()
    if done is not None and steps is not None and done > steps:
        raise RecipeError(
            f"{checkpoint} is at step {done}, and this run ends at step {steps}. Name a new --output_dir, or "
            "train longer: a larger --training.max_steps or --training.num_train_epochs."
        )
    notes = check_same_data(checkpoint, source)
    changes = find_changes(checkpoint, args, steps)
    return changes, notes + describe_changes(changes, checkpoint, args)


def check_same_data(checkpoint: str, source: ImageSource) -> tuple[str, ...]:
    """Compare the images with those that the run has seen so far; under which path they lie does not matter.

    Returns:
        A line that says that a stream is another one, if it is: it tells by itself where it goes on.

    Raises:
        RecipeError: A data set that is read by index is another one, so that its order is, too.
    """
    before = RunRecord.find(Path(checkpoint).parent)
    if before is None or before.data_fingerprint in ("", source.fingerprint()):
        return ()
    if source.streaming:
        return (f"note: {source.name} is not the data that this run has read so far: files or their content changed",)
    count = "" if before.num_images == source.num_rows else f" (then {before.num_images} images, now {source.num_rows})"
    raise RecipeError(
        f"{source.name} is not the data set that {checkpoint} was trained on{count}: images were added, removed, "
        "renamed or replaced. Give the same images, wherever they lie, or start anew from its weights: "
        f"--init_from {checkpoint} and a new --output_dir."
    )


def _check_same_run(recipe: Recipe, folder: Path, launch: Launch) -> None:
    """Refuse a folder with checkpoints or an encoder of another run; one without either belongs to nobody."""
    stored, checkpoint = folder / "recipe.yaml", newest_checkpoint(folder)
    if not stored.is_file() or not (checkpoint or (folder / ENCODER_FOLDER).is_dir()):
        return
    before, now = (_flatten(_identity(plain)) for plain in (_read_stored(stored), redact_values(recipe.to_dict())))
    for key in before | now:  # in their order: a seed before the data's seed, which follows it
        if key != "model.attn_implementation" and before.get(key) != now.get(key):
            raise RecipeError(
                f"{folder} holds a run with {key} = {before.get(key)!r}, and this recipe says {now.get(key)!r}. "
                "Name a new --output_dir, or go on with the same recipe."
            )
    batch = _find_trained_batch(folder, checkpoint)
    if batch is not None and batch != launch.batch:
        raise RecipeError(
            f"{folder} holds a run with a global batch of {batch} images, and this launch makes {launch.per_device} "
            f"per device x {_count(launch.processes)} x {launch.accumulation} accumulated = {launch.batch}. "
            f"{_suggest_batch(batch, launch)}or name a new --output_dir."
        )


def _find_trained_batch(folder: Path, checkpoint: str | None) -> int | None:
    """Find the images per optimizer step of the run in ``folder``; ``None`` where nothing says."""
    if checkpoint is not None:
        return Manifest.read(checkpoint).global_batch
    record = RunRecord.find(folder)
    return None if record is None else record.global_batch


def _suggest_batch(batch: int, launch: Launch) -> str:
    """Say how this launch would make ``batch``."""
    share, rest = divmod(batch, launch.processes)
    if rest or not share:
        return f"Start it on a number of processes that divides {batch}, "
    per_device = math.gcd(share, launch.per_device)
    return (
        f"Set --training.per_device_train_batch_size {per_device} --training.gradient_accumulation_steps "
        f"{share // per_device}, "
    )


def _identity(plain: dict[str, Any]) -> dict[str, Any]:
    """Take the parts of a recipe that its weights follow from, with defaults: naming a default changes nothing."""
    defaults = {item.name: item.default for item in fields(EquiSSLTrainingArguments)}
    training = {key: defaults[key] for key in KEPT} | as_mapping(plain.get("training"), "training")
    if training["data_seed"] is None:
        training["data_seed"] = training["seed"]
    data = as_mapping(plain.get("data"), "data")
    return {
        **{key: plain.get(key) for key in _IDENTITY},
        "training": {key: training[key] for key in KEPT},
        "data": {key: data.get(key, default) for key, default in _IDENTITY_DATA.items()},
    }


def _read_stored(path: Path) -> dict[str, Any]:
    """Read what a run keeps as its recipe.

    Raises:
        RecipeError: It is damaged.
    """
    try:
        return expand_paths(as_mapping(load_yaml(path.read_text(encoding="utf-8"), str(path)), str(path)))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path.parent} holds a run whose {path.name} cannot be read ({str(error).rstrip('.')}). Restore that "
            "file, or move the folder away."
        ) from error


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}.{key}".lstrip(".")).items()}
