"""Images with masks, from folders or from data sets with a column of masks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ...data import Decoding, ImageDecodeError, ImageSource
from ...data.decoding import MAX_PIXELS, open_image
from ...data.errors import explain_decode_errors
from ...data.image_folders import encode_path, scan_folder, show_name
from ...data.splits import TEST_SPLITS, SourceSplits, pair_splits
from ...utils.suggestions import did_you_mean
from ..settings import FineTuningSettings
from .labelled_images import SourceSamples, load_sources

# Value, in a mask that was read, of pixels that count neither for the loss nor for metrics.
IGNORED = -100
MASK_COLUMNS = ("mask", "masks", "annotation", "annotations", "segmentation", "segmentation_mask", "label", "labels")
IMAGE_FOLDERS, MASK_FOLDERS = ("images", "image", "imgs"), ("masks", "mask", "annotations", "labels")
_SPLITS = {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}
CLASSES_FILE = "classes.json"
_FIRST = 8  # masks of each split that are looked at before training
# Pillow modes whose values are numbers of classes; of a palette, the entries' numbers are, not its colours.
_NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class Labels:
    """What the numbers in masks mean.

    Attributes:
        classes: Names, in the order of the numbers.
        ignore_index: Number of pixels that do not count.
        reduce_labels: 0 means "none of the classes", which then count from 1, as in ADE20K.
    """

    classes: tuple[str, ...]
    ignore_index: int
    reduce_labels: bool = False

    def read(self, data: Any, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Decode a mask: int32 (H, W), 0 to the number of classes - 1, and ``IGNORED``.

        Raises:
            ImageDecodeError: it does not decode, holds colours, or a number that is no class.
        """
        with explain_decode_errors():
            image = open_image(data, max_pixels)
            if image.mode not in _NUMBERS:
                raise ImageDecodeError(
                    f"The mask is {image.mode}; expected one channel, or a palette, whose values number classes."
                )
            numbers = np.asarray(image).astype(np.int32)
        ignored = numbers == self.ignore_index
        if self.reduce_labels:
            ignored |= numbers == 0
            numbers -= 1
        numbers[ignored] = IGNORED
        largest = int(numbers.max(initial=0))
        if largest >= len(self.classes):
            raise ImageDecodeError(
                f"The mask holds the class {largest}, but there are {len(self.classes)}, counted from 0, and "
                f"{self.ignore_index} is ignored."
            )
        return numbers


class MaskedSamples(SourceSamples):
    """Images (``image``, RGB) with masks of the same size (``mask``, as ``Labels.read`` makes them)."""

    def __init__(self, source: ImageSource, labels: Labels) -> None:
        super().__init__(source)
        self.masks = replace(source, image_column=source.more["mask"])
        self.labels = labels

    def read(self, index: int) -> dict[str, Any]:
        """Decode one image and its mask.

        Raises:
            ImageDecodeError: one of the two does not decode, or they differ in size.
        """
        row = self.source.row(index)
        image = super().read(index)["image"]
        mask = self.labels.read(self.masks.content(row), self.source.decoding.max_pixels)
        if image.size != mask.shape[::-1]:
            raise ImageDecodeError(
                f"The image has {image.width} x {image.height} pixels and its mask {mask.shape[1]} x {mask.shape[0]}."
            )
        return {"image": image, "mask": mask}

    def check(self) -> None:
        """Read the first samples.

        Raises:
            ValueError: none of them can be used; says why.
        """
        bad = []
        for index in range(min(_FIRST, len(self))):
            try:
                self.read(index)
                return
            except ImageDecodeError as error:
                bad.append(f"{self.item_name(index)} ({error})")
        raise ValueError(f"{self.name}: none of the first {len(bad)} masks can be used: {'; '.join(bad)}")


def load_masked_sources(
    settings: FineTuningSettings, columns: Sequence[str], *, what: str = "mask", folders: Sequence[str] = MASK_FOLDERS
) -> SourceSplits:
    """Open both splits of images with masks; ``source.more[what]`` is the column of the latter.

    ``settings.data`` is a folder with images and masks in folders of the same form, ``images/train/0.jpg`` and
    ``masks/train/0.png`` or ``train/images/0.jpg`` and ``train/masks/0.png``; or whatever ``load_images`` reads that
    has two columns of images, one of them called as in ``columns``.

    Args:
        settings: Names source, splits and columns.
        columns: How the column of masks may be called.
        what: What lies beside each image, in messages and in ``source.more``.
        folders: How the folder of masks may be called.

    Raises:
        ValueError: there is no such folder or column, a split does not exist, or an image has no mask.
    """
    root = Path(settings.data)
    pairs = _pairs(root, folders) if root.is_dir() else {}
    if not pairs:
        return load_sources(settings, {what: columns})
    given = settings.source_options
    decoding = Decoding(**{name: given[name] for name in ("value_range", "max_pixels") if name in given})
    wanted = _split_of(settings.train_split, pairs, root)
    train = _source(root, wanted, pairs, decoding, what)
    if settings.test_split is not None:
        name: str | None = _split_of(settings.test_split, pairs, root)
    else:
        name = next((split for split in TEST_SPLITS if split in pairs and split != wanted), None)
    test = None if name is None else (_source(root, name, pairs, decoding, what), settings.test_split or name)
    return pair_splits(train, test, settings.train_split, settings.train_images, settings.test_images)


def read_classes(data: str) -> tuple[tuple[str, ...] | None, int | None]:
    """Read ``classes.json`` in a folder: a list of names, or ``{"classes": [names], "ignore_index": number}``.

    Returns:
        Names and the number that is ignored; ``None`` for what the file does not say.

    Raises:
        ValueError: the file is there and is something else.
    """
    path = Path(data) / CLASSES_FILE
    if not path.is_file():
        return None, None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    content = {"classes": content} if isinstance(content, list) else content
    names = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path}: expected a list of names, or {{"classes": [names], "ignore_index": number}}.')
    return tuple(names), content.get("ignore_index")


def _pairs(root: Path, mask_folders: Sequence[str]) -> dict[str, tuple[Path, Path]]:
    """Find split -> (folder of images, folder of masks), relative to ``root``; empty where nothing looks like it."""
    found: dict[str, tuple[Path, Path]] = {}

    def add(split: str, images: Path, masks: Path) -> None:
        if (root / images).is_dir() and (root / masks).is_dir():
            found.setdefault(_SPLITS.get(split, split), (images, masks))

    inner = sorted(path.name for path in root.iterdir() if path.is_dir())
    for images, masks in product(IMAGE_FOLDERS, mask_folders):
        if images in inner and masks in inner:
            for path in sorted((root / images).iterdir()):
                add(path.name, Path(images, path.name), Path(masks, path.name))
            if not found:  # no splits
                add("train", Path(images), Path(masks))
        for split in inner:
            add(split, Path(split, images), Path(split, masks))
    return found


def _split_of(name: str, pairs: dict[str, tuple[Path, Path]], root: Path) -> str:
    wanted = _SPLITS.get(name, name)
    if wanted not in pairs:
        hint = did_you_mean(wanted, pairs)
        raise ValueError(f"{root}: there is no split {name!r}.{hint} Splits: {', '.join(sorted(pairs))}.")
    return wanted


def _source(root: Path, split: str, pairs: dict[str, tuple[Path, Path]], decoding: Decoding, what: str) -> ImageSource:
    """List the images of a split with their masks: the same path below both folders, but for the suffix."""
    scans = [scan_folder(root / folder, {}) for folder in pairs[split]]
    images, masks = ({os.path.splitext(file)[0]: file for file in scan.images} for scan in scans)
    if missing := sorted(images.keys() - masks.keys()):
        raise ValueError(
            f"{root}: {len(missing)} of {len(images)} images in {pairs[split][0]} have no {what} in "
            f"{pairs[split][1]}, e.g. {show_name(os.path.basename(images[missing[0]]))}. A {what} is called as its "
            "image, up to the suffix."
        )
    if not images:
        raise ValueError(f"{root}: {pairs[split][0]} holds no images." + "".join(f" {s}." for s in scans[0].left_out()))
    names = sorted(images)
    rows = {
        column: [encode_path(str(folder / files[name])) for name in names]
        for column, folder, files in zip(("image", what), pairs[split], (images, masks), strict=True)
    }
    return ImageSource(
        datasets.Dataset.from_dict(rows),
        f"{root} ({split})",
        "image",
        root=root,
        more={what: what},
        decoding=decoding,
        notes=tuple(
            f"{folder}: {line}" for folder, scan in zip(pairs[split], scans, strict=True) for line in scan.left_out()
        ),
    )
