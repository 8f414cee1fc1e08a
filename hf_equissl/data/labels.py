"""Which column holds the classes of a data set, and classes of every kind as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import datasets

from .columns import check_exists, list_columns, type_name
from .errors import ImageSourceError

if TYPE_CHECKING:
    from .sources import ImageSource

# Names of columns with classes: the first of these groups counts of which a column has a name.
_NAMES = (("label", "labels", "cls"), ("class", "class_name", "category", "target"))
HOW = "--label_column, or data.label_column of a recipe"
# Classes that an error message lists.
_LISTED = 5


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


def match_classes(source: ImageSource, classes: Sequence[str], whose: str) -> ImageSource:
    """Number the classes of a source as others are numbered, by their names; without names on either side, as it is.

    Every split numbers its own classes, so that one in which a class is missing counts differently.

    Args:
        source: Such as a test split.
        classes: Names in the order of their numbers, such as ``train.classes``.
        whose: Who has these classes, for messages.

    Raises:
        ImageSourceError: There are images of other classes; they are named. Of a stream, that shows when it is read.
    """
    own, column = source.classes, source.label_column
    if not own or not classes or own == tuple(classes) or column is None:
        return source
    places = {name: place for place, name in enumerate(classes)}
    numbers = {number: places[name] for number, name in enumerate(own) if name in places}
    feature = datasets.ClassLabel(names=list(classes))
    rows = source.dataset
    if isinstance(rows, datasets.IterableDataset):
        features = datasets.Features({**(rows.features or {}), column: feature})
        renumbered: Any = rows.map(
            _renumber_row,
            features=features,
            fn_kwargs={"column": column, "own": own, "numbers": numbers, "where": source.name, "whose": whose},
        )
    else:
        values = source.labels() or []
        _refuse_others(values, own, numbers, source.name, whose)
        values = [value if value is None or value < 0 else numbers[value] for value in values]
        renumbered = rows.remove_columns(column).add_column(column, values, feature=feature)
    return replace(source, dataset=renumbered, num_classes=len(classes))


def _renumber_row(
    row: dict[str, Any], column: str, own: Sequence[str], numbers: Mapping[int, int], where: str, whose: str
) -> dict[str, Any]:
    value = row[column]
    if value is None or value < 0:
        return row
    _refuse_others([value], own, numbers, where, whose)
    return {**row, column: numbers[value]}


def _refuse_others(
    values: Sequence[int | None], own: Sequence[str], numbers: Mapping[int, int], where: str, whose: str
) -> None:
    """Raise an ``ImageSourceError`` if there are labels that have no number."""
    others = Counter(value for value in values if value is not None and value >= 0 and value not in numbers)
    if not others:
        return
    listed = [f"{own[value]!r} ({count} image{'s' * (count != 1)})" for value, count in others.most_common(_LISTED)]
    more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
    raise ImageSourceError(
        f"{where} has {len(others)} class{'es' * (len(others) != 1)} that {whose} does not have: {', '.join(listed)}"
        f"{more}. What is fitted there cannot name them. Give both the same classes, or take these images out."
    )


def _why_not(column: str, feature: Any, streaming: bool) -> str:
    """Say why a column cannot be the labels, and what to do; nothing where it can."""
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
    """Return "class", "integer", "text", "boolean" or "float"; ``None`` for a column that holds no classes."""
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    kind = feature.dtype.removeprefix("large_").rstrip("0123456789").lstrip("u") if _is_value(feature) else ""
    return {"int": "integer", "string": "text", "bool": "boolean", "float": "float"}.get(kind)


def _is_value(feature: Any) -> bool:
    return isinstance(feature, datasets.Value)
