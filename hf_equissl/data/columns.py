"""Which column of a data set holds the images, and which the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import datasets

from ..utils.suggestions import did_you_mean
from .errors import ImageSourceError

# What Pillow reads and people keep photographs in; also decides which files of a folder are images.
_SUFFIXES = "jpg jpeg jpe jfif png webp bmp dib gif tif tiff ppm pgm pbm pnm avif jp2 j2k jpx"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _SUFFIXES.split(" "))
_HOW = "--image_column, or data.column of a recipe"
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"P4", b"P5", b"P6")


def find_image_column(features: datasets.Features, row: Mapping[str, Any], column: str | None, source: str) -> str:
    """The column with images: ``column`` if given, otherwise the only one that can be it.

    Looked for in this order: ``datasets.Image`` features; structs of bytes and path; binary columns whose first value
    begins like an image file; strings whose first value ends like the name of one.

    Args:
        features: Of the data set.
        row: Its first row, not decoded.
        column: The user's choice.
        source: Opens the error messages.

    Raises:
        ImageSourceError: No such column, no column with images, or several.
    """
    tests: tuple[Callable[[str], bool], ...] = (
        lambda name: isinstance(features[name], datasets.Image),
        lambda name: isinstance(features[name], dict) and set(features[name]) == {"bytes", "path"},
        lambda name: _begins_like_an_image(row.get(name)),
        lambda name: _ends_like_an_image(row.get(name)),
    )
    if column is not None:
        _check_exists(column, features, source, "column")
        if not any(test(column) for test in tests):
            raise ImageSourceError(
                f"{source}: column {column!r} is {_type_name(features[column])} and holds no images. "
                f"Columns: {list_columns(features)}."
            )
        return column
    for test in tests:
        found = [name for name in features if test(name)]
        if len(found) > 1:
            raise ImageSourceError(f"{source}: several columns hold images: {', '.join(found)}. Choose one: {_HOW}.")
        if found:
            return found[0]
    raise ImageSourceError(
        f"{source}: no column holds images. Columns: {list_columns(features)}. Expected a datasets.Image feature, "
        f"encoded bytes, or paths of image files; name the image column: {_HOW}."
    )


def find_label_column(features: datasets.Features, column: str | None, source: str) -> str | None:
    """The column with class labels: ``column`` if given, otherwise the only ``ClassLabel``, otherwise an integer column
    that is called like one (``label``, ``labels``, ``cls``), otherwise ``None``.

    Raises:
        ImageSourceError: ``column`` does not exist or holds no integers.
    """
    if column is not None:
        _check_exists(column, features, source, "label_column")
        if not _is_integer(features[column]):
            raise ImageSourceError(
                f"{source}: label column {column!r} is {_type_name(features[column])}, expected ClassLabel or "
                f"integers. Columns: {list_columns(features)}."
            )
        return column
    found = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
    if not found:
        found = [name for name in ("label", "labels", "cls") if name in features and _is_integer(features[name])]
    return found[0] if len(found) == 1 else None


def find_more_columns(features: datasets.Features, wanted: Mapping[str, Sequence[str]], source: str) -> dict[str, str]:
    """Find the columns that stand beside the image: for each name that is wanted, the first of its columns that exists.

    Raises:
        ImageSourceError: None of them does.
    """
    found = {}
    for name, columns in wanted.items():
        column = next((column for column in columns if column in features), None)
        if column is None:
            raise ImageSourceError(
                f"{source}: there is no column for {name}, such as {', '.join(columns)}. Columns: "
                f"{list_columns(features)}."
            )
        found[name] = column
    return found


def list_columns(features: Mapping[str, Any]) -> str:
    """Columns with their types, for messages."""
    return ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())


def _check_exists(column: str, features: datasets.Features, source: str, what: str) -> None:
    if column in features:
        return
    hint = did_you_mean(column, features)
    raise ImageSourceError(f"{source}: there is no {what} {column!r}.{hint} Columns: {list_columns(features)}.")


def _type_name(feature: Any) -> str:
    if isinstance(feature, datasets.Value):
        return feature.dtype
    return "struct of " + " and ".join(feature) if isinstance(feature, dict) else type(feature).__name__


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and feature.dtype.lstrip("u").startswith("int")
    )


def _begins_like_an_image(value: Any) -> bool:
    if not isinstance(value, bytes):
        return False
    is_webp, is_jp2_or_avif = value[8:12] == b"WEBP", value[4:8] in (b"ftyp", b"jP  ")
    return value.startswith(_SIGNATURES) or is_webp or is_jp2_or_avif


def _ends_like_an_image(value: Any) -> bool:
    return isinstance(value, str) and PurePath(value).suffix.lower() in IMAGE_SUFFIXES
