"""Objects in images (boxes, masks, key points), from COCO's JSON beside images or from a column of objects."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from ...data import Decoding, ImageDecodeError, ImageSource
from ...data.decoding import read_size
from ...data.image_folders import encode_path, show_name
from ...data.splits import TEST_SPLITS, SourceSplits, pair_splits
from ...utils.suggestions import did_you_mean
from ..settings import FineTuningSettings
from .labelled_images import load_sources

# Names of a column of objects, as ``datasets`` and its image folders have them.
OBJECT_COLUMNS = ("objects", "annotations")
SPLIT_WORDS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Category:
    """What objects may be.

    Attributes:
        name: As people call it.
        keypoints: Names of its key points.
    """

    name: str
    keypoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnnotatedSplits:
    """Images with their objects.

    Attributes:
        sources: Both splits; ``source.more["objects"]`` is a column of texts, each a JSON list of objects: ``label``,
            ``bbox`` (x, y, width, height) in pixels, and what else there was of ``area``, ``crowd``, ``segmentation``
            and ``keypoints``; ``source.more["size"]``, where it is known, a column of (width, height).
        categories: What ``label`` counts.
    """

    sources: SourceSplits
    categories: tuple[Category, ...]


def load_annotations(
    settings: FineTuningSettings, prefix: str, classes: Sequence[str] | None = None, box_format: str = "xywh"
) -> AnnotatedSplits:
    """Open both splits of images with objects.

    ``settings.data`` is a folder with COCO's JSON: ``annotations/instances_train2017.json`` and ``train2017/``, or
    ``train/_annotations.coco.json`` beside its images, or one file beside them all; or whatever ``load_images`` reads
    that has a column called as in ``OBJECT_COLUMNS``, with ``bbox`` and ``category`` as the Hub has them.

    Args:
        settings: Names source and splits.
        prefix: Beginning of the names of files with such annotations, where there are others, too.
        classes: Names of a column's categories, where they are plain numbers.
        box_format: "xywh", or "xyxy" for columns of corners.

    Raises:
        ValueError: no annotations there, or some that cannot be: names the file and what is wrong.
    """
    root = Path(settings.data)
    files = _find_files(root, prefix) if root.is_dir() else {}
    if not files:
        return _from_column(settings, classes, box_format)
    given = settings.source_options
    decoding = Decoding(**{name: given[name] for name in ("value_range", "max_pixels") if name in given})
    wanted = split_of(settings.train_split, files, root)
    train = _CocoFile(files[wanted], root, wanted)
    if settings.test_split is not None:
        name: str | None = split_of(settings.test_split, files, root)
    else:
        name = next((split for split in map(standard_split, TEST_SPLITS) if split in files and split != wanted), None)
    categories = train.categories()
    test = None
    if name is not None:
        # Judged by the classes that are learned: in their order, whatever their numbers in the other file.
        judged = _CocoFile(files[name], root, name)
        test = judged.source(categories, decoding), settings.test_split or name
    sources = pair_splits(
        train.source(categories, decoding), test, settings.train_split, settings.train_images, settings.test_images
    )
    return AnnotatedSplits(sources, categories)


def _find_files(root: Path, prefix: str) -> dict[str, Path]:
    """Find split -> annotation file: those that begin with ``prefix`` if there are any, else all of COCO's form."""
    places = [root / "annotations", root, *(path for path in sorted(root.iterdir()) if path.is_dir())]
    files = [file for place in dict.fromkeys(places) if place.is_dir() for file in sorted(place.glob("*.json"))]
    files = [file for file in files if _looks_like_coco(file)]
    named = [file for file in files if file.name.startswith(prefix)]
    found: dict[str, Path] = {}
    for file in named or files:
        words = [file.stem.lower(), file.parent.name.lower() if file.parent != root else ""]
        split = next((SPLIT_WORDS[name] for word in words for name in SPLIT_WORDS if name in word), "train")
        if split in found:
            raise ValueError(
                f"{root}: both {found[split].relative_to(root)} and {file.relative_to(root)} hold annotations of the "
                f"split {split}. Leave one of them there."
            )
        found[split] = file
    return found


def _looks_like_coco(file: Path) -> bool:
    """Whether a file begins as one of COCO's; the rest is read, and judged, when it is used."""
    with file.open("rb") as opened:
        start = opened.read(2000)
    names = (b'"images"', b'"annotations"', b'"categories"', b'"info"', b'"licenses"')
    return start.lstrip().startswith(b"{") and any(name in start for name in names)


def standard_split(name: str) -> str:
    """Return the one name of a split that has several."""
    return SPLIT_WORDS.get(name, name)


def split_of(name: str, files: Mapping[str, Path], root: Path) -> str:
    """Return the split of ``files`` that a user names.

    Raises:
        ValueError: There is none.
    """
    if standard_split(name) not in files:
        hint = did_you_mean(standard_split(name), files)
        raise ValueError(f"{root}: there is no split {name!r}.{hint} Splits: {', '.join(sorted(files))}.")
    return standard_split(name)


class _CocoFile:
    """One annotation file, read and checked."""

    def __init__(self, path: Path, root: Path, split: str) -> None:
        self.path, self.root, self.split = path, root, split
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        for part in ("images", "annotations", "categories"):
            if not isinstance(content.get(part), list):
                raise ValueError(f"{path} has no list of {part}: it is no annotation file of COCO's form.")
        self.content = content
        self.images = {image["id"]: image for image in content["images"]}

    def categories(self) -> tuple[Category, ...]:
        """Return the categories in the order of their ids."""
        entries = sorted(self.content["categories"], key=lambda entry: entry["id"])
        found = tuple(Category(str(entry["name"]), tuple(entry.get("keypoints", ()))) for entry in entries)
        if not found:
            raise ValueError(f"{self.path} names no categories.")
        return found

    def source(self, categories: Sequence[Category], decoding: Decoding) -> ImageSource:
        """Make a source of the images, with their objects numbered by ``categories``."""
        labels = self._labels(categories)
        folder = self._folder()
        sizes = {number: self._size_of(image, folder) for number, image in self.images.items()}
        objects: dict[Any, list[dict[str, Any]]] = {number: [] for number in self.images}
        lost: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for entry in self.content["annotations"]:
            image = self._image_of(entry)
            label = labels.get(entry.get("category_id"))
            if label is None:
                raise ValueError(
                    f"{self.path}: annotation {entry.get('id')} of {image['file_name']} is of the category "
                    f"{entry.get('category_id')}, which the file does not name. Categories: "
                    f"{', '.join(map(str, sorted(labels)))}."
                )
            made, remark = read_object(entry, label, sizes[image["id"]], self._name_of(image))
            if remark:
                lost[remark] += 1
                examples.setdefault(remark, str(image["file_name"]))
            if made is not None:
                objects[image["id"]].append(made)
        ordered = [image for image in self.content["images"] if (folder / image["file_name"]).is_file()]
        missing = [image for image in self.content["images"] if not (folder / image["file_name"]).is_file()]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of {len(self.images)} images are not in {folder}, e.g. "
                f"{show_name(str(missing[0]['file_name']))}."
            )
        rows = {
            "image": [encode_path(str((folder / image["file_name"]).relative_to(self.root))) for image in ordered],
            "objects": [json.dumps(objects[image["id"]]) for image in ordered],
            "size": [sizes[image["id"]] for image in ordered],
        }
        return ImageSource(
            datasets.Dataset.from_dict(rows),
            f"{self.root} ({self.split})",
            "image",
            root=self.root,
            more={"objects": "objects", "size": "size"},
            decoding=decoding,
            notes=tuple(
                f"{self.path.name}: {count} {remark}, e.g. in {examples[remark]}" for remark, count in lost.items()
            ),
        )

    def _labels(self, categories: Sequence[Category]) -> dict[Any, int]:
        """Map ids of this file to numbers of the categories that are learned, by name."""
        numbers = {category.name: number for number, category in enumerate(categories)}
        labels = {}
        for entry in self.content["categories"]:
            if entry["name"] not in numbers:
                raise ValueError(
                    f"{self.path} has the category {entry['name']!r}, which the training split does not have."
                    f"{did_you_mean(entry['name'], numbers)}"
                )
            labels[entry["id"]] = numbers[entry["name"]]
        return labels

    def _image_of(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        if entry.get("image_id") not in self.images:
            raise ValueError(
                f"{self.path}: annotation {entry.get('id')} is of the image {entry.get('image_id')}, which the file "
                "does not list."
            )
        return self.images[entry["image_id"]]

    def _size_of(self, image: Mapping[str, Any], folder: Path) -> tuple[int | None, int | None]:
        """Return width and height as the annotations say them, otherwise the file; of one that is no image, nothing."""
        said = (image.get("width"), image.get("height"))
        if all(isinstance(length, int) and length > 0 for length in said):
            return said
        try:
            return read_size(folder / image["file_name"])
        except (ImageDecodeError, OSError):
            return (None, None)

    def _name_of(self, image: Mapping[str, Any]) -> str:
        return f"{self.path}, {image['file_name']}"

    def _folder(self) -> Path:
        """Find the folder of the images: beside the file, or called as the split or the end of the file's name."""
        first = str(self.content["images"][0]["file_name"]) if self.content["images"] else ""
        year = self.path.stem.rpartition("_")[2]
        names = [year, self.split, *(short for short, long in SPLIT_WORDS.items() if long == self.split)]
        places = [self.path.parent, self.root, self.root / "images"]
        places += [base / name for name in names for base in (self.root, self.root / "images")]
        found = next((place for place in places if first and (place / first).is_file()), None)
        if found is None:
            tried = ", ".join(str(place.relative_to(self.root)) for place in dict.fromkeys(places))
            raise ValueError(
                f"{self.path}: its first image, {first or '(none)'}, is in none of {tried} of {self.root}."
            )
        return found


def read_object(
    entry: Mapping[str, Any], label: int, size: tuple[int | None, int | None], where: str
) -> tuple[dict[str, Any] | None, str]:
    """Check one object and bring it into the form of ``AnnotatedSplits``.

    Boxes are cut to the image where its size is known.

    Args:
        entry: As in COCO.
        label: Number of its category.
        size: Width and height of its image.
        where: Opens messages.

    Returns:
        The object, ``None`` if nothing of it can be used; and, where something was done to it, what, as a plural.

    Raises:
        ValueError: the box is not four finite numbers.
    """
    box = entry.get("bbox")
    if not isinstance(box, Sequence) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise ValueError(f"{where}: annotation {entry.get('id')} has the box {box}; expected x, y, width, height.")
    x, y, width, height = map(float, box)
    right, lower = x + width, y + height
    cut = [max(x, 0.0), max(y, 0.0), min(right, size[0] or right), min(lower, size[1] or lower)]
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        return None, "boxes are empty or outside of their images and are left out"
    made: dict[str, Any] = {"label": label, "bbox": [cut[0], cut[1], cut[2] - cut[0], cut[3] - cut[1]]}
    made["area"] = float(entry.get("area") or made["bbox"][2] * made["bbox"][3])
    if entry.get("iscrowd"):
        made["crowd"] = True
    for name in ("segmentation", "keypoints"):
        if entry.get(name):
            made[name] = entry[name]
    # A pixel of tolerance: many tools round outwards.
    beyond = max(cut[0] - x, cut[1] - y, right - cut[2], lower - cut[3]) > 1
    return made, "boxes reach beyond their images and are cut" if beyond else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


# ---- columns ----


def _from_column(settings: FineTuningSettings, classes: Sequence[str] | None, box_format: str) -> AnnotatedSplits:
    """Read a column of objects: a struct of lists, or a list of structs."""
    sources = load_sources(settings, {"objects": OBJECT_COLUMNS})
    names = tuple(classes or _class_names(sources.train))
    made = []
    for source in (sources.train, sources.test):
        column = source.more["objects"]
        rows: Any = source.dataset
        texts, lost = [], 0
        for index, value in enumerate(rows.select_columns([column])[:][column]):
            where = source.item_name({**dict.fromkeys([source.image_column]), column: None}, index)
            objects, dropped = _read_column(value, names, box_format, where)
            texts.append(json.dumps(objects))
            lost += dropped
        notes = (*source.notes, f"{source.name}: {lost} boxes are empty and are left out") if lost else source.notes
        rows = rows.remove_columns([column]).add_column("objects", texts)
        made.append(replace(source, dataset=rows, more={"objects": "objects"}, notes=notes))
    return AnnotatedSplits(replace(sources, train=made[0], test=made[1]), tuple(map(Category, names)))


def _class_names(source: ImageSource) -> tuple[str, ...]:
    """Find names in the type of the column."""
    feature: Any = source.dataset.features[source.more["objects"]]
    found = [one.names for one in _walk(feature) if isinstance(one, datasets.ClassLabel)]
    if len(found) != 1:
        raise ValueError(
            f"{source.name}: the column {source.more['objects']!r} does not say what its categories are called. Name "
            "them in the order of their numbers: --set classes='[cat, dog]'."
        )
    return tuple(found[0])


def _walk(feature: Any) -> Iterator[Any]:
    yield feature
    inner = feature.values() if isinstance(feature, Mapping) else feature if isinstance(feature, (list, tuple)) else ()
    for one in (*inner, *([feature.feature] if hasattr(feature, "feature") else [])):
        yield from _walk(one)


def _read_column(value: Any, names: Sequence[str], box_format: str, where: str) -> tuple[list[dict[str, Any]], int]:
    """Read the objects of one row; count those that are left out."""
    if isinstance(value, Mapping):
        lengths = {name: len(entries) for name, entries in value.items() if isinstance(entries, Sequence)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{where}: the lists of its objects differ in length ({lengths}).")
        value = [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=True)]
    objects, lost = [], 0
    for entry in value or []:
        category = next((entry[name] for name in ("category", "category_id", "label") if name in entry), None)
        number = names.index(category) if category in names else category
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise ValueError(f"{where}: an object is of the category {category}; there are {', '.join(names)}.")
        if box_format == "xyxy" and isinstance(box := entry.get("bbox"), Sequence) and len(box) == 4:
            entry = {**entry, "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
        made, _ = read_object(entry, number, (None, None), where)
        objects += [made] if made else []
        lost += made is None
    return objects, lost
