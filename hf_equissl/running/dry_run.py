"""The report of ``--dry_run``: what would be trained and what it would cost, and the first views as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..planning import Cost, build_without_weights
from ..planning.arithmetic import milestones
from ..planning.assumptions import Cluster, Speed
from ..planning.cluster import Planner, gpus_of_a_node, name_engine
from ..planning.optimizer_memory import optimizer_memory
from ..planning.optimizer_table import optimizer_rows
from ..planning.report import memory_lines, parameter_rows, table, traffic_lines
from ..pretraining.model import EquiSSLForPreTraining
from ..pretraining.optimizer import freeze_parameters, parameter_rules
from ..utils.figures import denormalize, picture_sheet
from ..views.base import Views
from ..views.pipelines import ViewPipeline
from .run import Run

PICTURE = "views.png"
PICTURE_ROWS = 6


def dry_run_report(run: Run, speed: Speed | None = None) -> str:
    """Write everything that a person would want to know before starting ``run``."""
    cost, speed = run.cost(), (speed or Speed()).of(run.args)
    _, model = build_without_weights(run.config)
    freeze_parameters(model, run.args)
    sections = {
        f"Recipe {run.recipe.name}": run.recipe.to_yaml().rstrip().splitlines(),
        "Batch, learning rate, steps": _plan_lines(run),
        "Schedules": _schedule_lines(run, model),
        "Views": [*run.pipeline.describe().splitlines(), *_shape_lines(run)],
        "Encoder": [*_encoder_lines(run), *run.notes],
        "Optimizer": table(optimizer_rows(parameter_rules(model, run.args)), left=4),
        "Parameters and compute": _cost_lines(cost),
        "Time (estimate)": _time_lines(run, cost, speed),
        **_engine_sections(run, cost, speed),
        "Logged loss parts": [", ".join(cost.logs)],
        "Data": _data_lines(run),
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def save_picture(views: Views, pipeline: ViewPipeline, path: str | Path) -> Path:
    """Save a grid of the first images, one row each: its views, then the reconstruction targets."""
    columns = [(f"view {number}", crop) for number, crop in enumerate(views.global_crops, start=1)]
    if views.intermediate_images is not None:
        fractions = pipeline.needs.fractions
        targets = views.intermediate_images.unbind(1)
        columns += [(f"target {fraction:.2f} g", t) for fraction, t in zip(fractions, targets, strict=True)]
    columns += [(f"local {number}", crop) for number, crop in enumerate(views.local_crops or (), start=1)]
    mean, std = pipeline.image_mean, pipeline.image_std
    picture_sheet([(title, denormalize(crop, mean, std)) for title, crop in columns], PICTURE_ROWS).save(path)
    return Path(path)


def _plan_lines(run: Run) -> list[str]:
    plan, args = run.plan, run.args
    decay = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    lines = [
        f"batch          {plan.per_device} per device x {plan.processes} processes x accumulation {plan.accumulation} "
        f"= {plan.batch} images per step",
        f"learning rate  {_learning_rate(run)}, then {decay}",
    ]
    if plan.images is not None:
        lines.append(f"pass           {plan.images} images / {plan.batch} = {plan.steps_per_epoch} steps")
    if plan.steps:
        lengths, unit = [str(plan.steps)], "epochs"
        if args.epoch_steps:
            lengths.append(f"{plan.steps / args.epoch_steps:.4g} epochs of {args.epoch_steps} steps")
            unit = "passes over the data"
        if plan.epochs:
            lengths.append(f"{plan.epochs:.4g} {unit}")
        lines.append(f"steps          {' = '.join(lengths)}, the first {plan.warmup_steps} warm up")
    else:
        lines.append(f"steps          {args.num_train_epochs:g} epochs; how many steps follows from the data (--data)")
    expected = run.recipe.num_processes
    if expected and expected != plan.processes:
        lines.append(f"note           written for {expected} processes: --num_processes {expected} plans with them")
    elif expected and plan.processes > 1:
        lines.append("note           planned for the recipe's processes: --num_processes 1 plans for one")
    return lines


def _schedule_lines(run: Run, model: EquiSSLForPreTraining) -> list[str]:
    rows = milestones(run.args, run.plan, model)
    if not rows:
        return ["follow from the number of steps, which is not known"]
    columns = ("step", "learning_rate", "weight_decay", "teacher_momentum")
    values = [{**{name: getattr(row, name) for name in columns}, **row.scheduled} for row in rows]
    known = [name for name, value in values[0].items() if value is not None]
    lines = table(
        [
            ("", *(name.replace("_", " ") for name in known)),
            *((row.name, *(f"{value[name]:.6g}" for name in known)) for row, value in zip(rows, values, strict=True)),
        ]
    )
    epoch, held = run.args.epoch_steps or run.plan.steps_per_epoch, run.args.freeze_last_layer_epochs
    if epoch is None and model.needs.teacher:
        lines.append("what is stated in epochs follows from their length: --data, or --training.epoch_steps")
    elif epoch is not None and held > 0:
        lines.append(f"the last layer is held for {held:g} epoch{'s' * (held != 1)} = {held * epoch:g} steps")
    return lines


def _learning_rate(run: Run) -> str:
    args, plan = run.args, run.plan
    if args.base_learning_rate is None or args.learning_rate_scaling == "none":
        return f"{plan.learning_rate:.4g}"
    ratio = f"{plan.batch}/{args.learning_rate_reference_batch}"
    rule = f"sqrt({ratio})" if args.learning_rate_scaling == "sqrt" else ratio
    return f"{args.base_learning_rate:g} x {rule} = {plan.learning_rate:.4g}"


def _shape_lines(run: Run) -> list[str]:
    views = run.pipeline.blank(run.plan.per_device, device="meta")
    lines = ["shapes for the batch of one device:"]
    for item in fields(Views):
        for name, tensor in _named_tensors(item.name, getattr(views, item.name)):
            lines.append(f"  {name:<24} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    return lines


def _named_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Find the tensors of one part of the views, with dotted names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (dict, tuple, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _named_tensors(f"{name}.{key}", item)


def _encoder_lines(run: Run) -> list[str]:
    config = run.recipe.build_encoder_config()
    stem = "no stem"
    if config.feature_size is not None:
        stem = f"stem {config.feature_size} = {config.invariant_size} invariant + {config.equivariant_size} equivariant"
    return [
        f"ViT: width {config.hidden_size}, {config.num_hidden_layers} blocks, {config.num_attention_heads} heads, "
        f"patch {config.patch_size}, image {config.image_size}, registers {config.num_register_tokens}",
        stem,
    ]


def _cost_lines(cost: Cost) -> list[str]:
    teacher = "; of the teacher the forward pass" if any(part.kind == "teacher" for part in cost.parts) else ""
    return [*table(parameter_rows(cost)), f"forward and backward over all crops{teacher}"]


def _time_lines(run: Run, cost: Cost, speed: Speed) -> list[str]:
    plan = run.plan
    device = cost.flops * plan.per_device * plan.accumulation / 1e12
    seconds = device / (speed.utilisation * speed.peak)
    lines = [
        f"a step         {device:.3f} TFLOP on a device, {device * plan.processes:.3f} TFLOP on all",
        f"assumed        {speed.describe()}; others: --utilisation, --device_tflops",
        f"               {seconds:.3g} s per step, {plan.batch / seconds:.4g} images/s",
    ]
    hours = plan.hours(cost.flops, speed.utilisation, speed.peak)
    if hours is not None:
        devices = f"on {plan.processes} devices = {hours * plan.processes:.4g} device hours"
        lines.append(f"the run        {plan.steps} steps: {hours:.3g} hours {devices}")
    return lines


def _engine_sections(run: Run, cost: Cost, speed: Speed) -> dict[str, list[str]]:
    """Estimate memory and traffic under the engine of the launch, by the formulas of ``training/plan.py``."""
    name = name_engine(run.args, run.plan.processes)
    cluster = Cluster(gpus=run.plan.processes, gpus_per_node=gpus_of_a_node(run.plan.processes))
    planner = Planner(lambda batch: cost, run.plan, cluster, speed, optimizer_memory(run.args))
    plan = planner.plan(name, search=False)
    memory = memory_lines(plan, run.args.precision)
    if run.args.activation_checkpointing:
        memory.append("activation checkpointing: blocks are computed again in the backward pass")
    memory.append("other engines, and the largest batch that fits: training/plan.py")
    sections = {"Memory of one device (estimate)": memory}
    if run.plan.processes > 1:
        sections["Sent by one device in a step (estimate)"] = traffic_lines(plan, cluster)
    return sections


def _data_lines(run: Run) -> list[str]:
    if run.dataset is None:
        return ["none named (--data): shapes were found with blank images"]
    size = "a stream" if run.plan.images is None else f"{run.plan.images} images"
    lines = [f"{run.recipe.data['source']}: {size}; the first {run.first.batch_size} were decoded"]
    if run.unreadable:
        lines.append(f"not readable and replaced: {', '.join(run.unreadable)}")
    return lines
