"""One fine-tuning run: everything that can be wrong is found before the first step, then train, judge, save."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from ..checkpoints import Manifest, newest_checkpoint
from ..data import SkippedImages
from ..distributed.collectives import is_main_process
from ..distributed.engines import Engine, find_asked_engine
from ..distributed.signals import Signals, remove_marker
from ..encoders.frozen import FrozenEncoder
from ..evaluation.results import ResultRecord, save_records
from ..hub.places import FINETUNING_FILE
from ..hub.privacy import public_record, public_source
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.run_record import RunRecordCallback, new_record
from ..running.checks import check_agreement, read_named_checkpoint
from ..running.output_folder import (
    check_output_folder,
    check_result_folder,
    check_shared_folder,
    leave_folder,
    leave_if_refused,
    take_folder,
)
from ..running.preemption import PreemptionCallback
from ..running.stops import explain_stops
from ..utils.files import move_into_place, staging_folder, write_text
from .adapters import add_adapters, check_peft, describe
from .card import write_card
from .classifier import commit_of
from .prepared import FineTuningRun
from .report import make_records, plot_curves, write_table
from .result_files import RESULTS
from .settings import METHODS, FineTuningSettings
from .tasks import EncoderInput, make_task
from .trainer import FineTuningTrainer, parameter_groups
from .weights import SAVED_BESIDE, freeze_unused, save_weights


def fine_tune(settings: FineTuningSettings, resume: str = "auto", command: str | None = None) -> list[ResultRecord]:
    """Fine-tune: ``prepare`` and ``train``, from settings to a saved model and its measured accuracy."""
    return train(prepare(settings, resume), command)


def prepare(settings: FineTuningSettings, resume: str = "auto") -> FineTuningRun:
    """Load and check everything.

    Args:
        settings: What to do.
        resume: "auto" (the newest complete checkpoint in the output folder, if any), "never", or a checkpoint.

    Raises:
        ValueError: names what is wrong and what to do; nothing has been trained or written then.
        PeftMissingError: adapters without PEFT.
    """
    with leave_if_refused(settings.output_dir):
        return _prepare(settings, resume)


def _prepare(settings: FineTuningSettings, resume: str) -> FineTuningRun:
    if (engine := find_asked_engine()) not in (Engine.SINGLE, Engine.DDP):
        raise ValueError(
            f"Fine-tuning runs on one process or under DDP, and this launch asks for {engine.value}. Start it with "
            "training/accelerate_configs/ddp.yaml."
        )
    if settings.is_adapter:
        check_peft()
    task = make_task(settings.task, settings.task_options)
    settings = _keep_precision(task.complete(settings), resume)
    args = training_arguments(settings)
    args.learning_rate = settings.learning_rate_on(args.world_size)
    settings = replace(settings, learning_rate=args.learning_rate, bf16=args.bf16)
    check_shared_folder(settings.output_dir)
    check_output_folder(settings.output_dir)
    result = "adapter" if settings.is_adapter else "model"
    check_result_folder(settings.output_dir, result, signs=(FINETUNING_FILE,), also=SAVED_BESIDE)
    if is_main_process():
        take_folder(settings.output_dir)
    remove_marker(settings.output_dir)
    checkpoint = find_checkpoint(settings, resume)
    check_agreement(settings.output_dir, checkpoint, args.precision)
    commit = commit_of(settings.encoder, **settings.hub_options)
    options = {**settings.hub_options, "trust_remote_code": settings.trust_remote_code}
    if commit is not None:
        options["revision"] = commit
    frozen = FrozenEncoder(settings.encoder, image_size=settings.image_size, device="cpu", **options)
    splits = task.load(settings)
    step = settings.batch_size * args.world_size * settings.accumulation
    if len(splits.train) < step:
        raise ValueError(
            f"--batch_size {settings.batch_size} x {args.world_size} processes x accumulation {settings.accumulation} "
            f"= {step} is more than the {len(splits.train)} training images. Choose a smaller batch."
        )
    set_seed(settings.seed)
    network = task.load_model(
        settings.encoder, splits.classes, pooling=settings.pooling, drop_path=settings.drop_path, **options
    )
    task.bind(settings, EncoderInput(frozen.image_size, tuple(frozen.image_mean), tuple(frozen.image_std)))
    description = describe(task, network, settings, commit, list(splits.classes))
    encoder = task.encoder(network)
    model: Any = network
    if settings.is_adapter:
        model = add_adapters(network, task.encoder_name(network), settings)
    elif METHODS[settings.method].frozen:
        encoder.requires_grad_(False)
    freeze_unused(task, model, splits)
    parameter_groups(model, args, encoder)  # refuses a layer decay that cannot be
    return FineTuningRun(settings, args, task, splits, model, network, description, frozen.digest(), checkpoint)


def train(run: FineTuningRun, command: str | None = None, signals: Signals | None = None) -> list[ResultRecord]:
    """Train what is left to train, judge the result, save it.

    The output folder then holds ``model/`` or ``adapter/`` (weights, image processor, card, results), ``results.json``,
    ``results.md``, ``run.json`` and, with matplotlib, ``curves.png``.

    Args:
        run: The run that ``prepare`` returned.
        command: The command line, for the records.
        signals: Entered already, where signals shall be caught before training, too.

    Raises:
        Preempted: SIGTERM, SIGUSR1 or SIGHUP stopped the run, with a checkpoint.
        RuntimeError: one of ``running.stops.STOPS``: the run stopped.
    """
    output = Path(run.settings.output_dir)
    try:
        with nullcontext(signals) if signals else Signals(output) as caught, explain_stops(output):
            return _train(run, command, caught, output)
    finally:
        leave_folder(output)


def _train(run: FineTuningRun, command: str | None, signals: Signals, output: Path) -> list[ResultRecord]:
    settings = run.settings
    preemption = PreemptionCallback(signals)
    trainer = build_trainer(run, preemption)
    if run.finished and run.checkpoint is not None:
        trainer.load_weights(run.checkpoint)
        trainer.state = trainer.state.load_from_json(str(Path(run.checkpoint) / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=run.checkpoint)
        if preemption.stopped:
            preemption.stop(trainer.state, output)
        trainer.check_finite()
    metrics = _final_metrics(trainer)
    records: list[ResultRecord] = []
    if trainer.is_world_process_zero():
        save_model(run)
        records = make_records(run, trainer.state.log_history, metrics, command)
        save_records(records, output / RESULTS)
        base = public_source(run.description.base)
        public = [public_record(record, base, public_source(record.dataset)) for record in records]
        save_records(public, run.folder / RESULTS)
        write_card(run.folder, run.description, public)
        write_table(records, output)
        plot_curves(trainer.state.log_history, settings.method, run.task.primary, output)
    trainer.accelerator.wait_for_everyone()
    return records


def _final_metrics(trainer: FineTuningTrainer) -> dict[str, float]:
    """Return the metrics of the weights that are kept; measured again only if the last evaluation was of others."""
    state, key = trainer.state, f"eval_{trainer.task.primary.name}"
    step = state.global_step
    if (best := trainer.best_checkpoint) and (chosen := Manifest.read(best).step) != step:
        trainer.load_weights(best)
        step = chosen
    measured = (entry for entry in reversed(state.log_history) if entry["step"] == step and key in entry)
    return next(measured, None) or trainer.evaluate()


def build_trainer(run: FineTuningRun, *callbacks: TrainerCallback) -> FineTuningTrainer:
    """Build the Trainer of a run, and note its settings in its folder, because checkpoints may follow."""
    settings, inputs = run.settings, run.task.inputs
    trainer = FineTuningTrainer(
        run.model,
        run.args,
        run.task,
        run.splits,
        skipped_images=SkippedImages(settings.max_bad_share, num_images=len(run.splits.train)),
        keep_best=settings.keep == "best",
        encoder=run.task.encoder(run.network),
        frozen=METHODS[settings.method].frozen,
        callbacks=list(callbacks),
    )
    if trainer.is_world_process_zero():
        text = json.dumps(settings.to_dict(), indent=2) + "\n"
        write_text(Path(settings.output_dir) / FINETUNING_FILE, text)
    record = new_record(
        run.args,
        data=run.splits.train.name,
        num_images=len(run.splits.train),
        image_size=inputs.image_size,
        image_mean=inputs.image_mean,
        image_std=inputs.image_std,
    )
    trainer.add_callback(RunRecordCallback(record))
    return trainer


def save_model(run: FineTuningRun) -> Path:
    """Write the finished model or adapter with image processor and description; an older one is replaced as a whole."""
    with staging_folder(run.folder) as staging:
        save_weights(run.task, run.model, staging)
        run.task.image_processor().save_pretrained(staging)
        run.description.save(staging)
        move_into_place(staging, run.folder)
    return run.folder


def training_arguments(settings: FineTuningSettings) -> EquiSSLTrainingArguments:
    """Build the Trainer's arguments; evaluation and checkpoints after every epoch unless in steps."""
    return EquiSSLTrainingArguments(
        output_dir=settings.output_dir,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        weight_decay=settings.weight_decay or 0.0,
        layer_decay=settings.layer_decay or 1.0,
        label_smoothing_factor=settings.label_smoothing or 0.0,
        warmup_steps=settings.warmup,
        max_grad_norm=1.0,
        eval_strategy="steps" if settings.eval_steps else "epoch",
        eval_steps=settings.eval_steps,
        save_strategy="steps" if settings.save_steps else "epoch",
        save_steps=settings.save_steps or 500,
        save_total_limit=1,
        dataloader_num_workers=settings.num_workers,
        dataloader_persistent_workers=settings.num_workers > 0,
        bf16=settings.bf16,
        seed=settings.seed,
        report_to="none",
    )


def find_checkpoint(settings: FineTuningSettings, resume: str) -> str | None:
    """Find the checkpoint to go on from.

    Raises:
        ValueError: the folder holds another run, or ``resume`` names no complete checkpoint.
    """
    output = Path(settings.output_dir)
    found = newest_checkpoint(output)
    if (output / FINETUNING_FILE).is_file():
        if found or (output / RESULTS).is_file():  # a folder without results may be anybody's
            _check_same_run(settings, output)
    elif found or (output / "run.json").is_file() or (output / RESULTS).is_file():
        raise ValueError(f"--output_dir {output}: holds another run (no {FINETUNING_FILE}). Name a new folder.")
    if resume == "auto":
        return found
    if resume == "never":
        if found:
            raise ValueError(f"--resume never: {output} holds {Path(found).name} already. Name a new --output_dir.")
        return None
    read_named_checkpoint(resume)
    _check_same_run(settings, Path(resume).parent)
    return resume


def _keep_precision(settings: FineTuningSettings, resume: str) -> FineTuningSettings:
    """Give ``bf16`` "auto" the value with which the run began that goes on, whatever device goes on with it."""
    folder = Path(settings.output_dir) if resume in ("auto", "never") else Path(resume).parent
    path = folder / FINETUNING_FILE
    if settings.bf16 != "auto" or not path.is_file():
        return settings
    if newest_checkpoint(folder) is None and not (folder / RESULTS).is_file():
        return settings
    return replace(settings, bf16=bool(_read_settings(path).get("bf16", False)))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Name a new --output_dir.") from error


def _check_same_run(settings: FineTuningSettings, folder: Path) -> None:
    if differences := settings.differences(_read_settings(folder / FINETUNING_FILE)):
        name, theirs, ours = differences[0]
        raise ValueError(
            f"{folder} holds a run with --{name} {theirs}, and this one says {ours}. Name a new --output_dir, or go on "
            "with the same settings."
        )
