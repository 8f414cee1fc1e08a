"""Records of several training seeds of several systems, as one table and one plot with mean and standard deviation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..utils.figures import make_figure, save_figure
from ..utils.markdown import plain, table
from .metrics import R2, R2_FEW_SHOT, R2_LINEAR
from .r2_plot import fill_of
from .registry import EVALUATORS, evaluator_of
from .report import align_columns, protocol_notes
from .results import ResultRecord, merge_records

MEAN = "mean"  # the task of a mean over families
# Metrics of probes of low capacity, which have tables of their own -> what their headings say.
LOW_CAPACITY = {R2_LINEAR.name: "linear probe", R2_FEW_SHOT.name: "linear probe of few pairs"}


@dataclass(frozen=True)
class Measured:
    """What was measured of one training run.

    Attributes:
        system: What was trained, whatever the seed.
        seed: Seed of the training.
        records: Records of its encoder.
    """

    system: str
    seed: int
    records: Sequence[ResultRecord]


class UnlikeProtocolsError(ValueError):
    """Numbers that would stand in one column were measured in different ways."""


def newest_encoder(records: Sequence[ResultRecord]) -> list[ResultRecord]:
    """Choose the records of the encoder that was measured last: a run that was trained anew leaves older ones."""
    if not records:
        return []
    digest = max(records, key=lambda record: record.date).encoder_digest
    return [record for record in records if record.encoder_digest == digest]


def merge_systems(measured: Sequence[Measured]) -> list[ResultRecord]:
    """Make one record per system and measurement, whose ``values`` and ``seeds`` are those of the training runs.

    A value is the mean over the seeds of the probe, which ``details`` keep. Means over all families are added, one for
    each way to fill images, for the systems of which every family was measured.

    Raises:
        UnlikeProtocolsError: Two runs were measured on different data or with different settings.
    """
    first: dict[tuple[str, ...], tuple[Measured, ResultRecord]] = {}
    rows: dict[tuple[str, ...], list[tuple[int, ResultRecord]]] = {}
    for run in measured:
        for record in merge_records(run.records):
            column = _column(record)
            _check_alike(run, record, *first.setdefault(column, (run, record)))
            rows.setdefault((run.system, *column), []).append((run.seed, record))
    merged = [_merge_seeds(system, dict(found)) for (system, *_), found in rows.items()]
    order = {name: position for position, name in enumerate(EVALUATORS)}
    return sorted([*merged, *_means(merged)], key=lambda record: order.get(record.evaluator, len(order)))


def _column(record: ResultRecord) -> tuple[str, ...]:
    return record.evaluator, record.task, record.metric, record.features, evaluator_of(record).variant(record)


def _check_alike(run: Measured, record: ResultRecord, other_run: Measured, other: ResultRecord) -> None:
    if record.comparability != other.comparability:
        one, two = ({"dataset": of.dataset, "split": of.split, **of.protocol} for of in (record, other))
        key = next(key for key in {**one, **two} if _plain(one.get(key)) != _plain(two.get(key)))
        raise UnlikeProtocolsError(
            f"{record.name} on {record.features} features was measured in different ways: {key} is {one.get(key)!r} "
            f"for {run.system}, seed {run.seed}, and {two.get(key)!r} for {other_run.system}, seed {other_run.seed}. "
            "Measure all in the same way, or keep the results of either in a place of their own."
        )


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _merge_seeds(system: str, by_seed: Mapping[int, ResultRecord]) -> ResultRecord:
    seeds = sorted(by_seed)
    records = [by_seed[seed] for seed in seeds]
    digests = "".join(record.encoder_digest for record in records)
    return replace(
        records[-1],
        encoder=system,
        encoder_digest=hashlib.sha256(digests.encode()).hexdigest()[:16],
        values=tuple(record.value for record in records),
        seeds=tuple(seeds),
        details={"values_by_probe_seed": [list(record.values) for record in records]},
    )


def _means(records: Sequence[ResultRecord]) -> list[ResultRecord]:
    """Average R2 over all families, per system, kind of features and fill."""
    regressed = [record for record in records if record.metric in (R2.name, *LOW_CAPACITY)]
    made = []
    for metric, features in dict.fromkeys((record.metric, record.features) for record in regressed):
        own = [record for record in regressed if (record.metric, record.features) == (metric, features)]
        for fill in dict.fromkeys(filter(None, map(fill_of, own))) or [""]:
            alike = [record for record in own if fill_of(record) in ("", fill)]
            tasks = list(dict.fromkeys(record.task for record in alike))
            for system in dict.fromkeys(record.encoder for record in alike):
                mine = [record for record in alike if record.encoder == system]
                seeds = set.intersection(*(set(record.seeds) for record in mine))
                if len(tasks) < 2 or len(mine) < len(tasks) or not seeds:
                    continue
                by_seed = [dict(zip(record.seeds, record.values, strict=True)) for record in mine]
                made.append(
                    replace(
                        mine[0],
                        task=MEAN,
                        primary=False,
                        seeds=tuple(sorted(seeds)),
                        values=tuple(statistics.fmean(one[seed] for one in by_seed) for seed in sorted(seeds)),
                        protocol={"of": tasks, **({"family": {"fill": fill.strip(" []")}} if fill else {})},
                        details={},
                    )
                )
    return made


def comparison_rows(
    records: Sequence[ResultRecord],
    systems: Sequence[str],
    kind: tuple[str, str],
    more: Mapping[str, Mapping[str, str]],
) -> list[list[str]]:
    """Lay out the records of one of ``kinds_of_tables``: a header, then a row per system.

    Args:
        records: As ``merge_systems`` makes them.
        systems: The rows, in their order; those without records are left out.
        kind: Which table.
        more: Title of a further column -> system -> its cell.
    """
    shown = [record for record in records if _kind(record) == kind and _is_shown(record)]
    titles = dict.fromkeys(map(_title, shown))
    rows = [["system", "seed", *titles, *more]]
    for system in systems:
        own = {_title(record): record for record in shown if record.encoder == system}
        if own:
            seeds = sorted({seed for record in own.values() for seed in record.seeds})
            cells = [_cell(own[title], seeds) if title in own else "" for title in titles]
            rows.append(
                [system, " ".join(map(str, seeds)), *cells, *(column.get(system, "") for column in more.values())]
            )
    return rows


def _cell(record: ResultRecord, seeds: Sequence[int]) -> str:
    """Write the value, and the seeds that it is of where the row has further ones."""
    if set(record.seeds) == set(seeds):
        return record.text
    return f"{record.text} (seed{'s' if len(record.seeds) > 1 else ''} {' '.join(map(str, record.seeds))})"


def _is_shown(record: ResultRecord) -> bool:
    """Return whether tables have a column for it: the first metric of each evaluator, and R2 of linear probes."""
    known = EVALUATORS.get(record.evaluator)
    first = record.about.hub_type is not None if known is None else record.metric == known.metrics[0].name
    return first or record.metric in LOW_CAPACITY


def _title(record: ResultRecord) -> str:
    return record.name + evaluator_of(record).variant(record)


def kinds_of_tables(records: Sequence[ResultRecord]) -> list[tuple[str, str]]:
    """List the tables there are: kind of features, and the metric of a linear probe's R2, else ""."""
    kinds = dict.fromkeys(map(_kind, filter(_is_shown, records)))
    return sorted(kinds, key=lambda kind: ["", *LOW_CAPACITY].index(kind[1]))


def _kind(record: ResultRecord) -> tuple[str, str]:
    return record.features, record.metric if record.metric in LOW_CAPACITY else ""


def comparison_text(
    records: Sequence[ResultRecord],
    systems: Sequence[str],
    more: Mapping[str, Mapping[str, str]] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Write a Markdown table per kind of features, ``more`` columns in the first one, then how it was measured."""
    parts: list[str] = []
    for kind in kinds_of_tables(records):
        rows = comparison_rows(records, systems, kind, {} if parts else more or {})
        parts += [_heading(kind), table([[*map(plain, row)] for row in rows])]
    fewer = "Cells with (seed ...) are of these seeds alone: the row's other seeds were not measured there."
    fewer = fewer if any(" (seed" in part for part in parts) else ""
    measured = protocol_notes([record for record in records if _is_shown(record) and record.task != MEAN])
    several = "Mean +- standard deviation over seeds of the training." if any(r.std for r in records) else ""
    return "\n\n".join(filter(None, [*parts, several, fewer, *notes, measured])) + "\n"


def plain_comparison(
    records: Sequence[ResultRecord], systems: Sequence[str], more: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """Write the same tables for the terminal."""
    parts: list[str] = []
    for kind in kinds_of_tables(records):
        rows = comparison_rows(records, systems, kind, {} if parts else more or {})
        parts += [_heading(kind), align_columns(rows)]
    return "\n\n".join(parts)


def _heading(kind: tuple[str, str]) -> str:
    features, metric = kind
    return f"Features: {features}" + (f", {LOW_CAPACITY[metric]}" if metric else "")


def plot_comparison(
    records: Sequence[ResultRecord], systems: Sequence[str], path: str | os.PathLike[str] | None = None
) -> Any:
    """Draw a panel per measurement with a row per system: mean and standard deviation, a colour per kind of features.

    Args:
        records: As ``merge_systems`` makes them.
        systems: The rows, from the top.
        path: Where to save the figure (format by its suffix); ``None``: do not.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: Without matplotlib.
    """
    shown = [record for record in records if _is_shown(record) and not _kind(record)[1]]
    titles, kinds = (list(dict.fromkeys(map(of, shown))) for of in (_title, lambda record: record.features))
    rows = [system for system in systems if any(record.encoder == system for record in shown)]
    figure = make_figure((2.0 + 1.7 * len(titles), 1.4 + 0.26 * len(rows)))
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, title in zip(panels, titles, strict=True):
        for number, kind in enumerate(kinds):
            own = [record for record in shown if (_title(record), record.features) == (title, kind)]
            if own:
                scale = own[0].about.scale
                # Far below zero says no more than below zero, and would flatten the rest.
                lowest = -0.1 if own[0].metric == R2.name else -math.inf
                axes.errorbar(
                    [scale * max(record.value, lowest) for record in own],
                    [rows.index(record.encoder) + 0.3 * (number + 0.5) / len(kinds) - 0.15 for record in own],
                    xerr=[scale * (record.std or 0.0) for record in own],
                    fmt="o",
                    markersize=4,
                    capsize=2,
                    color=f"C{number}",
                    label=kind,
                )
        axes.set_title(title.replace("_", " ").replace(" [", "\n["), fontsize="small")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize="small")
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    # Each kind of features is in some panel.
    signs = {kind: sign for axes in panels for sign, kind in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(signs.values(), signs, loc="outside lower center", ncols=len(kinds), fontsize="small")
    return save_figure(figure, path)
