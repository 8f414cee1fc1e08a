"""What tasks over objects share: samples, crops of images with boxes and masks, average precision."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data import ImageDecodeError, ImageSource
from ...evaluation.coco import average_precision, check_pycocotools
from ...views.cropping import Box, random_box
from ..settings import FineTuningSettings
from .annotations import load_annotations
from .base import Splits
from .dense import DenseTask
from .instance_masks import PADDING, check_code, encode_objects, read_masks
from .labelled_images import SourceSamples

CROP_SCALE, CROP_RATIO = (0.3, 1.0), (3 / 4, 4 / 3)
# What a crop leaves of an object must have this many pixels in both directions.
MIN_SIDE = 2


class ObjectSamples(SourceSamples):
    """Images (``image``, RGB) with ``objects`` in the form of ``AnnotatedSplits``."""

    def read(self, index: int) -> dict[str, Any]:
        """Decode one image and its objects, whose boxes are cut to it.

        Raises:
            ImageDecodeError: the image does not decode, or has another size than its annotations say.
        """
        row = self.source.row(index)
        image = self.source.decode(self.source.content(row))
        said = row.get("size")
        if said is not None and None not in said and tuple(said) != image.size:
            raise ImageDecodeError(
                f"The image has {image.width} x {image.height} pixels, and its annotations are for {said[0]} x "
                f"{said[1]}."
            )
        objects = [cut for one in json.loads(row["objects"]) if (cut := _cut(one, *image.size)) is not None]
        return {"image": image, "objects": objects}


def _cut(one: dict[str, Any], width: int, height: int) -> dict[str, Any] | None:
    """Cut a box to its image; nothing where they share nothing."""
    x, y, w, h = one["bbox"]
    left, top, right, lower = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if right <= left or lower <= top:
        return None
    return {**one, "bbox": [left, top, right - left, lower - top]}


class ObjectTask(DenseTask):
    """A task whose labels are objects with boxes; ``masks`` says whether they need masks, too.

    Training images are cropped at random, resized to the encoder's square and mirrored, and boxes and masks with them,
    to fractions of a pixel: kornia 0.9, for one, mirrors boxes a pixel to the left. Crowd regions are not trained on.
    Test images are resized to the square as a whole, and judged in pixels of the stored image, where nothing that is
    found in a crowd region is wrong.

    Args:
        classes: Names of the categories of a column of objects, in the order of their numbers.
        box_format: "xywh", or "xyxy" for columns of corners.
        layers: As in ``DenseTask``.
    """

    masks: ClassVar[bool] = False
    annotation_files: ClassVar[str] = "instances"

    def __init__(
        self,
        *,
        classes: tuple[str, ...] | None = None,
        box_format: str = "xywh",
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        if box_format not in ("xywh", "xyxy"):
            raise ValueError(f"box_format (--set) is {box_format}: expected xywh or xyxy.")
        self.classes, self.box_format = classes, box_format

    def protocol(self) -> dict[str, Any]:
        """Say what the head is and how images were cropped."""
        return {
            **self.options(),
            "crop_scale": list(self.settings.crop_scale or CROP_SCALE),
            "flip_probability": 0.5 if self.settings.flip else 0.0,
        }

    # ---- data ----

    def load(self, settings: FineTuningSettings) -> Splits:
        """Open images and annotations; see ``load_annotations``.

        Raises:
            ValueError: as there; a split has no objects, or objects have no masks where they need them.
            PycocotoolsMissingError: without pycocotools.
        """
        check_pycocotools()
        found = load_annotations(settings, self.annotation_files, self.classes, self.box_format)
        sources = found.sources.limit(settings.train_images, settings.test_images)
        for source in (sources.train, sources.test):
            self.check_objects(source)
        return Splits(
            ObjectSamples(sources.train),
            ObjectSamples(sources.test),
            sources.train_split,
            sources.test_split,
            tuple(category.name for category in found.categories),
            sources.remarks(),
        )

    def check_objects(self, source: ImageSource) -> None:
        """Refuse a split that cannot be trained on or judged by.

        Raises:
            ValueError: it has no objects, or objects have no masks where they need them, or some that cannot be read.
        """
        rows: Any = source.dataset
        texts: list[str] = rows["objects"][:]
        total = sum(text.count('"label"') - text.count('"crowd"') for text in texts)
        if not total:
            raise ValueError(f"{source.name} has no objects in any of its {len(texts)} images.")
        if self.masks:
            sizes = rows["size"][:] if "size" in source.more else [None] * len(texts)
            for index, (text, size) in enumerate(zip(texts, sizes, strict=True)):
                if trouble := self._find_trouble(json.loads(text), None if size is None or None in size else size):
                    raise ValueError(f"{source.item_name(source.row(index), index)}: {trouble}")

    def _find_trouble(self, objects: Sequence[dict[str, Any]], size: tuple[int, int] | None) -> str:
        """Say what is wrong with the masks of an image's objects; nothing where they can be read."""
        for one in objects:
            if "segmentation" not in one:
                return (
                    f"it has objects without a mask (segmentation), which {self.noun} needs. With boxes alone, use "
                    "--task detection."
                )
            try:
                check_code(one["segmentation"], size)
            except ImageDecodeError as error:
                x, y, width, height = one["bbox"]
                return (
                    f"{error} It is that of the object at x {x:g}, y {y:g}, {width:g} x {height:g} pixels. Mend it, or "
                    "take the object out of the annotations."
                )
        return ""

    def blank(self) -> dict[str, Any]:
        """Return a black image without objects."""
        return {"image": Image.new("RGB", (self.inputs.image_size,) * 2), "objects": []}

    def transform(self, sample: dict[str, Any], rng: Any) -> dict[str, Any]:
        """Cut the same box out of image, boxes and masks, resize and mirror them.

        Draws are those of ``random_box``, then one for the mirror.

        Returns:
            ``pixels`` uint8 (3, S, S); ``labels`` int64 (n,), ``boxes`` float32 (n, 4), middle, width and height as
            shares of the square, and ``masks`` uint8 (n, S, S), of the objects that are trained on; ``size`` (width,
            height) of the stored image, and without ``rng`` ``truth`` float32 (m, 7): label, x, y, width, height,
            crowd, area of all objects in it (and ``codes``).
        """
        image, objects, size = sample["image"], sample["objects"], self.inputs.image_size
        box: Box = (0, 0, *image.size)
        mirrored = False
        if rng is not None:
            width, height = image.size
            box = random_box(width, height, self.settings.crop_scale or CROP_SCALE, CROP_RATIO, rng)
            mirrored = bool(rng.random() < 0.5) and self.settings.flip
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
        learned = [one for one in objects if not one.get("crowd")]
        boxes = move_boxes([one["bbox"] for one in learned], box, size, mirrored)
        kept = (boxes[:, 2:] - boxes[:, :2]).min(1) >= MIN_SIDE
        corners = torch.from_numpy(boxes[kept].astype(np.float32)) / size
        learned = [one for one, keep in zip(learned, kept, strict=True) if keep]
        made: dict[str, Any] = {
            "pixels": torch.from_numpy((pixels[:, ::-1] if mirrored else pixels).transpose(2, 0, 1).copy()),
            "labels": torch.tensor([one["label"] for one in learned], dtype=torch.int64),
            "boxes": torch.cat([corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], 1) / 2,
            "size": torch.tensor(image.size),
        }
        if self.masks:
            masks = [
                np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST, box=box))
                for mask in read_masks(learned, image.size)
            ]
            stacked = np.stack(masks) if masks else np.zeros((0, size, size), np.uint8)
            made["masks"] = torch.from_numpy((stacked[..., ::-1] if mirrored else stacked).copy())
        if rng is None:
            rows = [[o["label"], *o["bbox"], float(bool(o.get("crowd"))), o["area"]] for o in objects]
            made["truth"] = torch.tensor(rows, dtype=torch.float32).reshape(-1, 7)
            if self.masks:
                made["codes"] = encode_objects(objects, image.size)
        return made

    # ---- metrics ----

    def judge_truth(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what was to be found, padded: ``objects`` float32 (B, M, 7)."""
        return {"objects": pad_sequence(batch["truth"], batch_first=True, padding_value=PADDING)}


def move_boxes(boxes: Sequence[Sequence[float]], box: Box, size: int, mirrored: bool) -> np.ndarray:
    """Move boxes as their image is when ``box`` is cut out of it, resized to a square and mirrored.

    Args:
        boxes: x, y, width, height in pixels of the image.
        box: What is cut out: left, top, right, lower.
        size: Side of the square in pixels.
        mirrored: Whether left and right change places.

    Returns:
        Float64 (n, 4): left, top, right, lower in the square, cut to it.
    """
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).copy()
    corners[:, 2:] += corners[:, :2]
    low, sides = np.array(box[:2]), np.array(box[2:]) - np.array(box[:2])
    corners = ((corners.reshape(-1, 2, 2) - low) / sides * size).clip(0, size).reshape(-1, 4)
    if mirrored:
        corners[:, [0, 2]] = size - corners[:, [2, 0]]
    return corners


def truth_of(objects: np.ndarray) -> list[dict[str, Any]]:
    """Turn rows of ``truth`` into what ``average_precision`` takes."""
    return [
        {"category_id": int(row[0]), "bbox": row[1:5].tolist(), "iscrowd": int(row[5]), "area": float(row[6])}
        for row in objects
        if row[0] != PADDING
    ]


def measure_boxes(predictions: dict[str, Any], targets: dict[str, Any]) -> dict[str, float]:
    """Compute the average precision of boxes.

    Args:
        predictions: ``boxes`` (N, Q, 4), x, y, width, height in pixels; ``scores`` and ``labels`` (N, Q).
        targets: ``objects`` (N, M, 7), as ``judge_truth`` returns them.
    """
    truth = [truth_of(rows) for rows in targets["objects"]]
    found = [
        [
            {"category_id": int(label), "bbox": box.tolist(), "score": float(score)}
            for box, score, label in zip(*several, strict=True)
            if score >= 0
        ]
        for several in zip(predictions["boxes"], predictions["scores"], predictions["labels"], strict=True)
    ]
    return average_precision(truth, found, "bbox")
