"""The folder of a run: whether it can be written, whether it has room, and where the run goes on or starts."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import ENCODER_FOLDER, newest_checkpoint
from .hub.export import check_replaceable
from .initialisation import InitialWeights, load_initial_weights, settle
from .overrides import as_mapping
from .recipes import Recipe
from .strict import RecipeError, load_yaml
from .training_arguments import EquiSSLTrainingArguments

if TYPE_CHECKING:
    from .run_plan import Schedule

GIB = 1024**3
# What one run's weights mean follows from these; a checkpoint continues only a run that agrees in them.
_IDENTITY = ("model", "objectives", "views")
# So do these: which images meet in which step, how the optimizer's groups are cut (its state follows them), what the
# teacher averages, what schedules call an epoch. How many steps there are may change: runs are prolonged.
_IDENTITY_TRAINING = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "epoch_steps",
    "layer_decay",
    "patch_embedding_lr_multiplier",
    "freeze_last_layer_epochs",
    "freeze_last_layer_by",
    "teacher_momentum",
    "teacher_momentum_end",
)


def trained_steps(checkpoint: str) -> int:
    """The step at which a complete checkpoint was written."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def check_output_folder(folder: str | Path) -> None:
    """Create ``folder`` and make sure that it can be written, and the encoder in it at the end.

    Raises:
        RecipeError: it is a file, or cannot be created or written, or files of others lie where the encoder goes.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        check_replaceable(folder / ENCODER_FOLDER)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if path.is_file())
        raise RecipeError(f"--output_dir {folder}: {file} is a file. Name a folder.") from error
    except OSError as error:
        raise RecipeError(
            f"--output_dir {folder}: cannot be written ({error.strerror}). Name another folder."
        ) from error
    except ValueError as error:
        raise RecipeError(f"--output_dir {folder}: {error}") from error


def check_disk_space(folder: str | Path, needed_bytes: int) -> None:
    """Raise ``RecipeError`` if the disk of ``folder`` cannot take ``needed_bytes``."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RecipeError(
            f"--output_dir {folder}: the run will write about {needed_bytes / GIB:.2f} GiB of checkpoints and "
            f"{free / GIB:.2f} GiB are free. Free some space, name another disk, or keep fewer checkpoints: "
            "--training.save_total_limit 1, or a larger --training.save_steps."
        )


def disk_need(args: EquiSSLTrainingArguments, plan: Schedule, checkpoint: int) -> int:
    """Checkpoints that will lie there at once, one more while the next is written, and the encoder."""
    if args.save_strategy == "no":
        return checkpoint
    written = 1
    if args.save_strategy == "epoch" and plan.epochs:
        written = math.ceil(plan.epochs)
    elif plan.steps:
        written = math.ceil(plan.steps / (args.save_steps if args.save_steps >= 1 else args.save_steps * plan.steps))
    kept = min(written, args.save_total_limit or written)
    return checkpoint * (kept + min(1, written - kept) + 1)


def is_finished(recipe: Recipe, folder: str | Path) -> bool:
    """Whether ``folder`` holds the encoder of exactly this recipe: written after the recipe that a run starts with."""
    stored, encoder = Path(folder) / "recipe.yaml", Path(folder) / ENCODER_FOLDER / "config.json"
    if not (stored.is_file() and encoder.is_file()):
        return False
    recipe = _settle_as_stored(recipe, Path(folder)) or recipe
    return encoder.stat().st_mtime >= stored.stat().st_mtime and _stored(stored) == recipe.to_dict()


def find_start(
    recipe: Recipe, output_dir: str | Path | None, resume: str
) -> tuple[Recipe, str | None, InitialWeights | None]:
    """Where a run goes on or starts. A run that goes on needs nothing of the encoder that it once started from.

    Returns:
        The recipe, settled if it starts from an encoder; the checkpoint to go on from, or ``None``; the weights to
        start from, or ``None`` with a checkpoint or for random weights.

    Raises:
        RecipeError: as ``find_checkpoint``, ``load_initial_weights`` and ``settle``.
    """
    settled = recipe if recipe.model.get("init_from") is None else None
    checkpoint = None
    if output_dir is not None:
        settled = settled or _settle_as_stored(recipe, Path(resume).parent if _is_folder(resume) else Path(output_dir))
        checkpoint = find_checkpoint(settled or recipe, output_dir, resume)
    if recipe.model.get("init_from") is None or (settled is not None and checkpoint is not None):
        return settled or recipe, checkpoint, None
    initial = load_initial_weights(recipe)
    settled = settle(recipe, initial.encoder.config, initial.normalisation, initial.revision)
    if output_dir is not None:
        find_checkpoint(settled, output_dir, resume)  # the encoder may not be what it was for the run that lies there
    return settled, checkpoint, None if checkpoint else initial


def _settle_as_stored(recipe: Recipe, folder: Path) -> Recipe | None:
    """``recipe`` as ``settle`` made it for the run in ``folder``; ``None`` if that started from something else."""
    if recipe.model.get("init_from") is None or not (folder / "recipe.yaml").is_file():
        return None
    before = Recipe.load(folder / "recipe.yaml")
    asked, used = recipe.model, before.model
    revision = used.get("init_revision")
    same = all(asked.get(key) == used.get(key) for key in ("init_from", "init_subfolder"))
    if not same or asked.get("init_revision") not in (None, revision):
        return None
    normalisation = before.views.image_mean, before.views.image_std
    return settle(recipe, before.build_encoder_config(), normalisation, revision)


def _is_folder(resume: str) -> bool:
    return resume not in ("auto", "never")


def find_checkpoint(recipe: Recipe, output_dir: str | Path, resume: str) -> str | None:
    """The checkpoint to go on from.

    Raises:
        RecipeError: ``resume`` names no complete checkpoint; the folder holds checkpoints or the encoder of another
            recipe, or holds checkpoints although none shall be used: a later resume would find the wrong ones.
    """
    found = newest_checkpoint(output_dir)
    if resume == "never":
        if found:
            raise RecipeError(f"--resume never: {output_dir} holds {Path(found).name} already. Name a new folder.")
        _check_same_recipe(recipe, Path(output_dir))
        return None
    _check_same_recipe(recipe, Path(output_dir))
    if resume == "auto":
        return found
    folder = Path(resume)
    if not (folder / "trainer_state.json").is_file():
        raise RecipeError(f"--resume {resume}: no complete checkpoint. Use auto, never or a folder checkpoint-N.")
    _check_same_recipe(recipe, folder.parent)
    if found and _step(found) > _step(folder):
        raise RecipeError(
            f"--resume {resume}: {output_dir} holds {Path(found).name}, which is further. Name a new --output_dir to "
            "start a branch from the older checkpoint, or --resume auto to go on."
        )
    return str(folder)


def _step(checkpoint: str | Path) -> int:
    """The step in the name of a folder ``checkpoint-N``; 0 for another name."""
    number = Path(checkpoint).name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuse a folder with checkpoints or an encoder of another recipe; one without results is anybody's."""
    stored = folder / "recipe.yaml"
    if not stored.is_file() or not (newest_checkpoint(folder) or (folder / ENCODER_FOLDER).is_dir()):
        return
    before, now = (_flat(_identity(plain)) for plain in (_stored(stored), recipe.to_dict()))
    for key in before | now:  # in their order: a seed before the data's seed, which follows it
        if key != "model.attn_implementation" and before.get(key) != now.get(key):
            raise RecipeError(
                f"{folder} holds a run with {key} = {before.get(key)!r}, and this recipe says {now.get(key)!r}. "
                "Name a new --output_dir, or go on with the same recipe."
            )


def _identity(plain: dict[str, Any]) -> dict[str, Any]:
    """The parts of a recipe that its weights follow from, defaults filled in: to name a default changes nothing."""
    defaults = {item.name: item.default for item in fields(EquiSSLTrainingArguments)}
    training = {key: defaults[key] for key in _IDENTITY_TRAINING} | as_mapping(plain.get("training"), "training")
    if training["data_seed"] is None:
        training["data_seed"] = training["seed"]
    return {
        **{key: plain.get(key) for key in _IDENTITY},
        "training": {key: training[key] for key in _IDENTITY_TRAINING},
        "data": {"split": as_mapping(plain.get("data"), "data").get("split", "train")},
    }


def _stored(path: Path) -> dict[str, Any]:
    return as_mapping(load_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}
