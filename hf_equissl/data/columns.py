"""Which column of a data set holds the images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

import datasets

from ..utils.suggestions import did_you_mean
from .errors import ImageSourceError

# Suffixes of formats that Pillow reads and people keep photographs in. They decide which files of a folder are images.
_SUFFIXES = "jpg jpeg jpe jfif png webp bmp dib gif tif tiff ppm pgm pbm pnm avif jp2 j2k jpx"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _SUFFIXES.split(" "))
# Rows by which columns are recognised.
_FIRST_ROWS = 16
IMAGE_COLUMN_OPTION = "--image_column, or data.column of a recipe"
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"P4", b"P5", b"P6")


def read_columns(
    rows: datasets.Dataset | datasets.IterableDataset, name: str
) -> tuple[datasets.Features, list[dict[str, Any]]]:
    """Read column types, and the first rows with their images not decoded.

    Raises:
        ImageSourceError: There are no rows, or they cannot be read; ``name`` opens the message.
    """
    features = rows.features
    raw = rows
    for column, feature in (features or {}).items():
        if isinstance(feature, datasets.Image):
            raw = raw.cast_column(column, datasets.Image(decode=False))
    first: list[dict[str, Any]] = []
    try:
        for row in itertools.islice(iter(raw), _FIRST_ROWS):
            first.append(row)
    except (ImageSourceError, MemoryError):
        raise
    except Exception as error:  # Readers of every format raise their own.
        if not first:  # else a later shard is broken, which whoever reads it will say
            raise ImageSourceError(f"{name}: the first rows cannot be read: {type(error).__name__}: {error}") from error
    if not first:
        raise ImageSourceError(f"{name} holds no rows. Point --data at the images, or choose another split.")
    if features is None:  # Streams of some formats know their columns only once they are read.
        features = datasets.Dataset.from_list(first).features
    return features, first


def find_image_column(
    features: datasets.Features, rows: Sequence[Mapping[str, Any]], column: str | None, source: str
) -> str:
    """Choose the column with images: ``column`` if given, otherwise the only one that can be it.

    Looked for in this order: ``datasets.Image`` features; structs of bytes and path, among others; binary columns whose
    values mostly begin like an image file; texts that mostly end like the name or the address of one. A column that is
    named by the user only has to be of such a type.

    Args:
        features: Columns of the data set.
        rows: Its first rows, not decoded.
        column: The user's choice.
        source: Opens the error messages.

    Raises:
        ImageSourceError: No such column, no column with images, or several.
    """
    if column is not None:
        check_exists(column, features, source, "column")
        if not _can_hold_images(features[column]):
            raise ImageSourceError(
                f"{source}: column {column!r} is {type_name(features[column])} and holds no images. "
                f"Columns: {list_columns(features)}."
            )
        return column
    tests: tuple[Callable[[str], bool], ...] = (
        lambda name: isinstance(features[name], datasets.Image),
        lambda name: isinstance(features[name], dict) and {"bytes", "path"} <= set(features[name]),
        lambda name: _most_pass(_begins_like_an_image, rows, name),
        lambda name: _most_pass(_ends_like_an_image, rows, name),
    )
    for test in tests:
        found = [name for name in features if test(name)]
        if len(found) > 1:
            raise ImageSourceError(
                f"{source}: several columns hold images: {', '.join(found)}. Choose one: {IMAGE_COLUMN_OPTION}."
            )
        if found:
            return found[0]
    raise ImageSourceError(
        f"{source}: no column holds images in the first {len(rows)} rows. Columns: {list_columns(features)}. "
        f"Expected a datasets.Image feature, encoded bytes, or paths of image files; name the image column: "
        f"{IMAGE_COLUMN_OPTION}."
    )


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
    """List columns with their types, for messages."""
    return ", ".join(f"{name} ({type_name(feature)})" for name, feature in features.items())


def check_exists(column: str, features: datasets.Features, source: str, what: str) -> None:
    """Raise an ``ImageSourceError`` if there is no such column, naming the nearest one."""
    if column in features:
        return
    hint = did_you_mean(column, features)
    raise ImageSourceError(f"{source}: there is no {what} {column!r}.{hint} Columns: {list_columns(features)}.")


def type_name(feature: Any) -> str:
    """Return what a column holds, in words."""
    if isinstance(feature, datasets.Value):
        return feature.dtype
    return "struct of " + " and ".join(feature) if isinstance(feature, dict) else type(feature).__name__


def _can_hold_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary", "string", "large_string", "null")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and bool({"bytes", "path"} & set(feature)))


def _most_pass(test: Callable[[Any], bool], rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether more than half of a column's values, but for missing ones, pass a test."""
    values = [value for row in rows if (value := _unwrap(row.get(column)))]
    return 2 * sum(map(test, values)) > len(values)


def _unwrap(value: Any) -> Any:
    """Take the bytes or the path out of a struct; leave other values as they are."""
    return (value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else value


def _begins_like_an_image(value: Any) -> bool:
    if not isinstance(value, bytes):
        return False
    is_webp, is_jp2_or_avif = value[8:12] == b"WEBP", value[4:8] in (b"ftyp", b"jP  ")
    return value.startswith(_SIGNATURES) or is_webp or is_jp2_or_avif


def _ends_like_an_image(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    path = urlsplit(value).path if "://" in value else value  # the address without the signature behind it
    return PurePath(path).suffix.lower() in IMAGE_SUFFIXES
