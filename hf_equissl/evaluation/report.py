"""Records as tables and as numbers for a logger, one or several encoders side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.markdown import plain, table
from .registry import EVALUATORS, evaluator_of
from .results import ResultRecord, column_titles, merge_records


def table_rows(records: Sequence[ResultRecord]) -> tuple[list[str], list[list[str]]]:
    """Lay records out as header and rows: one row per encoder and kind of features, one column per task and metric.

    Values as their metric shows them; with several seeds as mean +- standard deviation. A metric that cards do not list
    is left out where it repeats one that they do. Test sets are named where there are several. Numbers that may not be
    compared (``ResultRecord.comparability``) never share a column: those of one title are numbered from the second on.
    """
    merged = _shown(records)
    titles = _titles(merged)
    columns: list[str] = []
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for record in merged:
        row = cells.setdefault((record.encoder, record.features), {})
        title = column = titles[record.comparability]
        number = 2  # other weights under the name of the same encoder
        while column in row:
            column, number = f"{title} ({number})", number + 1
        if column not in columns:
            columns.append(column)
        row[column] = record.text
    rows = [
        [encoder, features, *(row.get(column, "") for column in columns)] for (encoder, features), row in cells.items()
    ]
    return ["encoder", "features", *columns], sorted(rows, key=lambda row: row[0])


def _shown(records: Sequence[ResultRecord]) -> list[ResultRecord]:
    """Merge records, leave out what repeats others, and sort them as columns of a table."""
    merged = [record for record in merge_records(records) if not _repeats(record, records)]
    order = {name: position for position, name in enumerate(EVALUATORS)}
    return sorted(merged, key=lambda record: (order.get(record.evaluator, len(order)), record.about.hub_type is None))


def _titles(records: Sequence[ResultRecord]) -> dict[str, str]:
    """Name the column of each ``comparability``, with the test set where there are several."""
    several = len({(record.dataset, record.split) for record in records}) > 1

    def title(record: ResultRecord) -> str:
        place = f" ({Path(record.dataset).name}, {record.split})" if several else ""
        return record.name + evaluator_of(record).variant(record) + place

    return column_titles(records, title)


def _repeats(record: ResultRecord, records: Sequence[ResultRecord]) -> bool:
    """Return whether a metric that cards do not list has the values of one that they list, for every encoder.

    R2 in SIE's form does so for families with one parameter.
    """
    if record.about.hub_type is not None:
        return False
    mine = _values(records, record.task, record.metric)
    listed = {other.metric for other in records if other.task == record.task and other.about.hub_type is not None}
    return any(mine.items() <= _values(records, record.task, metric).items() for metric in listed)


def _values(records: Sequence[ResultRecord], task: str, metric: str) -> dict[tuple[str, ...], tuple[float, ...]]:
    chosen = [record for record in records if (record.task, record.metric) == (task, metric)]
    return {(record.encoder, record.features, record.dataset, str(record.protocol)): record.values for record in chosen}


def plain_table(records: Sequence[ResultRecord]) -> str:
    """Write a table for the terminal: measurements downwards, encoders across, so that it stays narrow."""
    header, rows = table_rows(records)
    return align_columns([[name, *(row[position] for row in rows)] for position, name in enumerate(header)], heads=2)


def align_columns(rows: Sequence[Sequence[str]], heads: int = 1) -> str:
    """Write rows with columns below each other, the first ``heads`` of them as a header."""
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in rows]
    return "\n".join([*lines[:heads], "  ".join("-" * width for width in widths), *lines[heads:]])


def markdown_table(records: Sequence[ResultRecord]) -> str:
    """Write the same numbers as a Markdown table, followed by ``protocol_notes``."""
    header, rows = table_rows(records)
    named = [[*map(plain, row)] for row in [header, *rows]]
    return "\n".join([table(named), "", protocol_notes(records), ""])


def protocol_notes(records: Sequence[ResultRecord]) -> str:
    """List data set, seeds and protocol of each column that cards list, one Markdown item each."""
    shown = _shown(records)
    titles = _titles(shown)
    listed = [record for record in shown if record.about.hub_type is not None]
    return "\n".join(dict.fromkeys(_note(record, titles[record.comparability]) for record in listed))


def _note(record: ResultRecord, title: str) -> str:
    settings = ", ".join(f"{key} {_words(value)}" for key, value in record.protocol.items() if value is not None)
    where = f"{record.dataset} ({record.split})"
    return f"- {plain(f'{title}: {where}, {len(record.seeds)} seed(s); {settings}')}."


def _words(value: Any) -> str:
    """Write a setting for readers: a family as the call that makes it."""
    if isinstance(value, dict) and "class" in value:
        arguments = [f"{name}={item}" for name, item in value.items() if name not in ("class", "ranges")]
        return f"{value['class']}({', '.join(arguments)})"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
