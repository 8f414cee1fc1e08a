"""Which column holds the classes of a data set, and classes of every kind as numbers."""

from __future__ import annotations

from typing import Any

import datasets

from .columns import check_exists, list_columns, type_name
from .errors import ImageSourceError

# What columns of classes are called: the first group, in which one name is, is looked at.
_NAMES = (("label", "labels", "cls"), ("class", "class_name", "category", "target"))
HOW = "--label_column, or data.label_column of a recipe"


def find_label_column(
    features: datasets.Features, column: str | None, source: str, streaming: bool
) -> tuple[str | None, str]:
    """Choose the column with class labels: ``column`` if given, otherwise the only ``ClassLabel``, otherwise the only
    column that is called like one (``label``, ``class``, ...) and holds integers, texts, booleans or floats.

    Returns:
        Its name, and "". Or ``None``, and a sentence that says why, where something looks like labels.

    Raises:
        ImageSourceError: ``column`` does not exist, or holds nothing that classes can be.
    """
    if column is not None:
        check_exists(column, features, source, "label_column")
        reason = _why_not(column, features[column], streaming)
        if reason:
            raise ImageSourceError(f"{source}: {reason} Columns: {list_columns(features)}.")
        return column, ""
    found = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
    for names in _NAMES:
        found = found or [name for name in names if name in features and _kind(features[name])]
    if len(found) > 1:
        return None, f"Several columns hold classes: {', '.join(found)}. Choose one: {HOW}."
    reason = _why_not(found[0], features[found[0]], streaming) if found else ""
    return (None, reason) if reason or not found else (found[0], "")


def number_labels(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Turn texts into a ``ClassLabel``, in alphabetical order, and booleans and whole floats into integers.

    Images are not copied.

    Raises:
        ImageSourceError: There are floats that are not whole.
    """
    kind = _kind(rows.features[column])
    if kind in ("class", "integer"):
        return rows
    values = rows.select_columns([column])[:][column]
    feature: Any = datasets.Value("int64")
    if kind == "text":
        feature = datasets.ClassLabel(names=sorted({value for value in values if value is not None}))
        number = {name: index for index, name in enumerate(feature.names)}
        numbers = [None if value is None else number[value] for value in values]
    else:
        broken = next((value for value in values if value is not None and value != value // 1), None)
        if broken is not None:
            raise ImageSourceError(f"column {column!r} holds {broken}: classes are integers or names.")
        numbers = [None if value is None else int(value) for value in values]
    return rows.remove_columns(column).add_column(column, numbers, feature=feature)


def _why_not(column: str, feature: Any, streaming: bool) -> str:
    """A sentence that says why a column cannot be the labels, and what to do; empty where it can."""
    kind = _kind(feature)
    if kind is None:
        return f"label column {column!r} is {type_name(feature)}, expected ClassLabel or integers, or names of classes."
    if streaming and kind not in ("class", "integer"):
        return (
            f"label column {column!r} is {type_name(feature)}, and a stream cannot number what it has not read. Leave "
            "out streaming, or store the column as ClassLabel or integers."
        )
    return ""


def _kind(feature: Any) -> str | None:
    """ "class", "integer", "text", "boolean" or "float"; ``None`` of what holds no classes."""
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    kind = feature.dtype.removeprefix("large_").rstrip("0123456789").lstrip("u") if _is_value(feature) else ""
    return {"int": "integer", "string": "text", "bool": "boolean", "float": "float"}.get(kind)


def _is_value(feature: Any) -> bool:
    return isinstance(feature, datasets.Value)
