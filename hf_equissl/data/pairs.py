"""Two images at a time, and the numbers that lead from one to the other: what a data set says of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from ..views.base import Item
from .columns import list_columns, type_name
from .errors import ImageDecodeError, ImageSourceError

if TYPE_CHECKING:
    from .sources import ImageSource

# Name under which the column of second images stands among ``ImageSource.more``.
SECOND = "second image"


class Pairs(ABC):
    """How the rows of a source become pairs of images."""

    @property
    @abstractmethod
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the numbers that lead from the first image of a pair to the second; views name those they take."""

    @abstractmethod
    def item(
        self, source: ImageSource, row: Mapping[str, Any], rng: np.random.Generator, content: bytes | None = None
    ) -> Item:
        """Decode one pair.

        Args:
            source: The source that the row belongs to.
            row: A row as ``ImageSource.row`` returns it.
            rng: Chooses two images, where a row has more.
            content: The row's own image, encoded, where it was read before.

        Raises:
            ImageDecodeError: An image or its numbers cannot be read.
        """


@dataclass(frozen=True)
class ColumnPairs(Pairs):
    """A row holds both images, and in further columns the numbers.

    Attributes:
        columns: Column of numbers -> the names of its numbers.
    """

    columns: Mapping[str, tuple[str, ...]]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of all numbers, column by column."""
        return tuple(name for names in self.columns.values() for name in names)

    def item(
        self, source: ImageSource, row: Mapping[str, Any], rng: np.random.Generator, content: bytes | None = None
    ) -> Item:
        """Decode one pair; nothing is drawn."""
        content = source.content(row) if content is None else content
        images = tuple(source.decode_pixels(each) for each in (content, source.content(row, source.more[SECOND])))
        parameters: dict[str, float] = {}
        for column, names in self.columns.items():
            numbers = _numbers(row[column])
            if len(numbers) != len(names) or not np.isfinite(numbers).all():
                raise ImageDecodeError(f"Column {column!r} holds {row[column]}, expected {len(names)} finite numbers.")
            parameters |= dict(zip(names, numbers, strict=True))
        return Item(images, parameters or None, source.label(row))


def pair_columns(second: str | None, parameters: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns that a pair has beside its first image, as ``find_more_columns`` takes them.

    Raises:
        ValueError: There are parameters without a second image.
    """
    if second is None and parameters:
        raise ValueError(
            f"parameter_columns are {list(parameters)}, and no second_column is named: they lead from one image to "
            "another. Name the column with the second image."
        )
    return ({} if second is None else {SECOND: [second]}) | {name: [name] for name in parameters}


def find_pairs(
    features: Mapping[str, Any], first: Mapping[str, Any], columns: Sequence[str], source: str
) -> ColumnPairs:
    """Name the numbers of the columns that lead from one image to the other.

    Args:
        features: Features of the data set.
        first: Its first row.
        columns: Columns of numbers, all of which the data set has.
        source: Name of the source, which opens the error messages.

    Returns:
        Pairs whose numbers are called like their column, or ``<column>_0``, ``<column>_1`` ... where a row holds
        several.

    Raises:
        ImageSourceError: A column holds no numbers.
    """
    named: dict[str, tuple[str, ...]] = {}
    for column in columns:
        value, feature = first.get(column), features[column]
        if not _holds_numbers(feature) or value is None:
            what = "empty in the first row" if _holds_numbers(feature) else type_name(feature)
            raise ImageSourceError(
                f"{source}: parameter column {column!r} is {what}, expected numbers, or lists of them. Columns: "
                f"{list_columns(features)}."
            )
        count = len(_numbers(value))
        named[column] = tuple(f"{column}_{n}" for n in range(count)) if np.ndim(value) else (column,)
    return ColumnPairs(named)


def _numbers(value: Any) -> list[float]:
    """List the numbers of one row, in order; none where there is nothing."""
    if value is None or (isinstance(value, list) and None in value):
        return []
    return np.asarray(value, dtype=np.float64).ravel().tolist()


def _holds_numbers(feature: Any) -> bool:
    while not isinstance(feature, datasets.Value):
        if not hasattr(feature, "feature"):
            return hasattr(feature, "shape")  # an array of fixed shape, whose type is one of numbers
        feature = feature.feature
    return feature.dtype.startswith(("int", "uint", "float", "double"))
