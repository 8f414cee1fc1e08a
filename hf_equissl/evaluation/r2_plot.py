"""R2 of transformation parameters as a bar chart, and in a sentence."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.figures import make_figure, save_figure
from .metrics import R2
from .results import ResultRecord, column_titles, merge_records


def fill_of(record: ResultRecord) -> str:
    """Return what fills the image where a transformation left nothing, e.g. " [reflect]"; "" if it fills all."""
    fill = record.protocol.get("family", {}).get("fill")
    return f" [{fill}]" if fill else ""


def plot_r2(records: Sequence[ResultRecord], path: str | os.PathLike[str] | None = None) -> Any:
    """Draw R2 per family as bars, one group per family and protocol and one bar per encoder and kind of features.

    Args:
        records: Those with another metric than "r2" are passed over.
        path: Where to save the figure (format by its suffix); ``None``: do not.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: without matplotlib.
        ValueError: without any R2.
    """
    chosen = [record for record in merge_records(records) if record.metric == R2.name]
    if not chosen:
        raise ValueError("There is no R2 among these records: run the transformation_regression evaluator.")
    names = [(record.encoder, record.features) for record in chosen]
    labels = short_labels(list(dict.fromkeys(names)))
    titles = column_titles(chosen, lambda record: record.task + fill_of(record))
    groups = list(titles.values())
    figure = make_figure((max(5.0, 1.2 + 0.35 * len(groups) * (1 + len(labels))), 4.0))
    axes = figure.add_subplot()
    width, lowest = 0.8 / len(labels), [0.0]
    for position, (name, label) in enumerate(labels.items()):
        mine = [record for record in chosen if (record.encoder, record.features) == name]
        left = [groups.index(titles[record.comparability]) + (position + 0.5) * width - 0.4 for record in mine]
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
    return save_figure(figure, path)


def describe_r2(records: Sequence[ResultRecord]) -> str:
    """Say in words what ``plot_r2`` shows: what R2 is, the best and the worst family, the mean."""
    shown = [record for record in merge_records(records) if record.metric == R2.name]
    shown = [record for record in shown if record.primary] or shown
    best, worst = (choose(shown, key=lambda record: record.value) for choose in (max, min))
    caption = (
        "How much of a transformation can be read off the frozen features of an image and its transformed copy: 1 is "
        f"all of it, 0 nothing. Best: {_words(best)}, least: {_words(worst)}, "
        f"mean {statistics.fmean(record.value for record in shown):.3f}."
    )
    return caption + (" In brackets: what fills the image where nothing was." if any(map(fill_of, shown)) else "")


def _words(record: ResultRecord) -> str:
    return f"{record.task.replace('_', ' ')} {record.value:.3f}"


def short_labels(names: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Find the shortest tails of the encoders' paths that tell them apart, with the features where they differ."""
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
