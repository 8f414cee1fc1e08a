"""Prepare an extraction: load and check everything that it needs before anything is computed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from ..data import ImageDecodeError, ImageSource, list_remarks, load_images
from ..data.labels import match_classes
from ..encoders.frozen import FrozenEncoder
from ..utils.files import readable_size
from .pipeline import begin
from .preprocessing import Preprocessing
from .reading import Shard, read_name, stream_rows
from .record import classes_before
from .settings import FORMATS, SHARD_BYTES, SHARD_IMAGES, ExtractionError, ExtractionSettings
from .shards import read_record, shard_features

# Number of rows in a source's digest, and number of first rows of which one has to decode.
_SAMPLED, _TRIED = 64, 8
# What a file takes beyond the features: a factor for its format, and bytes of an image's other columns.
_MARGIN, _OTHER_BYTES = 1.01, 64


@dataclass(frozen=True, eq=False)
class Extraction:
    """A checked extraction, made by ``prepare``.

    Attributes:
        settings: Its settings.
        encoder, preprocessing, source: The loaded encoder, its preprocessing, the opened data.
        shapes: Feature -> its shape for one image, (D,) or (N, D).
        classes: Names of the classes, where the source has them.
        images: Number of rows that are read, including those that do not decode; ``None`` for a stream.
        shards: All shards, finished or not.
        encoding: Settings that features of any image follow from: the same for all splits in a folder.
        selection: Which images are taken, and how they are divided.
    """

    settings: ExtractionSettings
    encoder: FrozenEncoder
    preprocessing: Preprocessing
    source: ImageSource
    shapes: dict[str, tuple[int, ...]]
    classes: list[str] | None
    images: int | None
    shards: list[Shard]
    encoding: dict[str, Any]
    selection: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Folder of the shards."""
        return Path(self.settings.output_dir) / "data"

    @property
    def columns(self) -> datasets.Features:
        """Columns of every shard."""
        labelled = self.source.label_column is not None
        return shard_features(self.shapes, self.settings.dtype, self.classes, labelled)

    @property
    def digest(self) -> str:
        """Digest of the settings that the content of the shards follows from, 16 hexadecimal digits."""
        plain = json.dumps([self.encoding, self.selection], sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's features as stored."""
        return _row_bytes(self.shapes, self.settings.dtype)

    def path(self, shard: Shard) -> Path:
        """Return the file of a shard."""
        name = f"{self.settings.split_name}-{shard.number:05d}-of-{len(self.shards):05d}"
        return self.folder / f"{name}{FORMATS[self.settings.file_format]}"

    def list_remaining(self) -> list[Shard]:
        """List the shards that are not finished yet.

        Raises:
            ExtractionError: A file is damaged, or of another extraction.
        """
        left = []
        for shard in self.shards:
            if not self.path(shard).exists():
                left.append(shard)
            elif read_record(self.path(shard)).get("extraction") != self.digest:
                raise ExtractionError(
                    f"{self.path(shard)} is of another extraction. Name a new --output_dir, or delete this one."
                )
        return left

    def check_disk(self, remaining: list[Shard], processes: int = 1) -> None:
        """Refuse an extraction that the disk cannot hold while so many processes write.

        Raises:
            ExtractionError: There is too little space.
        """
        # A file of tensors is there twice while it is put together.
        twice = remaining[:processes] if self.settings.file_format == "safetensors" else []
        needed = self.bytes_of([*remaining, *twice])
        free = shutil.disk_usage(_find_existing(self.folder)).free
        if needed is not None and needed > free:
            raise ExtractionError(
                f"{self.settings.output_dir}: {len(remaining)} shards take {readable_size(needed)}, and "
                f"{readable_size(free)} are free. Make room, name another --output_dir, or store less "
                "(--dtype float16, fewer --features)."
            )

    def bytes_of(self, shards: list[Shard]) -> int | None:
        """Estimate the bytes on disk of some shards; ``None`` for a stream."""
        if self.images is None:
            return None
        rows = sum((shard.stop or 0) - shard.start for shard in shards)
        return round(_MARGIN * (self.row_bytes + _OTHER_BYTES) * rows)

    def begin(self, pixels: Tensor) -> Callable[[], dict[str, Tensor]]:
        """Begin to make features of a batch; returns a function that waits for them, as they are stored.

        Raises:
            ExtractionError: Memory runs out. From the function: a feature does not fit into the stored type.
            NonFiniteFeaturesError: From the function: a feature is not finite.
        """
        settings, normalised = self.settings, self.preprocessing.normalised
        try:
            return begin(self.encoder, pixels, settings.features, normalised=normalised, dtype=settings.dtype)
        except torch.OutOfMemoryError as error:
            raise ExtractionError(
                f"{self.encoder.device} has no memory for batches of {len(pixels)}: lower --batch_size."
            ) from error

    def describe(self, remaining: list[Shard], processes: int, workers: int) -> str:
        """Write the plan for people.

        Args:
            remaining: Shards that are to be made.
            processes: Number of processes that compute.
            workers: Number of processes that decode, for each of them.
        """
        settings, size = self.settings, self.bytes_of(self.shards)
        free = shutil.disk_usage(_find_existing(self.folder)).free
        images = "a stream of images" if self.images is None else f"{self.images:,} images"
        labels = "no labels"
        if self.source.label_column:
            classes = f", {len(self.classes)} classes" if self.classes else ""
            labels = f"labels {self.source.label_column!r}{classes}"
        features = ", ".join(f"{name} {_dimensions(shape)}" for name, shape in self.shapes.items())
        of = "one per shard of the source" if self.images is None else f"of {self.selection['shard_size']:,} images"
        lines = {
            "encoder": f"{self.encoder.name} ({self.encoding['encoder_class']}, {self.encoding['encoder_digest']}), "
            f"{self.preprocessing.size} px, {self.encoder.precision} on {self.encoder.device}",
            "images": f"{images} of {self.source.name}, {labels}",
            "features": f"{features}; {settings.dtype}, {readable_size(self.row_bytes)} per image",
            "shards": f"{len(self.shards)}, {of}, {settings.file_format}"
            + (f", {readable_size(size)} in all" if size is not None else ""),
            "to do": f"{len(remaining)} shards for {processes} processes x {workers} workers"
            + (f", {readable_size(self.bytes_of(remaining) or 0)}" if size is not None else "")
            + f"; {readable_size(free)} are free in {settings.output_dir}",
        }
        if remaining and (idle := self._idle(processes, max(1, workers))):
            lines["warning"] = idle
        return "\n".join([*(f"{key:<10}{value}" for key, value in lines.items()), *list_remarks(self.source)])

    def _idle(self, processes: int, workers: int) -> str | None:
        """Say who will have nothing to do, and what helps; ``None`` where there are shards for all."""
        shards = len(self.shards)
        without = f", and {processes - shards} of {processes} processes have nothing to do" * (shards < processes)
        if self.images is not None:
            return f"{shards} shards{without}: lower --shard_size." if without else None
        if shards >= processes * workers:
            return None
        return (
            f"one worker reads a shard of the source from end to end: {shards} of {processes * workers} workers "
            f"decode{without}. Leave out --streaming (then images are shared out one by one), or write the source as "
            f"{processes * workers} shards or more."
        )


def prepare(settings: ExtractionSettings, device: str | None = None) -> Extraction:
    """Load the encoder and the data, and try both out on an image. Nothing is written.

    Args:
        settings: The settings.
        device: Device of this process's encoder.

    Raises:
        ValueError: Something does not exist, or settings contradict each other.
    """
    encoder = FrozenEncoder(
        settings.encoder,
        image_size=settings.image_size,
        precision=settings.precision,  # type: ignore[arg-type]  # checked by the settings
        batch_size=settings.batch_size,
        device=device,
        **settings.load_options,
    )
    encoder.check_features(settings.features, tokens=True)
    preprocessing = Preprocessing(settings.encoder, encoder, settings.image_size, **settings.load_options)
    source = load_images(settings.data, split=settings.split, **settings.source_options)
    source = match_classes(source, *classes_before(settings))
    shapes = _shapes(settings, encoder, preprocessing, source)
    shards, images, shard_size = _divide(settings, source, _row_bytes(shapes, settings.dtype))
    classes = list(source.classes) or None
    return Extraction(
        settings=settings,
        encoder=encoder,
        preprocessing=preprocessing,
        source=source,
        shapes=shapes,
        classes=classes,
        images=images,
        shards=shards,
        encoding={
            "encoder_class": type(encoder.module).__name__,
            "encoder_digest": encoder.digest(),
            "precision": encoder.precision,
            "preprocessing": preprocessing.settings,
            **source.decoding.difference(),
            "features": {name: list(shape) for name, shape in shapes.items()},
            "dtype": settings.dtype,
            "format": settings.file_format,
        },
        selection={
            "split": settings.split,
            "streaming": settings.streaming,
            "limit": settings.limit,
            "shard_size": shard_size,
            "images": images,
            "shards": len(shards),
            "data_digest": _digest(source, images, classes),
        },
    )


def _shapes(
    settings: ExtractionSettings, encoder: FrozenEncoder, preprocessing: Preprocessing, source: ImageSource
) -> dict[str, tuple[int, ...]]:
    """Find the shape of each feature, from the first image that decodes."""
    source.check(_TRIED)
    reasons = []
    for row in islice(iter(source.dataset), _TRIED):
        try:
            pixels = preprocessing(source.decode(source.content(row)))[None]
        except (OSError, ValueError) as error:
            reasons.append(str(error))
            continue
        made = encoder.features(pixels, settings.features) if preprocessing.normalised else None
        made = made or encoder.encode(pixels, settings.features)
        return {name: tuple(value.shape[1:]) for name, value in made.items()}
    raise ValueError(f"{source.name}: none of the first {len(reasons)} images can be prepared: {'; '.join(reasons)}")


def _divide(
    settings: ExtractionSettings, source: ImageSource, row_bytes: int
) -> tuple[list[Shard], int | None, int | None]:
    """Divide the images: shards, number of images, images per shard; the latter two are ``None`` for a stream."""
    if source.streaming:
        stream: Any = source.dataset
        return [Shard(number) for number in range(1 if settings.limit else stream.num_shards)], None, None
    images = min(len(source), settings.limit or len(source))
    size = settings.shard_size or max(1, min(SHARD_IMAGES, SHARD_BYTES // row_bytes))
    starts = range(0, images, size)
    return [Shard(n, start, min(start + size, images)) for n, start in enumerate(starts)], images, size


def _digest(source: ImageSource, images: int | None, classes: list[str] | None) -> str:
    """Compute 16 hexadecimal digits of a source's size, its names and some of its rows in full."""
    stream: Any = source.dataset
    sha = hashlib.sha256(json.dumps([images or stream.num_shards, source.label_column and "label", classes]).encode())
    if images is None:
        sha.update(json.dumps([Path(file).name for file in source.files]).encode())
        rows = stream_rows(source, 0, _SAMPLED // 8)
    else:
        chosen = np.unique(np.linspace(0, images - 1, _SAMPLED).round().astype(int)).tolist()
        rows = map(source.row, chosen)
        column = stream.features[source.image_column]
        if isinstance(column, datasets.Value) and column.dtype == "string":
            sha.update("\n".join(map(str, stream[source.image_column][:images])).encode())
    for row in rows:
        sha.update(json.dumps([read_name(source, row), source.label(row)]).encode())
        try:
            sha.update(source.content(row))
        except ImageDecodeError:
            continue
    return sha.hexdigest()[:16]


def _row_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    return int(sum(np.prod(shape) for shape in shapes.values())) * np.dtype(dtype).itemsize


def _find_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.absolute().parent
    return path


def _dimensions(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
