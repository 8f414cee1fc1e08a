"""One string that says where images are, turned into a data set that training can read."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import fsspec
import numpy as np
from PIL import Image

from ..utils.files import expand_home
from ..utils.redaction import redact
from ..views.base import Item
from .columns import find_image_column, find_more_columns, read_columns
from .decoding import AS_STORED, MAX_PIXELS, Decoding, decode_image, decode_pixels, open_image, read_file
from .errors import ImageDecodeError, ImageSourceError, explain_decode_errors
from .image_folders import decode_path, show_name
from .labels import find_label_column, number_labels
from .locations import open_dataset
from .pairs import Pairs, find_pairs, pair_columns
from .subsets import Subset, take_subset
from .tars import choose_members

__all__ = ["ImageInfo", "ImageSource", "load_images"]

# Rows by which a data set is recognised.
_COMPARED, _COMPARED_OF_STREAM = 64, 8
Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


class ImageInfo(NamedTuple):
    """One image as stored: its name, size in pixels and Pillow mode."""

    name: str
    width: int
    height: int
    mode: str


@dataclass(frozen=True)
class ImageSource:
    """Images, still encoded, and how to get at them.

    Attributes:
        dataset: Only the columns that follow; images are not decoded.
        name: What the user wrote, and the split.
        image_column, label_column: Names; no label column where there are no labels.
        num_classes: Number of classes of a ``ClassLabel`` column, else ``None``.
        root: Where relative paths in a column of paths start.
        files: Names of the files of a stream, in the order of its shards; empty where they are not known.
        digest: Digest of the names of the files of a stream: another one where they are renamed or in another order.
        more: Further columns, by what they hold.
        decoding: How images become RGB where files leave a choice.
        label_hint: Why there is no label column although something looks like one, and what to do.
        notes: What lies beside the images and is not used.
        numbers: Where these are some rows of a larger source, their numbers there, by which messages name them.
        pairs: How a row becomes two images; ``None``: it is one.
    """

    dataset: Rows
    name: str
    image_column: str
    label_column: str | None = None
    num_classes: int | None = None
    root: Path | None = None
    files: tuple[str, ...] = ()
    digest: str = ""
    more: Mapping[str, str] = field(default_factory=dict)
    decoding: Decoding = AS_STORED
    label_hint: str = ""
    notes: tuple[str, ...] = ()
    numbers: np.ndarray | None = field(default=None, compare=False, repr=False)
    pairs: Pairs | None = None

    @property
    def streaming(self) -> bool:
        """Whether rows can only be read one after the other."""
        return isinstance(self.dataset, datasets.IterableDataset)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; empty where they have none."""
        feature = (self.dataset.features or {}).get(self.label_column or "")
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()

    @property
    def num_rows(self) -> int | None:
        """Number of images, ``None`` where a stream does not say."""
        return None if isinstance(self.dataset, datasets.IterableDataset) else self.dataset.num_rows

    def __len__(self) -> int:
        """Return the number of images.

        Raises:
            TypeError: The source is streamed.
        """
        if self.num_rows is None:
            raise TypeError(f"{self.name} is streamed and has no length. Set training.max_steps.")
        return self.num_rows

    def take(self, rows: np.ndarray) -> ImageSource:
        """Keep some rows; messages still name them by their numbers in the whole.

        Raises:
            ImageSourceError: It is a stream.
        """
        if not isinstance(self.dataset, datasets.Dataset):
            raise ImageSourceError(f"{self.name} is streamed: rows cannot be chosen by number. Leave out streaming.")
        if len(rows) == len(self):
            return self
        numbers = rows if self.numbers is None else self.numbers[rows]
        return replace(self, dataset=self.dataset.select(rows), numbers=numbers)

    def row(self, index: int) -> dict[str, Any]:
        """Return the row ``index`` of the data set, column name -> value, with images still encoded."""
        return self.dataset[index]

    def content(self, row: Mapping[str, Any], column: str | None = None) -> bytes:
        """Return a row's image as encoded bytes, read from its path or address if the row does not hold them.

        Args:
            row: As ``row`` returns it.
            column: Another column with images than the source's own.

        Raises:
            ImageDecodeError: There is nothing, or it cannot be read.
        """
        value = row[column or self.image_column]
        if isinstance(value, Mapping):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if not value:
            raise ImageDecodeError("The row holds no image.")
        if isinstance(value, bytes):
            return value
        with explain_decode_errors():
            if "://" in value:
                with fsspec.open(value, "rb") as file:
                    return file.read()
            path = decode_path(value)
            return read_file(self.root / path if self.root else path)

    def decode(self, content: bytes) -> Image.Image:
        """Decode what ``content`` returned to RGB, upright.

        Raises:
            ImageDecodeError: It does not decode.
        """
        return decode_image(content, self.decoding)

    def decode_pixels(self, content: bytes) -> np.ndarray:
        """Decode what ``content`` returned as ``decode`` does, to an array uint8 (H, W, 3).

        Raises:
            ImageDecodeError: It does not decode.
        """
        return decode_pixels(content, self.decoding)

    def item(self, row: Mapping[str, Any], rng: np.random.Generator, content: bytes | None = None) -> Item:
        """Decode what views are made of. Sources whose items are pairs draw here which ones.

        Args:
            row: As ``row`` returns it.
            rng: The sample's generator, before the views draw from it; one image needs none of it.
            content: The row's own image as ``content`` returned it, where that was called before.

        Raises:
            ImageDecodeError: An image, or what a pair is told of, cannot be read or decoded.
        """
        if self.pairs is not None:  # which may read other images than the row's own
            return self.pairs.item(self, row, rng, content)
        content = self.content(row) if content is None else content
        return Item((self.decode_pixels(content),), label=self.label(row))

    def label(self, row: Mapping[str, Any]) -> int | None:
        """Return a row's class, ``None`` where it has none."""
        return row[self.label_column] if self.label_column else None

    def labels(self) -> list[int | None] | None:
        """Read the class of every row without touching the images; ``None`` where there are none. Not of a stream."""
        if self.label_column is None:
            return None
        return self.dataset.select_columns([self.label_column])[:][self.label_column]

    def item_name(self, row: Mapping[str, Any], place: int | str | None = None) -> str:
        """Return what messages call a row's image, as no other is called.

        Args:
            row: A row of this source.
            place: Its number, or its shard and number in words.
        """
        if self.numbers is not None and isinstance(place, int):
            place = int(self.numbers[place])
        where = place if isinstance(place, str) else f"{self.name}, row {place}"
        value = row[self.image_column]
        path = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(path, str) or not path:
            return f"{self.name}, an image without a name" if place is None else where
        if isinstance(value, str) or value.get("bytes") is None:  # then the path is where the image lies
            path = decode_path(path)
            if self.root is not None and (self.root / path).exists():
                return show_name(str(self.root / path))
            if os.path.isabs(path) or "://" in path:
                return redact(path)
        return path if place is None else f"{path} ({where})"

    def check(self, count: int = 8) -> list[ImageInfo]:
        """Decode the first ``count`` images.

        Returns:
            Those that decode.

        Raises:
            ImageDecodeError: None of them does.
        """
        good, bad = [], []
        for index, row in enumerate(self._first(count)):
            name = self.item_name(row, index)
            try:
                content = self.content(row)
                self.decode(content)
                stored = open_image(content, self.decoding.max_pixels)
                good.append(ImageInfo(name, *stored.size, stored.mode))
            except ImageDecodeError as error:
                bad.append(f"{name} ({error})")
        if not good:
            raise ImageDecodeError(f"{self.name}: none of the first {len(bad)} images decodes: {'; '.join(bad)}")
        return good

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits by which these images are recognised, wherever they lie.

        They follow from the number of rows, from all names where rows are paths (of a stream: those of its files), and
        from 64 rows in full (of a stream: the first 8). Millions of files take a second.
        """
        total = hashlib.blake2b(digest_size=8)
        if isinstance(self.dataset, datasets.IterableDataset):
            total.update(self.digest.encode())
            rows = self._first(_COMPARED_OF_STREAM)
        else:
            count = len(self.dataset)
            total.update(str(count).encode())
            column = self.dataset.features[self.image_column]
            if isinstance(column, datasets.Value) and column.dtype == "string":
                total.update("\n".join(map(str, self.dataset[self.image_column][:])).encode())
            chosen = np.unique(np.linspace(0, count - 1, min(count, _COMPARED)).round().astype(int)).tolist()
            rows = map(self.row, chosen)
        for row in rows:
            try:
                total.update(hashlib.blake2b(self.content(row)).digest())
            except ImageDecodeError:
                total.update(b"none")
        return total.hexdigest()

    def describe(self) -> str:
        """Describe the source in one line, for people."""
        count = "a stream of images" if self.num_rows is None else f"{self.num_rows} images"
        label = f"labels {self.label_column!r}" if self.label_column else "no labels"
        pairs = f", pairs with {', '.join(self.pairs.parameter_names) or 'no parameters'}" if self.pairs else ""
        return f"{self.name}: {count} in column {self.image_column!r}, {label}{pairs}"

    def _first(self, count: int) -> Iterator[dict[str, Any]]:
        return itertools.islice(iter(self.dataset), count)


def load_images(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    config_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
    more_columns: Mapping[str, Sequence[str]] | None = None,
    value_range: str | tuple[float, float] = "full",
    max_pixels: int = MAX_PIXELS,
    subset: Mapping[str, Any] | None = None,
    second_column: str | None = None,
    parameter_columns: Sequence[str] | None = None,
) -> ImageSource:
    """Find images wherever ``source`` says they are. Everything that can be wrong is said here, before training.

    ``source`` is one of

    - a data set on the Hub (``owner/name``),
    - a folder of images: flat, or one sub-folder per class (then there are labels), with or without ``train``, ``val``,
      ``test`` above; only paths are listed, nothing is copied,
    - a ``.parquet`` or ``.arrow`` file, a folder with such files, or a glob pattern,
    - a folder written by ``save_to_disk``,
    - a folder of rendered objects as in 3DIEBench: ``<class>/<object>/image_0.jpg``, ``latent_0.npy`` ... below it, and
      the split files ``train_images.npy``, ``train_labels.npy`` ... in it. An object is a row; training takes two of
      its renders with what leads from one to the other,
    - a WebDataset ``.tar`` shard, a folder or a glob pattern of shards, or the address of one (``https://``, ``hf://``);
      ``{000..146}`` in a path or an address stands for all these numbers.

    Without streaming, ``datasets`` converts parquet files and tar shards once into its cache, which takes as much space
    as they do; with ``streaming=True`` they are read where they are.

    Args:
        source: See above.
        split: Name of a split; without streaming also a slice such as ``train[:10%]``.
        column: Column with the images, if there are several.
        label_column: Column with the classes; found by itself where there is one ``ClassLabel``.
        streaming: Read rows one after the other instead of by index.
        config_name, revision: Configuration and revision of a Hub data set.
        cache_dir: Cache of ``datasets``; default: its own.
        num_proc: Processes that convert.
        more_columns: What else is read of each row, such as a mask -> how its column may be called; the first one that
            exists is taken. Images in it are not decoded, and it is not mistaken for ``column``.
        value_range, max_pixels: How images are decoded, see ``Decoding``.
        subset: Take a part of the rows alone: the fields of a ``Subset``, such as ``{"share": 0.8}``. Not of a stream.
        second_column: Column with a second image: training takes both, as the first and the last view.
        parameter_columns: Columns with the numbers that lead from the first image to the second, one or a list each,
            for the transformation ``given``.

    Raises:
        ImageSourceError: Source, split or column do not exist, leave a choice open, or cannot be read; or there are no
            images.
        ValueError: ``value_range``, ``max_pixels`` or ``subset`` mean nothing, or there are parameters without pairs.
    """
    more_columns = {**(more_columns or {}), **pair_columns(second_column, parameter_columns or ())}
    decoding = Decoding(value_range, max_pixels)
    chosen = None if subset is None else Subset(**subset)
    try:
        source = expand_home(source)
    except ValueError as error:
        raise ImageSourceError(str(error)) from error
    if show_name(source) != source:
        raise ImageSourceError(f"{show_name(source)}: the name is not UTF-8, and could not be written down. Rename it.")
    name = f"{redact(source)} ({split})"
    with _quiet_unless_first_rank():
        opened = open_dataset(
            source,
            split=split,
            streaming=streaming,
            config_name=config_name,
            revision=revision,
            cache_dir=cache_dir,
            num_proc=num_proc,
            members=choose_members(column, label_column, more_columns),
        )
    rows = opened.rows
    features, first = read_columns(rows, name)
    more = find_more_columns(features, more_columns, name)
    others = datasets.Features({key: value for key, value in features.items() if key not in more.values()})
    image_column = find_image_column(others, first, column, name)
    labelled_by_user = label_column is not None
    label_column, label_hint = find_label_column(features, label_column, name, streaming)
    columns = list(dict.fromkeys([image_column, *([label_column] if label_column else []), *more.values()]))
    rows = (opened.reopen(columns) if opened.reopen else rows).select_columns(columns)
    for image in (image_column, *more.values()):
        if isinstance(features[image], datasets.Image):
            rows = rows.cast_column(image, datasets.Image(decode=False))
    if label_column and isinstance(rows, datasets.Dataset):
        try:
            rows = number_labels(rows, label_column)
        except ImageSourceError as error:
            if labelled_by_user:
                raise ImageSourceError(f"{name}: {error}") from error
            label_column, label_hint = None, f"The {error}"
    classes = (rows.features or features)[label_column] if label_column else None
    whole = ImageSource(
        dataset=rows,
        name=name,
        image_column=image_column,
        label_column=label_column,
        num_classes=classes.num_classes if isinstance(classes, datasets.ClassLabel) else None,
        root=opened.root,
        files=opened.files,
        digest=opened.digest,
        more=more,
        decoding=decoding,
        label_hint=label_hint or ("" if label_column else opened.label_hint),
        notes=opened.notes,
        pairs=find_pairs(features, first[0], parameter_columns or (), name) if second_column else opened.pairs,
    )
    return whole if chosen is None else take_subset(whole, chosen)


@contextmanager
def _quiet_unless_first_rank() -> Iterator[None]:
    """Show no progress bars of ``datasets`` on ranks other than 0."""
    quiet = int(os.environ.get("RANK", "0")) != 0 and datasets.is_progress_bar_enabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()
