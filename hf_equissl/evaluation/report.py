"""Records as tables and as a bar chart, one or several encoders side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import ResultRecord, merge_records

_TRANSFORMATIONS = "transformation_regression"


def _cell(record: ResultRecord) -> str:
    percent = record.metric.startswith("top")
    scale, digits = (100, 2) if percent else (1, 2) if record.metric == "effective_rank" else (1, 4)
    text = f"{record.value * scale:.{digits}f}"
    return text if record.std is None else f"{text} +- {record.std * scale:.{digits}f}"


def _settings(record: ResultRecord) -> str:
    """What tells two measurements of one encoder apart in a row label, if anything has to."""
    fill = record.protocol.get("family", {}).get("fill") if record.evaluator == _TRANSFORMATIONS else None
    return f" [{fill}]" if fill else ""


def table_rows(records: Sequence[ResultRecord]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per encoder and kind of features, one column per task and metric.

    R2 is shown as it is, accuracies in percent; with several seeds as mean +- standard deviation. SIE's form of R2 is
    left out for families with one parameter, where it is R2. Records of one encoder that differ only in protocol get
    columns of their own, numbered from the second one on.
    """
    merged = merge_records(records)
    single = {record.task for record in merged if record.metric == "r2" and len(record.details) == 1}
    merged = [record for record in merged if record.metric != "r2_scalar" or record.task not in single]
    order = {_TRANSFORMATIONS: 0, "linear": 1, "knn": 2}
    merged.sort(key=lambda record: (order.get(record.evaluator, 3), record.metric == "r2_scalar"))
    columns: list[str] = []
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for record in merged:
        row = cells.setdefault((record.encoder, record.features), {})
        column = record.name + _settings(record)
        number = 2
        while column in row:
            column, number = f"{record.name}{_settings(record)} ({number})", number + 1
        if column not in columns:
            columns.append(column)
        row[column] = _cell(record)
    rows = [
        [encoder, features, *(row.get(column, "") for column in columns)] for (encoder, features), row in cells.items()
    ]
    return ["encoder", "features", *columns], sorted(rows, key=lambda row: row[0])


def plain_table(records: Sequence[ResultRecord]) -> str:
    """A table for the terminal: measurements downwards, encoders across, so that it stays narrow."""
    header, rows = table_rows(records)
    turned = [[name, *(row[position] for row in rows)] for position, name in enumerate(header)]
    widths = [max(len(line[column]) for line in turned) for column in range(len(turned[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in turned]
    return "\n".join([*lines[:2], "  ".join("-" * width for width in widths), *lines[2:]])


def markdown_table(records: Sequence[ResultRecord]) -> str:
    """The same numbers as a Markdown table, followed by data set, seeds and protocol of each measurement."""
    header, rows = table_rows(records)
    lines = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]
    notes = dict.fromkeys(_note(record) for record in merge_records(records) if record.metric != "r2_scalar")
    return "\n".join([*lines, "", *notes, ""])


def _note(record: ResultRecord) -> str:
    settings = ", ".join(f"{key} {_words(value)}" for key, value in record.protocol.items() if value is not None)
    return f"- {record.name}: {record.dataset} ({record.split}), {len(record.seeds)} seed(s); {settings}."


def _words(value: Any) -> str:
    """A setting for readers: a family as the call that makes it."""
    if isinstance(value, dict) and "class" in value:
        arguments = [f"{name}={item}" for name, item in value.items() if name not in ("class", "ranges")]
        return f"{value['class']}({', '.join(arguments)})"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def plot_r2(records: Sequence[ResultRecord], path: str | os.PathLike[str] | None = None) -> Any:
    """Bar chart of R2 per family, one group per family and one bar per encoder and kind of features.

    Args:
        records: Those with another metric than "r2" are passed over.
        path: Where to save the figure (format by its suffix); ``None``: do not.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: without matplotlib.
        ValueError: without any R2.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'hf-equissl[plots]'.") from error
    chosen = [record for record in merge_records(records) if record.metric == "r2"]
    if not chosen:
        raise ValueError("There is no R2 among these records: run the transformation_regression evaluator.")
    names = [(record.encoder, record.features) for record in chosen]
    labels = _short_labels(list(dict.fromkeys(names)))
    groups = list(dict.fromkeys(record.task + _settings(record) for record in chosen))
    figure = Figure(figsize=(max(5.0, 1.2 + 0.35 * len(groups) * (1 + len(labels))), 4.0), layout="constrained")
    axes = figure.add_subplot()
    width, lowest = 0.8 / len(labels), [0.0]
    for position, (name, label) in enumerate(labels.items()):
        mine = [record for record in chosen if (record.encoder, record.features) == name]
        left = [groups.index(record.task + _settings(record)) + (position + 0.5) * width - 0.4 for record in mine]
        # Far below zero says no more than below zero, and would flatten the rest.
        heights = [max(record.value, -0.1) for record in mine]
        lowest += heights
        errors = [record.std or 0.0 for record in mine]
        axes.bar(left, heights, width, yerr=errors if any(errors) else None, capsize=2, label=label)
    axes.set_xticks(range(len(groups)), [group.replace("_", " ").replace(" [", "\n[") for group in groups])
    axes.set_ylim(min(lowest), 1.0)
    axes.set_ylabel("R2")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(3, len(labels)), fontsize="small")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _short_labels(names: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The shortest tails of the encoders' paths that tell them apart, with the features where they differ."""
    encoders = list(dict.fromkeys(encoder for encoder, _ in names))
    # A run's export is always called "encoder": the folder above says more.
    depth = 2 if any(Path(encoder).name == "encoder" for encoder in encoders) else 1
    while depth < 8 and len({Path(encoder).parts[-depth:] for encoder in encoders}) < len(encoders):
        depth += 1
    several = len({features for _, features in names}) > 1
    return {
        (encoder, features): "/".join(Path(encoder).parts[-depth:]) + (f" ({features})" if several else "")
        for encoder, features in names
    }
