"""Rendered objects with their latents, in the folders of 3DIEBench: each object from many sides and in many lights."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import datasets
import numpy as np

from ..views.base import Item
from .decoding import read_file
from .errors import ImageDecodeError, ImageSourceError
from .pairs import Pairs

if TYPE_CHECKING:
    from .sources import ImageSource

# Word that the names of split files begin with -> the split's name.
_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_SUFFIXES = (".npy", ".npz")
_NUM_LATENTS = 7
_NUM_ANGLES = 3
# Names of the latents behind the angles, whose differences are given.
_DIFFERENCES = ("floor_hue", "light_theta", "light_phi", "light_hue")


@dataclass(frozen=True)
class RenderedPairs(Pairs):
    """Two renders of one object, drawn among all of it, and what leads from the first to the second.

    "Self-supervised learning of Split Invariant Equivariant representations" (https://arxiv.org/abs/2302.10283), with
    the conventions of facebookresearch/SIE (``src/dataset.py``). Latents are three angles about fixed axes x, y and z
    in radians, the hue of the floor, two angles of the light, and its hue. The rotation is inverse(R_1) R_2 as a unit
    quaternion x, y, z, w, whose sign is that of the product; of the other latents the differences are given.

    Attributes:
        views: Renders of each object.
    """

    views: int

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The quaternion's four, then the differences."""
        return (*(f"rotation_{axis}" for axis in "xyzw"), *_DIFFERENCES)

    def item(
        self, source: ImageSource, row: Mapping[str, Any], rng: np.random.Generator, content: bytes | None = None
    ) -> Item:
        """Draw two renders and decode them; the row's own, which ``content`` would hold, is one of many."""
        folder = (source.root or Path()) / PurePosixPath(row[source.image_column]).parent
        numbers = rng.choice(self.views, size=2, replace=False)
        try:
            images = tuple(source.decode_pixels(read_file(folder / f"image_{number}.jpg")) for number in numbers)
            first, second = (read_latents(folder, number) for number in numbers)
        except (OSError, ImageSourceError) as error:
            raise ImageDecodeError(str(error)) from error
        rotation = relative_rotation(first[:_NUM_ANGLES], second[:_NUM_ANGLES])
        values = (*rotation, *(second - first)[_NUM_ANGLES:])
        parameters = dict(zip(self.parameter_names, map(float, values), strict=True))
        return Item(images, parameters, source.label(row))


def find_split_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Find ``<split>_images.npy`` and ``<split>_labels.npy`` (or ``.npz``): split -> both of its files."""
    found = {}
    for word, split in _SPLITS.items():
        pair = [_find_array(folder, f"{word}_{what}") for what in ("images", "labels")]
        if pair[0] is not None and pair[1] is not None:
            found[split] = (pair[0], pair[1])
    return found


def open_renders(folder: Path, splits: Mapping[str, tuple[Path, Path]], wanted: Sequence[str]) -> dict[str, Any]:
    """Make rows of objects, each with the path of its first render and its class.

    Args:
        folder: Folder of the objects.
        splits: Files of each split, as ``find_split_files`` found them.
        wanted: Splits to read.

    Returns:
        Split -> rows.

    Raises:
        ImageSourceError: A split file is broken, or does not fit the other.
    """
    arrays = {split: _read_split(*files) for split, files in splits.items()}
    count = 1 + max(int(labels.max(initial=-1)) for _, labels in arrays.values())
    features = datasets.Features({
        "image": datasets.Value("string"),
        "label": datasets.ClassLabel(names=[str(number) for number in range(count)]),
    })  # fmt: skip
    rows = {}
    for split in wanted:
        names, labels = arrays[split]
        paths = [f"{str(name).strip('/')}/image_0.jpg" for name in names]
        rows[split] = datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)
    return rows


def find_rendered_pairs(folder: Path, first: str, source: str) -> RenderedPairs:
    """Count the renders of the first object, as many as every object has.

    Args:
        folder: Folder of the objects.
        first: Path of the first object's first render, below ``folder``.
        source: Name of the source, which opens the error messages.

    Raises:
        ImageSourceError: There are fewer than two, or one has no latents.
    """
    place = folder / PurePosixPath(first).parent
    views = 0
    while (place / f"image_{views}.jpg").is_file():
        views += 1
    if views < 2:
        raise ImageSourceError(
            f"{source}: {place} holds {views} renders, expected at least image_0.jpg and image_1.jpg. The split files "
            "must lie beside the objects that they name."
        )
    for number in range(views):
        read_latents(place, number)
    return RenderedPairs(views)


def read_latents(folder: Path, number: int) -> np.ndarray:
    """Read the latents of one render, (7,) in float64.

    Raises:
        ImageSourceError: They are absent or broken.
    """
    path = _find_array(folder, f"latent_{number}")
    if path is None:
        raise ImageSourceError(f"{folder}: image_{number}.jpg has no latents, expected latent_{number}.npy beside it.")
    latents = _read_array(path)
    if latents.shape != (_NUM_LATENTS,) or latents.dtype.kind not in "fiu" or not np.isfinite(latents).all():
        raise ImageSourceError(
            f"{path}: holds {latents.dtype} of shape {latents.shape}, expected {_NUM_LATENTS} finite numbers."
        )
    return latents.astype(np.float64)


def relative_rotation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute inverse(R_1) R_2 as a unit quaternion (4,), x, y, z, w, from angles (3,) about fixed axes, in radians."""
    inverse = _quaternion(first) * np.array([-1, -1, -1, 1])
    return _product(inverse, _quaternion(second))


def _quaternion(angles: np.ndarray) -> np.ndarray:
    """Write the rotation about x, then about y, then about z as a quaternion."""
    result = np.array([0.0, 0.0, 0.0, 1.0])
    for axis, angle in enumerate(angles):
        turn = np.zeros(4)
        turn[axis], turn[3] = np.sin(angle / 2), np.cos(angle / 2)
        result = _product(turn, result)
    return result


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiply two quaternions (Hamilton's product): the rotation b first, then a."""
    vector = a[3] * b[:3] + b[3] * a[:3] + np.cross(a[:3], b[:3])
    return np.array([*vector, a[3] * b[3] - a[:3] @ b[:3]])


def _read_split(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the folders of the objects of one split, and their classes."""
    names, classes = _read_array(images), _read_array(labels)
    if names.dtype.kind != "U" or names.ndim != 1 or not len(names):
        raise ImageSourceError(
            f"{images}: holds {names.dtype} of shape {names.shape}, expected the folders of objects."
        )
    if classes.dtype.kind not in "iu" or classes.shape != names.shape or classes.min() < 0:
        raise ImageSourceError(
            f"{labels}: holds {classes.dtype} of shape {classes.shape}, expected a class from 0 on for each of the "
            f"{len(names)} objects of {images.name}."
        )
    if outside := [name for name in names.tolist() if ".." in PurePosixPath(name).parts]:
        raise ImageSourceError(f"{images}: {outside[0]!r} leads out of the folder of the data set.")
    return names, classes


def _find_array(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None)


def _read_array(path: Path) -> np.ndarray:
    """Read an ``.npy`` file, or the one array of an ``.npz`` file; what is pickled in it is never opened."""
    try:
        loaded: Any = np.load(io.BytesIO(read_file(path)), allow_pickle=False)
        names = [] if isinstance(loaded, np.ndarray) else list(loaded.files)
        if isinstance(loaded, np.ndarray) or len(names) == 1:
            return loaded if not names else loaded[names[0]]
    except (ValueError, EOFError, OSError, BadZipFile) as error:
        raise ImageSourceError(f"{path}: cannot be read as an array of numbers or texts ({error}).") from error
    raise ImageSourceError(f"{path}: holds {len(names)} arrays, expected one.")
