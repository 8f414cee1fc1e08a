"""People in images as samples, cut out upright to one size with their key points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...data import ImageSource
from .labelled_images import SourceSamples

# A box is widened by this before it is cut out, as in HRNet and ViTPose.
MARGIN = 1.25


@dataclass(frozen=True)
class Person:
    """One of the people in an image.

    Attributes:
        row: Row of the image in its source.
        points: (K, 3): x and y in pixels of the image, and the visibility, 0 where a point is not labelled.
        middle: x and y of the middle of what is cut out.
        extent: Its width and height in pixels, before it takes on the shape of the encoder's input.
        box: x, y, width, height.
        area: In pixels.
        head: Size of the head in pixels, 0 if it is not known.
    """

    row: int
    points: np.ndarray
    middle: tuple[float, float]
    extent: tuple[float, float]
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    area: float = 0.0
    head: float = 0.0


class PeopleSamples(SourceSamples):
    """People of a source's images: ``image`` and ``person``."""

    def __init__(self, source: ImageSource, people: Sequence[Person]) -> None:
        super().__init__(source)
        self.people = people

    def __len__(self) -> int:
        """Return the number of people."""
        return len(self.people)

    def read(self, index: int) -> dict[str, Any]:
        """Decode the image that one of the people is in."""
        person = self.people[index]
        return {"image": self.source.decode(self.source.content(self.source.row(person.row))), "person": person}

    def item_name(self, index: int) -> str:
        """Return the path of the image, or the source and the row."""
        row = self.people[index].row
        return self.source.item_name(self.source.row(row), row)


def affine(
    person: Person, size: tuple[int, int], scale: float = 1.0, degrees: float = 0.0, mirrored: bool = False
) -> np.ndarray:
    """Return the map from pixels of the image to those of a cut-out.

    Args:
        person: Who is cut out, with ``MARGIN`` around the box, which grows to the shape of the cut-out.
        size: Width and height of the cut-out.
        scale: How much more of the image is shown.
        degrees: By how much the image is turned, counter-clockwise.
        mirrored: Whether left and right change places, after all else.

    Returns:
        Float64 (2, 3): x and y there are ``matrix @ (x, y, 1)``. Corners of pixels count, not their middles.
    """
    width, height = size
    factor = min(width / person.extent[0], height / person.extent[1]) / (MARGIN * scale)
    cos, sin = math.cos(math.radians(degrees)) * factor, math.sin(math.radians(degrees)) * factor
    turn = np.array([[cos, sin], [-sin, cos]])
    matrix = np.concatenate([turn, (np.array([width, height]) / 2 - turn @ np.array(person.middle))[:, None]], 1)
    if mirrored:
        matrix[0] = -matrix[0]
        matrix[0, 2] += width
    return matrix


def cut_out(image: Image.Image, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resample an image by ``affine``'s map, bilinearly; black outside of it: uint8 (height, width, 3).

    What shrinks to a half or less is shrunk by whole numbers first, by means, so that nothing is skipped.
    """
    shrink = max(1, int(1 / math.sqrt(abs(np.linalg.det(matrix[:, :2])))))
    small = image.reduce(shrink) if shrink > 1 else image
    inverse = invert(matrix) / shrink
    cut = small.transform(size, Image.Transform.AFFINE, tuple(inverse.ravel()), Image.Resampling.BILINEAR)
    return np.asarray(cut)


def invert(matrix: np.ndarray) -> np.ndarray:
    """Return the inverse of a map (2, 3)."""
    inner = np.linalg.inv(matrix[:, :2])
    return np.concatenate([inner, -inner @ matrix[:, 2:]], 1)


def move_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Move points (..., 2) by a map (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]
