"""Average precision of boxes, masks and key points by pycocotools, COCO's own evaluation, from plain arrays."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import numpy as np

__all__ = ["PycocotoolsMissingError", "average_precision", "check_pycocotools"]

Kind: TypeAlias = Literal["bbox", "segm", "keypoints"]
# What COCOeval.summarize puts first, and, for boxes and masks, what it says of sizes.
_NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_NAMES_OF_KEYPOINTS = ("ap", "ap50", "ap75", "ap_medium", "ap_large")


class PycocotoolsMissingError(ImportError):
    """COCO's metrics or masks were asked for, and pycocotools is not installed."""


def check_pycocotools() -> None:
    """Raise ``PycocotoolsMissingError`` with a remedy where pycocotools is not installed."""
    if find_spec("pycocotools") is None:
        raise PycocotoolsMissingError(
            "Boxes, masks and key points in COCO's form need pycocotools: pip install 'hf-equissl[coco]'."
        )


def average_precision(
    truth: Sequence[Sequence[Mapping[str, Any]]],
    found: Sequence[Sequence[Mapping[str, Any]]],
    kind: Kind,
    sigmas: Sequence[float] | None = None,
) -> dict[str, float]:
    """Compute COCO's average precision.

    Args:
        truth: Of each image its objects: ``category_id``; ``bbox`` (x, y, width, height) in pixels; ``area`` in pixels;
            for masks ``segmentation``, a run-length code; for key points ``keypoints``, (x, y, visibility) of each in
            one list, and ``num_keypoints``; ``iscrowd`` 1 for regions in which nothing is wrong.
        found: Of each image what was found, the same with a ``score`` and without ``area``.
        kind: "bbox", "segm" or "keypoints" (by object key point similarity).
        sigmas: Standard deviation of each key point relative to the object's size; ``None``: COCO's 17.

    Returns:
        ``ap`` (mean over the thresholds 0.50 to 0.95), ``ap50``, ``ap75``, and ``ap_small`` (of boxes and masks below
        32 x 32 pixels), ``ap_medium`` and ``ap_large`` (from 96 x 96) as far as there are such objects; 0 to 1.

    Raises:
        ValueError: nothing is to be found in any image.
        PycocotoolsMissingError: without pycocotools.
    """
    check_pycocotools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [{"iscrowd": 0, **one, "image_id": image} for image, several in enumerate(truth) for one in several]
    if not any(not one["iscrowd"] for one in objects):
        raise ValueError("There is no object in any image: average precision is undefined.")
    categories = {int(one["category_id"]) for several in (*truth, *found) for one in several}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        reference = COCO()
        reference.dataset = {
            "images": [{"id": image, **_size_of(several)} for image, several in enumerate(truth)],
            "categories": [{"id": number} for number in sorted(categories)],
            "annotations": [{**one, "id": number} for number, one in enumerate(objects, start=1)],
        }
        reference.createIndex()
        results = COCO()
        results.dataset = {
            **reference.dataset,
            "annotations": [
                {**_measured(one, kind), "image_id": image, "id": number}
                for number, (image, one) in enumerate(
                    ((image, one) for image, several in enumerate(found) for one in several), start=1
                )
            ],
        }
        results.createIndex()
        judge = COCOeval(reference, results, kind)
        if sigmas is not None:
            judge.params.kpt_oks_sigmas = np.asarray(sigmas, dtype=float)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    names = _NAMES_OF_KEYPOINTS if kind == "keypoints" else _NAMES
    return {name: float(value) for name, value in zip(names, judge.stats, strict=False) if value >= 0}


def _size_of(objects: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the size of an image as the codes of its masks have it; nothing is asked for where there are none."""
    height, width = next(
        (one["segmentation"]["size"] for one in objects if "counts" in one.get("segmentation", ())), (0, 0)
    )
    return {"height": height, "width": width}


def _measured(one: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Give what was found the area by which it belongs to a class of sizes, as ``COCO.loadRes`` does."""
    from pycocotools import mask

    result = {"iscrowd": 0, **one}
    if kind == "segm":
        return {**result, "area": float(mask.area(one["segmentation"])), "bbox": mask.toBbox(one["segmentation"])}
    if kind == "keypoints":
        points = np.asarray(one["keypoints"], dtype=float).reshape(-1, 3)
        low, high = points[:, :2].min(0), points[:, :2].max(0)
        return {**result, "area": float(np.prod(high - low)), "bbox": [*low, *(high - low)]}
    return {**result, "area": float(one["bbox"][2] * one["bbox"][3])}
