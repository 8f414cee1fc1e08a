"""Plans as text and as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..utils.files import readable_size
from .arithmetic import Schedule
from .assumptions import GIB, Cluster
from .cluster import EnginePlan, Planner
from .memory import MemoryUse
from .step import Cost

PARTS = {
    "weights": "weights",
    "moments": "optimizer state ({optimizer})",
    "gradients": "gradients",
    "exchange": "gathered layers, buckets",
    "casts": "half-precision copies of weights",
    "buffers": "buffers",
    "views": "views and targets",
    "activations": "activations, with what passes",
}
PHASES = {
    "teacher": "teacher's forward pass",
    "forward": "forward pass",
    "backward": "backward pass",
    "reduction": "end of the backward pass: the last gradients are reduced",
    "optimizer": "optimizer's step",
}


def memory_lines(plan: EnginePlan, precision: str) -> list[str]:
    """Show the fullest moment of a step by part, and the fullest moment of each phase."""
    held = plan.held
    optimizer = plan.setup.optimizer.name
    rows = [
        (PARTS[name].format(optimizer=optimizer), readable_size(value)) for name, value in held.parts.items() if value
    ]
    rows.append((f"together, in the {PHASES[held.phase]}", readable_size(held.total)))
    lines = [*table(rows), f"{plan.name}, {precision}, {plan.batch} images"]
    others = [
        f"{PHASES[name]} {readable_size(other.total)}" for name, other in plan.phases.items() if name != held.phase
    ]
    lines.append(f"other phases: {'; '.join(others)}")
    if plan.host:
        lines.append(f"in the host's memory, for each device: {readable_size(plan.host)}")
    return lines


def traffic_lines(plan: EnginePlan, cluster: Cluster) -> list[str]:
    """Show what a device sends, and what a step waits for."""
    sent = plan.traffic
    rows = [
        ("weights", readable_size(sent.weights)),
        ("gradients", readable_size(sent.gradients)),
        ("objectives: gathered batches, centers", readable_size(sent.objectives)),
    ]
    if sent.host:
        rows.append(("to and from the host", readable_size(sent.host)))
    overlapped, apart = plan.seconds
    lines = [*table(rows)]
    if cluster.nodes == 1:
        lines.append(f"assumed        {cluster.link:g} GB/s between devices; others: --link")
    else:
        lines.append(
            f"assumed        {cluster.link:g} GB/s between devices, {cluster.network:g} GB/s between the "
            f"{cluster.nodes} nodes; others: --link, --network"
        )
    lines.append(
        f"a step         {plan.compute:.3g} s of arithmetic, {plan.exchange:.3g} s of exchange: {overlapped:.3g} s if "
        f"they overlap, {apart:.3g} s if not; {plan.bound} bounds it"
    )
    return [*lines, *_host_lines([plan])]


def engine_table(plans: list[EnginePlan], schedule: Schedule, cluster: Cluster) -> list[str]:
    """Compare engines, one row each."""
    titles = ("", "weights", "optimizer", "gradients", "exchange", "activations", "peak", "fits")
    rows: list[tuple[str, ...]] = [(*titles, "largest batch", "sent/step", "images/s")]
    for plan in plans:
        held, gib = plan.held, lambda number: f"{number / GIB:.2f}"
        activations = held.activations + held.casts + held.views + held.buffers
        fast, slow = (schedule.batch / seconds for seconds in plan.seconds)
        rows.append(
            (
                plan.name,
                *(gib(value) for value in (held.weights, held.moments, held.gradients, held.exchange, activations)),
                gib(held.total),
                "yes" if held.total <= cluster.usable else "no",
                {None: "-", 0: "none"}.get(plan.largest_batch, str(plan.largest_batch)),
                f"{plan.traffic.network / GIB:.2f}",
                f"{slow:.0f} to {fast:.0f}",
            )
        )
    return [
        *table(rows, left=0),
        f"GiB of one device at the fullest moment of a step, {schedule.per_device} images; activations with views, "
        "buffers and half-precision copies of weights",
    ]


def advice(plans: list[EnginePlan], planner: Planner, recipe_batch: int) -> list[str]:
    """Recommend the simplest engine that fits, and say what becomes of the global batch.

    Args:
        plans: Plans from the simplest engine on, with largest batches.
        planner: The one that made them.
        recipe_batch: Images per step that the recipe was written for.
    """
    schedule, cluster = planner.schedule, planner.cluster
    fitting = [plan for plan in plans if plan.held.total <= cluster.usable]
    if not fitting:
        largest = max(plans, key=lambda plan: plan.largest_batch or 0)
        if not largest.largest_batch:
            return ["no engine fits: use larger devices, or --training.activation_checkpointing true"]
        return [
            f"no engine fits {schedule.per_device} images per device; {largest.name} fits {largest.largest_batch}: "
            f"--training.per_device_train_batch_size {largest.largest_batch}, or "
            "--training.activation_checkpointing true"
        ]
    best = fitting[0]
    lines = [f"engine         {best.name}: the simplest that fits {schedule.per_device} images per device"]
    lines.append(f"batch          {schedule.batch} images per step, learning rate {schedule.learning_rate:.4g}")
    devices = cluster.gpus
    if schedule.batch != recipe_batch:
        text = f"               the recipe's batch of {recipe_batch}"
        if recipe_batch % devices:
            return [*lines, f"{text} does not divide into {devices} devices"]
        share = recipe_batch // devices
        if share < planner.smallest or share % planner.multiple:
            needed = f"{planner.smallest}" + (f", or a multiple of {planner.multiple}" if planner.multiple > 1 else "")
            return [*lines, f"{text} leaves {share} for each of {devices} devices: the objectives need {needed}"]
        steps = accumulation_steps(share, best, planner)
        if steps is None:
            return [*lines, f"{text} does not fit under {best.name}, with gradient accumulation neither"]
        words = f"--training.per_device_train_batch_size {share // steps}"
        words += f" --training.gradient_accumulation_steps {steps}" if steps > 1 else ""
        lines.append(f"{text}: {words}")
        if steps > 1:
            lines.append("               losses over the batch see one micro-batch at a time then")
    return lines


def accumulation_steps(share: int, plan: EnginePlan, planner: Planner) -> int | None:
    """Find the fewest micro-batches in which an engine processes ``share`` images per device; ``None`` if none fit.

    Gradients that stay from one micro-batch to the next take memory: with accumulation the largest batch is another.
    """

    def largest(accumulating: bool) -> int:
        if accumulating == plan.setup.accumulating and plan.largest_batch is not None:
            return plan.largest_batch
        return planner.largest_batch(replace(plan.setup, accumulating=accumulating), exact=False)

    if share <= largest(accumulating=False):
        return 1
    most = largest(accumulating=True)
    fitting = (n for n in range(2, share + 1) if share % n == 0 and planner.smallest <= share // n <= most)
    return next((n for n in fitting if share // n % planner.multiple == 0), None)


def as_data(plan: EnginePlan, schedule: Schedule, cluster: Cluster) -> dict[str, Any]:
    """Turn one engine's plan into plain data, in bytes and seconds."""
    overlapped, apart = plan.seconds
    return {
        "engine": plan.name,
        "batch_per_device": plan.batch,
        "fits": plan.held.total <= cluster.usable,
        "largest_batch_per_device": plan.largest_batch,
        "peak_bytes": plan.held.total,
        "peak_phase": plan.held.phase,
        "memory_bytes": plan.held.parts,
        "phases_bytes": {name: held.total for name, held in plan.phases.items()},
        "host_bytes": plan.host,
        "sent_bytes_per_step": vars(plan.traffic) | {"network": plan.traffic.network},
        "seconds_per_step": {
            "arithmetic": plan.compute,
            "exchange": plan.exchange,
            "overlapped": overlapped,
            "not_overlapped": apart,
        },
        "bound_by": plan.bound,
        "images_per_second": {"overlapped": schedule.batch / overlapped, "not_overlapped": schedule.batch / apart},
    }


def plan_lines(recipe: str, planner: Planner, plans: list[EnginePlan], precision: str, recipe_batch: int) -> list[str]:
    """Write the whole report: one engine in detail, or several compared.

    Args:
        recipe: Name of the recipe.
        planner: The one that made ``plans``.
        plans: Plans from the simplest engine on.
        precision: The precision of the run, in words.
        recipe_batch: Images per step that the recipe was written for.
    """
    cluster, schedule = planner.cluster, planner.schedule
    cost = planner.cost(schedule.per_device)
    where = f"{cluster.gpus} devices with {cluster.memory:g} GiB"
    if cluster.nodes > 1:
        where += f" on {cluster.nodes} nodes"
    sections = {
        f"{recipe} on {where}": [
            f"batch          {schedule.per_device} per device x {schedule.processes} x accumulation "
            f"{schedule.accumulation} = {schedule.batch} images per step, {precision}",
            f"kept free      {cluster.free:g} GiB of each device, for context, NCCL, fragmentation; others: --reserve",
        ],
        "Parameters and compute": table(parameter_rows(cost)),
    }
    if len(plans) == 1:
        plan = plans[0]
        sections["Memory of one device"] = [*memory_lines(plan, precision), _largest_line(plan, cluster)]
        sections["Sent by one device in a step"] = traffic_lines(plan, cluster)
        sections["Time (estimate)"] = _time_lines(plan, planner)
    else:
        sections["Engines"] = [*engine_table(plans, schedule, cluster), *_assumptions(planner), *_host_lines(plans)]
        sections["Advice"] = advice(plans, planner, recipe_batch)
    text = [[title, *(f"  {line}" for line in lines)] for title, lines in sections.items()]
    return [line for section in text for line in (*section, "")][:-1]


def plan_data(recipe: str, planner: Planner, plans: list[EnginePlan], precision: str) -> dict[str, Any]:
    """Turn the report into plain data."""
    schedule, cluster = planner.schedule, planner.cluster
    cost = planner.cost(schedule.per_device)
    return {
        "recipe": recipe,
        "precision": precision,
        "cluster": vars(cluster) | {"reserve": cluster.free, "nodes": cluster.nodes},
        "speed": vars(planner.speed),
        "batch": schedule.batch,
        "learning_rate": schedule.learning_rate,
        "parameters": cost.parameters,
        "trained": cost.trainable,
        "flops_per_image": cost.flops,
        "engines": [as_data(plan, schedule, cluster) for plan in plans],
    }


def check_lines(recipe: str, plan: dict[str, MemoryUse], measured: dict[str, int], words: str) -> list[str]:
    """Show what ``--check_memory`` found."""
    highest, value = max(held.total for held in plan.values()), max(measured.values())
    planned, difference = readable_size(highest), f"{highest / value - 1:+.1%}"
    return [
        f"{recipe}, {words}",
        *phase_table(plan, measured),
        f"peak: planned {planned}, measured {readable_size(value)}, difference {difference}",
    ]


def _largest_line(plan: EnginePlan, cluster: Cluster) -> str:
    fits = "fits" if plan.held.total <= cluster.usable else "does not fit"
    if not plan.largest_batch:
        return f"{fits} into {readable_size(cluster.usable)}, and no batch does"
    return f"{fits} into {readable_size(cluster.usable)}; the largest batch per device that does: {plan.largest_batch}"


def _assumptions(planner: Planner) -> list[str]:
    cluster = planner.cluster
    between = f"{cluster.link:g} GB/s between devices"
    if cluster.nodes > 1:
        between += f" and {cluster.network:g} GB/s between nodes"
    return [
        f"images/s {planner.speed.describe()} and {between}: exchange after the arithmetic, to exchange meanwhile",
        "others: --utilisation, --device_tflops, --link, --network",
    ]


def _host_lines(plans: list[EnginePlan]) -> list[str]:
    """Say what the times of engines that offload leave out."""
    if not any(plan.setup.offload for plan in plans):
        return []
    return ["with +offload the optimizer's step is the host's, and not counted: fewer images/s than shown"]


def _time_lines(plan: EnginePlan, planner: Planner) -> list[str]:
    schedule = planner.schedule
    overlapped, apart = plan.seconds
    lines = [
        f"assumed        {planner.speed.describe()}; others: --utilisation, --device_tflops",
        f"images/s       {schedule.batch / apart:.0f} to {schedule.batch / overlapped:.0f}",
    ]
    if schedule.steps:
        hours = [schedule.steps * seconds / 3600 for seconds in plan.seconds]
        lines.append(f"the run        {schedule.steps} steps: {hours[0]:.3g} to {hours[1]:.3g} hours")
    return lines


def parameter_rows(cost: Cost) -> list[tuple[str, ...]]:
    """List parameters and FLOPs by part, below a heading."""
    rows: list[tuple[str, ...]] = [("", "parameters", "trained", "GFLOP/image", "share")]
    for part in cost.parts:
        share = f"{part.flops / cost.flops:.1%}" if cost.flops else ""
        rows.append((part.name, f"{part.parameters:,}", f"{part.trainable:,}", f"{part.flops / 1e9:.3f}", share))
    rows.append(("together", f"{cost.parameters:,}", f"{cost.trainable:,}", f"{cost.flops / 1e9:.3f}", ""))
    return rows


def phase_table(planned: dict[str, MemoryUse], measured: dict[str, int]) -> list[str]:
    """Show planned and measured bytes by phase."""
    rows = [("", "planned", "measured", "difference")]
    for name, value in measured.items():
        if name in planned:
            total = planned[name].total
            difference = f"{total / value - 1:+.1%}" if value else ""
            rows.append((PHASES[name], readable_size(total), readable_size(value), difference))
    return table(rows)


def table(rows: Iterable[tuple[str, ...]], left: int = 0) -> list[str]:
    """Align columns; column ``left`` is flush left, the others flush right."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if column == left else text.rjust(width) for column, (text, width) in cells
        ).rstrip()
        for cells in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
