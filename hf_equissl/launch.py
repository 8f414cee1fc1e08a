"""From a recipe to a finished encoder: everything that can be wrong is found before the first step.

``prepare`` checks in the order in which a check costs: configurations, output folder, first images, one step on fake
tensors. ``pretrain`` trains and exports.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets.exceptions import DatasetsError
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import set_seed
from transformers.activations import ACT2FN

from .data import ImageViewDataset, SkippedImages, StreamingViewDataset
from .hub import save_encoder
from .overrides import as_mapping
from .planning import Cost, Schedule, checkpoint_bytes, measure, schedule, without_weights
from .pretraining import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from .recipes import Recipe
from .strict import RecipeError, load_yaml, nearest
from .trainer import EquiSSLTrainer, newest_checkpoint
from .training_arguments import EquiSSLTrainingArguments
from .views.base import Views
from .views.collator import collate_views
from .views.pipelines import ViewPipeline

ENCODER_FOLDER = "encoder"
FIRST_IMAGES = 8
GIB = 1024**3
ViewDataset = ImageViewDataset | StreamingViewDataset
# What one run's weights mean follows from these; a checkpoint continues only a run that agrees in them.
_IDENTITY = ("model", "objectives", "views")
# So do these, which say which images meet in which step. How many steps there are may change: runs are prolonged.
_IDENTITY_TRAINING = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps")


def is_main_process() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Run:
    """A checked run, ready to train.

    Attributes:
        recipe: Resolved.
        args: Arguments of the Trainer.
        config: Student and objectives.
        pipeline: Makes the views.
        dataset: ``None`` in a dry run without data.
        plan: Batch, learning rate and steps.
        first: Views of the first images.
        checkpoint: Where training goes on, or ``None``.
        unreadable: Names of those first images that do not decode.
    """

    recipe: Recipe
    args: EquiSSLTrainingArguments
    config: EquiSSLPreTrainingConfig
    pipeline: ViewPipeline
    dataset: ViewDataset | None
    plan: Schedule
    first: Views
    checkpoint: str | None
    unreadable: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is that of the last step: nothing is left to train."""
        return self.checkpoint is not None and _trained_steps(self.checkpoint) == self.plan.steps

    def cost(self) -> Cost:
        """Run one step on fake tensors.

        Raises:
            RecipeError: what the model says of shapes that do not fit.
        """
        try:
            return measure(self.config, self.first, self.args)
        except ValueError as error:
            raise RecipeError(f"The first step would fail: {error}") from error


def prepare(
    recipe: Recipe, output_dir: str | Path | None, resume: str = "auto", processes: int | None = None, dry: bool = False
) -> Run:
    """Build and check everything but the weights.

    Args:
        recipe: Names the data set in ``data.source``.
        output_dir: Created where it does not exist. ``None`` in a dry run: nothing is written.
        resume: "auto" (the newest complete checkpoint in ``output_dir``, if any), "never", or a checkpoint's folder.
        processes: Plan for so many, instead of those of this launch.
        dry: Without a data set, go on with blank images.

    Raises:
        RecipeError: names what is wrong and what to do.
    """
    if output_dir is not None and not str(output_dir):
        raise RecipeError("--output_dir is empty. Name a folder.")
    if processes is not None and processes < 1:
        raise RecipeError(f"--num_processes {processes}: expected 1 or more.")
    args = recipe.build_training_arguments(output_dir or "output")
    _check_length(args)
    config = recipe.build_pretraining_config()
    try:
        _, model = without_weights(config)
    except ValueError as error:
        raise RecipeError(f"objectives: {error}") from error
    except KeyError as error:
        name = config.encoder_config.hidden_act
        if name in ACT2FN:
            raise
        guess = nearest(name, ACT2FN)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise RecipeError(
            f"model.hidden_act: there is no {name!r}.{hint} Valid: {', '.join(sorted(ACT2FN))}."
        ) from error
    pipeline = recipe.build_pipeline(model.needs)
    checkpoint = None
    if output_dir is not None:
        checkpoint = find_checkpoint(recipe, output_dir, resume)
        check_output_folder(output_dir)
    processes = processes or args.world_size
    if dry and not recipe.data.get("source"):
        plan = schedule(args, processes, None)
        return Run(recipe, args, config, pipeline, None, plan, blank_views(pipeline), checkpoint)
    dataset, unshuffled = build_dataset(recipe, pipeline, args)
    num_images = None if isinstance(dataset, IterableDataset) else len(dataset)
    check_steps(args, num_images, processes)
    plan = schedule(args, processes, num_images)
    if checkpoint is not None and plan.steps is not None and (done := _trained_steps(checkpoint)) > plan.steps:
        raise RecipeError(
            f"{checkpoint} is at step {done}, and this run ends at step {plan.steps}. Name a new --output_dir, or "
            "train longer: a larger --training.max_steps or --training.num_train_epochs."
        )
    if output_dir is not None:
        check_disk_space(output_dir, _disk_need(args, plan, checkpoint_bytes(config)))
    first, unreadable = first_views(unshuffled, pipeline)
    run = Run(recipe, args, config, pipeline, dataset, plan, first, checkpoint, unreadable)
    if args.world_size == 1 and not dry:  # with more, the objectives' exchange between processes needs real tensors
        run.cost()
    return run


def pretrain(run: Run) -> Path:
    """Train, and export the encoder. A finished run is only exported: the Trainer would take one step more.

    Returns:
        The encoder's folder, which ``AutoModel.from_pretrained`` loads.
    """
    output = Path(str(run.args.output_dir))
    if run.dataset is None:
        raise RecipeError("data.source: no data set is named. Give one with --data.")
    if run.checkpoint is not None and run.finished:
        return _export_checkpoint(run, run.checkpoint, output)
    set_seed(run.args.seed)
    model = EquiSSLForPreTraining(run.config)
    try:
        trainer = EquiSSLTrainer(
            model=model,
            args=run.args,
            pipeline=run.pipeline,
            train_dataset=run.dataset,
            skipped_images=SkippedImages(run.recipe.max_bad_share, num_images=run.plan.images),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "to be installed" not in str(error):  # those of report_to are mendable
            raise
        raise RecipeError(f"training: {error}") from error
    if is_main_process():
        run.recipe.save(output)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    folder = output / ENCODER_FOLDER
    if is_main_process():
        encoder = model.export_encoder(state_dict=state)
        save_encoder(encoder, folder, run.pipeline.image_mean, run.pipeline.image_std)
    trainer.accelerator.wait_for_everyone()
    return folder


def _export_checkpoint(run: Run, checkpoint: str, output: Path) -> Path:
    """Export the encoder of a checkpoint as ``pretrain`` does after the last step."""
    folder = output / ENCODER_FOLDER
    if is_main_process():
        try:
            model = EquiSSLForPreTraining.from_pretrained(checkpoint)
        except OSError as error:
            raise RecipeError(
                f"{checkpoint}: the run is finished, but its weights cannot be read for the export ({error})."
            ) from error
        run.recipe.save(output)
        save_encoder(model.export_encoder(), folder, run.pipeline.image_mean, run.pipeline.image_std)
    PartialState().wait_for_everyone()
    return folder


def _trained_steps(checkpoint: str) -> int:
    """The step at which a complete checkpoint was written."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def check_output_folder(folder: str | Path) -> None:
    """Create ``folder`` and make sure that it can be written.

    Raises:
        RecipeError: it is a file, or cannot be created or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if path.is_file())
        raise RecipeError(f"--output_dir {folder}: {file} is a file. Name a folder.") from error
    except OSError as error:
        raise RecipeError(
            f"--output_dir {folder}: cannot be written ({error.strerror}). Name another folder."
        ) from error


def check_disk_space(folder: str | Path, needed_bytes: int) -> None:
    """Raise ``RecipeError`` if the disk of ``folder`` cannot take ``needed_bytes``."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RecipeError(
            f"--output_dir {folder}: the run will write about {needed_bytes / GIB:.2f} GiB of checkpoints and "
            f"{free / GIB:.2f} GiB are free. Free some space, name another disk, or keep fewer checkpoints: "
            "--training.save_total_limit 1, or a larger --training.save_steps."
        )


def _disk_need(args: EquiSSLTrainingArguments, plan: Schedule, checkpoint: int) -> int:
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


def _check_length(args: EquiSSLTrainingArguments) -> None:
    """Refuse a run of no steps, which the Trainer would end with a division by zero or export untrained."""
    if args.max_steps == 0:
        raise RecipeError("training.max_steps: expected 1 or more, or -1 to count epochs instead, got 0.")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise RecipeError(
            f"training.num_train_epochs: expected more than 0, got {args.num_train_epochs}. Say how long: "
            "--training.num_train_epochs N or --training.max_steps N."
        )


def check_steps(args: EquiSSLTrainingArguments, num_images: int | None, processes: int) -> None:
    """Refuse runs that have no step to take.

    Raises:
        RecipeError: a stream without ``max_steps``, or fewer images than one batch.
    """
    if num_images is None:
        if args.max_steps <= 0:
            raise RecipeError("training.max_steps: a stream has no length. Say how long: --training.max_steps N.")
        return
    batch = args.per_device_train_batch_size * processes
    if num_images == 0 or (args.dataloader_drop_last and num_images < batch):
        raise RecipeError(
            f"data: {num_images} images are fewer than one batch of {args.per_device_train_batch_size} x "
            f"{processes} = {batch}. Use more images or a smaller --training.per_device_train_batch_size."
        )


def build_dataset(
    recipe: Recipe, pipeline: ViewPipeline, args: EquiSSLTrainingArguments
) -> tuple[ViewDataset, ViewDataset]:
    """The data set of ``recipe`` for training, and one to look at the first images: a stream in its own order."""
    try:
        source = recipe.build_source()
    except (OSError, ValueError, DatasetsError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"data: {error}") from error
    seed = args.seed if args.data_seed is None else args.data_seed
    if not source.streaming:
        dataset = ImageViewDataset(source, pipeline, seed)
        return dataset, dataset
    buffer = {key: recipe.data[key] for key in ("shuffle_buffer",) if key in recipe.data}
    ranks = {"rank": args.process_index, "world_size": args.world_size}
    return (
        StreamingViewDataset(source, pipeline, seed, **buffer, **ranks),
        StreamingViewDataset(source, pipeline, seed, shuffle_buffer=0, repeat=False),
    )


def first_views(
    dataset: ViewDataset, pipeline: ViewPipeline, count: int = FIRST_IMAGES
) -> tuple[Views, tuple[str, ...]]:
    """Views of the first images, as epoch 0 makes them, and the names of images that do not decode.

    Raises:
        RecipeError: there are no images, or none of the first ones can be read.
    """
    try:
        if isinstance(dataset, IterableDataset):
            samples = list(islice(dataset, count))
        else:
            samples = [dataset[0, index] for index in range(min(count, len(dataset)))]
    except (OSError, ValueError, DatasetsError) as error:
        raise RecipeError(f"data: the first images cannot be read. {error}") from error
    if not samples:
        raise RecipeError("data: the data set is empty.")
    batch = collate_views(samples)
    skipped = batch.pop("skipped")
    return _make_views(pipeline, batch), tuple(record.name for record in skipped)


def blank_views(pipeline: ViewPipeline, count: int = 2) -> Views:
    """Views of grey images: what a data set would give, as far as shapes go."""
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (2 * pipeline.image_size, 2 * pipeline.image_size), (128, 128, 128))
    samples = [
        {"draws": torch.rand(pipeline.num_draws), **pipeline.crop(image, rng), "index": index, "label": 0}
        for index in range(count)
    ]
    return _make_views(pipeline, collate_views(samples))


def _make_views(pipeline: ViewPipeline, batch: dict[str, Any]) -> Views:
    try:
        return pipeline(batch)
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"views: {error}") from error
