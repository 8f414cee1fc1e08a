"""What is refused before a run begins: no step to take, batches that a loss cannot use, schedules without a clock."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints import IncompleteCheckpointError, Manifest
from ..data import ImageSource
from ..distributed.agreement import gather_objects
from ..hub.licences import choose_licence
from ..hub.terms import terms_of_recipe
from ..objectives.progress import TrainingProgress
from ..planning.arithmetic import Schedule
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLForPreTraining
from ..pretraining.schedules import last_layer_is_held
from ..recipes.recipe import Recipe
from ..utils.suggestions import RecipeError
from ..views.pipelines import ViewPipeline
from .stops import refuse_errors


def check_length(args: EquiSSLTrainingArguments) -> None:
    """Refuse a run of no steps, which the Trainer would end with a division by zero or export untrained."""
    if args.max_steps == 0:
        raise RecipeError("training.max_steps: expected 1 or more, or -1 to count epochs instead, got 0.")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise RecipeError(
            f"training.num_train_epochs: expected more than 0, got {args.num_train_epochs}. Say how long: "
            "--training.num_train_epochs N or --training.max_steps N."
        )


def ask_licence(args: EquiSSLTrainingArguments, recipe: Recipe, dry: bool) -> tuple[str, ...]:
    """Refuse to publish a run whose publisher has to say its licence first; a ``dry`` one gets a line about it.

    Raises:
        RecipeError: It says what to say; or what they say cannot be.
    """
    if not args.push_to_hub:
        return ()
    try:
        terms = terms_of_recipe({"model": recipe.model, "data": recipe.data})
        question = choose_licence(
            terms, args.hub_license, name=args.hub_license_name, link=args.hub_license_link, copy=args.hub_license_file
        ).question
    except ValueError as error:
        raise RecipeError(f"training.hub_license: {error}".replace("--license", "--training.hub_license")) from error
    if not question:
        return ()
    question = question.replace("--license", "--training.hub_license")
    if not dry:
        raise RecipeError(f"training.push_to_hub: {question}")
    return (f"before it can be published: {question}",)


def check_precision(args: EquiSSLTrainingArguments) -> None:
    """Refuse fp16 on a CPU, for which accelerate has no loss scaling."""
    if args.fp16 and args.device.type == "cpu":
        raise RecipeError(
            "training.fp16: fp16 needs a GPU, and this run is on a CPU. Set --training.fp16 false, and "
            "--training.bf16 auto for bf16 where the processor has units for it."
        )


def check_agreement(output_dir: str | Path | None, checkpoint: str | None, precision: str) -> None:
    """Refuse a launch whose processes would go on from different checkpoints or in different precisions.

    All of them have to call it.
    """
    # A process that failed answers with its message, which ``run_on_all`` tells.
    told = [each for each in gather_objects({checkpoint: precision}) if isinstance(each, dict)]
    if len({path for each in told for path in each}) > 1:
        raise RecipeError(f"--output_dir {output_dir}: the processes see different checkpoints. Start again.")
    if len({name for each in told for name in each.values()}) > 1:
        raise RecipeError("bf16 is auto, and not all of this launch's devices have bf16: say true or false.")


def read_named_checkpoint(resume: str) -> Manifest:
    """Read the manifest of the checkpoint that ``--resume`` names, and all its files.

    Raises:
        RecipeError: It is not complete, or no checkpoint.
    """
    try:
        return Manifest.read(resume, verify=True)
    except IncompleteCheckpointError as error:
        raise RecipeError(
            f"--resume {resume}: no complete checkpoint: {error}. Use auto, never or a folder checkpoint-N."
        ) from error


def check_schedules(args: EquiSSLTrainingArguments, model: EquiSSLForPreTraining, plan: Schedule) -> None:
    """Refuse schedules in epochs of unknown length, as the Trainer would later."""
    progress = TrainingProgress(0, plan.steps or 1, args.epoch_steps or plan.steps_per_epoch)
    with refuse_errors("training"):
        model.begin_step(progress)
        last_layer_is_held(args, progress)


def require_labels(labels: object, objective: str) -> None:
    """Refuse data without the classes that ``objective`` learns from.

    Args:
        labels: Labels of the first images, or the number of classes; ``None`` where the data set has none.
        objective: Name of the objective.
    """
    if labels is None:
        raise RecipeError(
            f"data: {objective} needs the class of every image, which this data set does not say. Name the column with "
            "--data.label_column, sort the images into one folder per class, or choose another objective."
        )


def require_parameters(source: ImageSource, pipeline: ViewPipeline) -> None:
    """Refuse data without the parameters that the transformation takes from it."""
    family = pipeline.transformation
    if family is None or not family.from_data:
        return
    if source.pairs is None:
        raise RecipeError(
            f"data: views.transformation takes {', '.join(family.parameter_names)} from pairs of images, and "
            f"{source.name} has single images. Name the columns with data.second_column and data.parameter_columns, or "
            "choose a transformation that is applied to images, such as {name: rotation}."
        )
    names = source.pairs.parameter_names
    if absent := [name for name in family.parameter_names if name not in names]:
        raise RecipeError(
            f"views.transformation.parameters: {source.name} does not tell {', '.join(absent)} of its pairs. It tells "
            f"{', '.join(names) or 'nothing: name the columns with data.parameter_columns'}."
        )


def refuse_pairs(source: ImageSource, pipeline: ViewPipeline, asking: str) -> None:
    """Refuse data with pairs of images to objectives that are told how two views of one image differ.

    Args:
        source: The data.
        pipeline: What makes the views.
        asking: Names of the objectives that are told.
    """
    family = pipeline.transformation
    is_applied = family is not None and not family.from_data
    needs = pipeline.needs
    if source.pairs is not None and ((needs.parameters and is_applied) or needs.crop_boxes or needs.photometric):
        raise RecipeError(
            f"data: {asking} is told how two views of one image were made, and {source.name} has pairs of images, "
            "which differ in more than that. Leave out data.second_column, or take the parameters from the data "
            "(views.transformation: {name: given, parameters: [...]})."
        )


def check_steps(args: EquiSSLTrainingArguments, num_images: int | None, processes: int) -> None:
    """Refuse runs that have no step to take.

    Raises:
        RecipeError: It is a stream without ``max_steps``, or has fewer images than one batch.
    """
    if num_images is None:
        if args.max_steps <= 0:
            raise RecipeError("training.max_steps: a stream has no length. Say how long: --training.max_steps N.")
        return
    accumulation = args.gradient_accumulation_steps
    batch = args.per_device_train_batch_size * processes * accumulation
    accumulated = f" x {accumulation}" if accumulation > 1 else ""
    if num_images == 0 or (args.dataloader_drop_last and num_images < batch):
        raise RecipeError(
            f"data: {num_images} images are fewer than one batch of {args.per_device_train_batch_size} x "
            f"{processes}{accumulated} = {batch}. Use more images, a smaller --training.per_device_train_batch_size"
            f"{', or fewer processes (in a dry run: --num_processes 1)' if processes > 1 else ''}."
        )


def check_batches(args: EquiSSLTrainingArguments, model: EquiSSLForPreTraining, plan: Schedule) -> None:
    """Refuse batches, or a last batch, that are too small for an objective.

    Raises:
        RecipeError: It names the objective, the number and the remedy.
    """
    sizes = [plan.per_device]
    # The last batch of several processes is filled up with images from the beginning.
    if not args.dataloader_drop_last and plan.processes == 1 and plan.images is not None:
        sizes += [rest] if (rest := plan.images % plan.per_device) else []
    for size in sizes:
        try:
            model.check_batch(size, plan.processes)
        except ValueError as error:
            batch = f"{size} images per process on {plan.processes}"
            if size != plan.per_device:
                batch = f"the last batch of an epoch, {plan.images} images modulo {plan.per_device} = {size}: "
                batch += "set --training.dataloader_drop_last true"
            raise RecipeError(f"training.per_device_train_batch_size: {batch}. {error}") from error
