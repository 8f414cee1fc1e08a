"""From a recipe to a finished encoder: everything that can be wrong is found before the first step.

``prepare`` checks in the order in which a check costs: configurations, output folder, first images, one step on fake
tensors. ``pretrain`` trains and exports.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, set_seed
from transformers.activations import ACT2FN

from ..checkpoints import ENCODER_FOLDER, Manifest, newest_checkpoint
from ..data import SkippedImages, StreamingViewDataset, list_remarks
from ..distributed.agreement import first_message
from ..distributed.collectives import is_main_process
from ..distributed.signals import Signals, remove_marker
from ..encoders import save_encoder
from ..hub.pretraining_state import load_pretraining_state
from ..hub.publishable import PublishError
from ..modeling import EquiSSLModel
from ..planning import Cost, build_without_weights, check_step, checkpoint_bytes, measure
from ..planning.arithmetic import Schedule, schedule
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from ..pretraining.optimizer import check_last_layer
from ..pretraining.run_record import RECORD_FILE, SettingChange
from ..pretraining.trainer import EquiSSLTrainer
from ..recipes.overrides import check_processes
from ..recipes.recipe import Recipe
from ..utils.files import expand_home
from ..utils.suggestions import RecipeError, check_known
from ..views.base import Views
from ..views.pipelines import ViewPipeline
from .checks import (
    ask_licence,
    check_agreement,
    check_batches,
    check_length,
    check_precision,
    check_schedules,
    check_steps,
    refuse_pairs,
    require_labels,
    require_parameters,
)
from .first_views import (
    ViewDataset,
    build_dataset,
    count_classes,
    describe_assumptions,
    make_blank_views,
    make_first_views,
    open_source,
)
from .initial_weights import InitialWeights
from .online_monitor import OnlineMonitor, build_monitor
from .output_folder import (
    check_disk_space,
    check_output_folder,
    check_own_texts,
    check_result_folder,
    check_shared_folder,
    estimate_disk_use,
    leave_folder,
    leave_if_refused,
    measure_checkpoints,
    take_folder,
)
from .precision import assume_precision, describe_precision, keep_precision, leaves_precision_open
from .preemption import PreemptionCallback
from .publishing import Publisher
from .rehearsal import rehearse
from .resume import Launch, check_continuation, describe_resume, find_start
from .run_report import write_report
from .stops import ExportError, explain_stops, refuse_errors


@dataclass
class Run:
    """A checked run, ready to train.

    Attributes:
        recipe: The recipe with everything that it extends, its overrides, and the encoder that it starts from.
        args: Arguments of the Trainer.
        config: Student and objectives.
        pipeline: Makes the views.
        dataset: ``None`` in a dry run without data.
        plan: Batch, learning rate and steps.
        first: Views of the first images, as tensors.
        checkpoint: Where training goes on, or ``None``.
        unreadable: Names of the first images that do not decode.
        monitor: The online monitor, if the recipe asks for it.
        initial: What the run starts from, if not from random weights; dropped once it is used.
        changes: Settings that are no longer those of its first steps.
        notes: Lines for people: the precision, how the run goes on, what it starts from.
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
    monitor: OnlineMonitor | None = None
    initial: InitialWeights | None = None
    changes: tuple[SettingChange, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is that of the last step: nothing is left to train."""
        return self.checkpoint is not None and Manifest.read(self.checkpoint).step == self.plan.steps

    def cost(self, batch: int | None = None) -> Cost:
        """Run one step on fake tensors, of ``batch`` images per device in place of those of ``args``.

        Raises:
            RecipeError: Shapes do not fit, in the model's words.
        """
        images = batch or self.plan.per_device
        with refuse_errors("The first step would fail"):
            views = self.pipeline.blank(images, device="meta")
            return measure(self.config, views, self.args, images, self.plan.processes)

    def check(self) -> None:
        """Run one step's forward pass on fake tensors.

        Raises:
            RecipeError: Shapes do not fit, in the model's words.
        """
        with refuse_errors("The first step would fail"):
            views = self.pipeline.blank(self.plan.per_device, device="meta")
            check_step(self.config, views, self.plan.processes)


def prepare(
    recipe: Recipe, output_dir: str | Path | None, resume: str = "auto", processes: int | None = None, dry: bool = False
) -> Run:
    """Build and check everything but the weights; those that the run starts from are read.

    Args:
        recipe: Names the data set in ``data.source``.
        output_dir: Created where it does not exist, and this run's alone until ``pretrain`` ends. ``None`` in a dry
            run: nothing is written.
        resume: "auto" (the newest complete checkpoint in ``output_dir``, if any), "never", or a checkpoint's folder.
        processes: Plan for so many. ``None``: those of this launch; in a dry run without a launcher, those that the
            recipe was written for.
        dry: Without a data set, go on with blank images.

    Raises:
        RecipeError: It says what is wrong and what to do.
    """
    try:
        output_dir, resume = None if output_dir is None else expand_home(output_dir), expand_home(resume)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    with leave_if_refused(output_dir), refuse_errors("The run cannot be prepared"):
        return _prepare(recipe, output_dir, resume, processes, dry)


def _prepare(recipe: Recipe, output_dir: str | Path | None, resume: str, processes: int | None, dry: bool) -> Run:
    if output_dir is not None and not str(output_dir):
        raise RecipeError("--output_dir is empty. Name a folder.")
    if processes is not None:
        check_processes(processes, f"--num_processes {processes}")
    asked = recipe
    if output_dir is not None and resume != "never":
        recipe = keep_precision(recipe, output_dir if resume == "auto" else Path(resume).parent)
    if dry:
        recipe = assume_precision(recipe)
    args = recipe.build_training_arguments(output_dir or "output")
    if leaves_precision_open(recipe):  # what is stored says what ran
        recipe = replace(recipe, training={**recipe.training, "bf16": args.bf16})
    check_length(args)
    if not dry:
        check_precision(args)
    if output_dir is not None and not dry:
        check_shared_folder(output_dir)
        remove_marker(output_dir)
    if processes is None:
        launched = not dry or "WORLD_SIZE" in os.environ
        processes = args.world_size if launched else recipe.num_processes or 1
    launch = Launch.of(args, processes, dry)
    recipe, checkpoint, initial = find_start(recipe, output_dir, resume, launch)
    if not dry:
        check_agreement(output_dir, checkpoint, args.precision)
    blank = dry and not recipe.data.get("source")
    source = None if blank or not recipe.reads_num_classes else open_source(recipe)
    config = recipe.build_pretraining_config(count_classes(recipe, source))
    check_known(config.encoder_config.hidden_act, sorted(ACT2FN), "model.hidden_act")
    with refuse_errors("model, objectives"):
        _, model = build_without_weights(config)
    with refuse_errors("training"):
        check_last_layer(model, args)
    pipeline = recipe.build_pipeline(model.needs)
    notes = describe_precision(args, asked, dry) + describe_resume(checkpoint, launch)
    notes += () if initial is None else tuple(initial.describe(model, recipe))
    if output_dir is not None:
        check_output_folder(output_dir)
        check_result_folder(output_dir, ENCODER_FOLDER, signs=("recipe.yaml", RECORD_FILE))
        check_own_texts(output_dir, report=args.run_report)
        if is_main_process() and not dry:
            take_folder(output_dir)
    if blank:
        notes += describe_assumptions(recipe, model)
        plan = _make_plan(args, model, processes, recipe.expected_images, blank)
        grey = make_blank_views(pipeline, plan.per_device)
        return Run(recipe, args, config, pipeline, None, plan, grey, checkpoint, notes=notes)
    dataset, unshuffled = build_dataset(source or open_source(recipe), recipe, pipeline, args)
    num_images = None if isinstance(dataset, IterableDataset) else len(dataset)
    if isinstance(dataset, StreamingViewDataset) and (note := dataset.reading_note(args.dataloader_num_workers)):
        notes += (note,)
    notes += list_remarks(dataset.source)
    require_parameters(dataset.source, pipeline)
    told = [model.name_askers(need) for need in ("parameters", "crop_boxes", "photometric")]
    refuse_pairs(dataset.source, pipeline, " and ".join(dict.fromkeys(filter(None, told))))
    check_steps(args, num_images, processes)
    plan = _make_plan(args, model, processes, num_images)
    changes, remarks = check_continuation(checkpoint, args, plan.steps, dataset.source)
    notes += remarks
    if output_dir is not None and (checkpoint is None or Manifest.read(checkpoint).step != plan.steps):
        need = estimate_disk_use(args, plan, checkpoint_bytes(config, args), measure_checkpoints(output_dir))
        check_disk_space(output_dir, need)
    first, unreadable = make_first_views(unshuffled, pipeline)
    if model.needs.labels:
        require_labels(first.labels, model.name_askers("labels"))
    monitor = build_monitor(recipe, dataset.source)
    if is_main_process():
        notes += ask_licence(args, recipe, dry)
    run = Run(
        recipe, args, config, pipeline, dataset, plan, first, checkpoint, unreadable, monitor, initial, changes, notes
    )
    if args.world_size == 1 and not dry:  # with more, the objectives' exchange between processes needs real tensors
        run.check()
    return run


def _make_plan(
    args: EquiSSLTrainingArguments,
    model: EquiSSLForPreTraining,
    processes: int,
    images: int | None,
    blank: bool = False,
) -> Schedule:
    """Plan the steps over so many images, and refuse what would fail in them; of ``blank`` ones the number is open."""
    plan = schedule(args, processes, images)
    check_batches(args, model, plan)
    if not blank or args.epoch_steps or plan.steps_per_epoch:
        check_schedules(args, model, plan)
    rehearse(args, model, plan)
    return plan


def pretrain(run: Run, signals: Signals | None = None) -> Path:
    """Train, export the encoder, publish it if asked. A finished run does not train: that would be one step more.

    Args:
        run: What ``prepare`` returned.
        signals: Entered already, where signals shall be caught before training, too.

    Returns:
        The encoder's folder, which ``AutoModel.from_pretrained`` loads.

    Raises:
        Preempted: SIGTERM, SIGUSR1 or SIGHUP stopped the run. A checkpoint is written, the encoder is not.
        RuntimeError: one of ``running.stops.STOPS``, whose message says what is left of the run.
    """
    output = Path(str(run.args.output_dir))
    try:
        with nullcontext(signals) if signals else Signals(output) as caught, explain_stops(output):
            return _pretrain(run, caught, output)
    finally:
        leave_folder(output)


def _pretrain(run: Run, signals: Signals, output: Path) -> Path:
    if run.dataset is None:
        raise RecipeError("data.source: no data set is named. Give one with --data.")
    if run.checkpoint is not None and run.finished:
        return _export_checkpoint(run, run.checkpoint, output)
    preemption = PreemptionCallback(signals)
    model, trainer = build_training(run, preemption)
    if is_main_process():
        run.recipe.save(output, [f"Not all steps ran so: {change.text}." for change in run.changes])
    with refuse_errors("The run cannot begin", unless=lambda: trainer.has_begun):
        trainer.train(resume_from_checkpoint=run.checkpoint)
    if preemption.stopped:
        preemption.stop(trainer.state, output)
    trainer.check_finite()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    folder = output / ENCODER_FOLDER
    _export(run, lambda: model.export_encoder(state_dict=state), folder)
    if run.args.run_report and is_main_process():
        write_report(output, run.recipe.name, trainer.state.log_history)
    if run.args.push_to_hub:
        _publish(trainer, folder)
    return folder


def _export(run: Run, build: Callable[[], EquiSSLModel], folder: Path) -> None:
    """Write the encoder that ``build`` gives, on the main process.

    Raises:
        ExportError: It cannot be written; on all processes.
    """
    problem = None
    if is_main_process():
        try:
            save_encoder(build(), folder, run.pipeline.image_mean, run.pipeline.image_std)
        except (OSError, SafetensorError) as error:
            problem = f"The run is trained, and its encoder cannot be written in {folder}: {error}."
    if (problem := first_message(problem)) is not None:
        last = newest_checkpoint(folder.parent)
        again = f"The last complete checkpoint is {last}: make room and start the same command again; " if last else ""
        raise ExportError(f"{problem} {again or 'There is no checkpoint: '}nothing else was lost.")


def build_training(run: Run, *callbacks: TrainerCallback) -> tuple[EquiSSLForPreTraining, EquiSSLTrainer]:
    """Build the run's model, random or from the weights it starts from, and the Trainer with ``callbacks``.

    Raises:
        RecipeError: The Trainer refuses what it cannot do.
    """
    set_seed(run.args.seed)
    model = EquiSSLForPreTraining(run.config)
    if run.initial is not None:
        run.initial.load(model)
        run.initial = None
    trainer = _build_trainer(run, model, *callbacks)
    trainer.run_record.record = replace(trainer.run_record.record, changes=run.changes)
    if run.monitor is not None:
        run.monitor.log = trainer.log
        trainer.add_callback(run.monitor)
    return model, trainer


def _publish(trainer: EquiSSLTrainer, folder: Path) -> None:
    """Publish a finished run.

    Raises:
        PublishError: It cannot be built or uploaded.
    """
    try:
        trainer.push_to_hub()
    except (ValueError, OSError) as error:
        raise PublishError(
            f"The run is finished, its encoder lies in {folder}, and it is not published. {error}"
        ) from error


def _build_trainer(run: Run, model: EquiSSLForPreTraining, *callbacks: TrainerCallback) -> EquiSSLTrainer:
    """Build the run's Trainer, which refuses what it cannot do and, with ``push_to_hub``, a Hub it cannot write to."""
    dataset = cast(ViewDataset, run.dataset)
    skipped = SkippedImages(run.recipe.max_bad_share, num_images=run.plan.images)
    try:
        with refuse_errors("training"):
            return EquiSSLTrainer(
                model,
                run.args,
                run.pipeline,
                train_dataset=dataset,
                skipped_images=skipped,
                publisher=Publisher(str(run.args.output_dir)) if run.args.push_to_hub else None,
                callbacks=list(callbacks),  # before those that publish
            )
    except PublishError as error:  # before training, it can be mended
        raise RecipeError(f"training: {error}") from error


def _export_checkpoint(run: Run, checkpoint: str, output: Path) -> Path:
    """Export and publish the encoder of a checkpoint as ``pretrain`` does after the last step."""
    folder = output / ENCODER_FOLDER
    if is_main_process() or run.args.push_to_hub:
        try:
            model = load_pretraining_state(checkpoint)
        except OSError as error:
            raise RecipeError(
                f"{checkpoint}: the run is finished, but its weights cannot be read for the export ({error})."
            ) from error
    if is_main_process():
        run.recipe.save(output, [f"Not all steps ran so: {change.text}." for change in run.changes])
    _export(run, lambda: model.export_encoder(), folder)
    if run.args.push_to_hub:
        _publish(_build_trainer(run, model), folder)
    return folder
