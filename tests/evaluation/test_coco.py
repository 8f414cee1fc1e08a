"""COCO's average precision: known answers, and the numbers of pycocotools on its own files."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_equissl.evaluation.coco import average_precision

pycocotools = pytest.importorskip("pycocotools")

BOXES = [[10.0, 20.0, 40.0, 50.0], [60.0, 60.0, 20.0, 30.0]]


def objects(boxes: list[list[float]], **more: Any) -> list[dict[str, Any]]:
    area = {} if "score" in more else {"area": 2000.0}
    return [{"category_id": number % 2, "bbox": box, **area, **more} for number, box in enumerate(boxes)]


def test_known_answers() -> None:
    truth = [objects(BOXES), []]
    perfect = average_precision(truth, [objects(BOXES, score=0.9), []], "bbox")
    assert perfect == pytest.approx({"ap": 1, "ap50": 1, "ap75": 1, "ap_medium": 1})
    # Moved by 0.24 of their width: 0.76 / 1.24 = 0.61 is over the first three of ten thresholds.
    moved = [[x + 0.24 * width, y, width, height] for x, y, width, height in BOXES]
    found = average_precision(truth, [objects(moved, score=0.9), []], "bbox")
    assert [found[name] for name in ("ap", "ap50", "ap75")] == pytest.approx([0.3, 1, 0])
    assert average_precision(truth, [[], []], "bbox")["ap"] == 0
    wrong = [{**one, "category_id": 1 - one["category_id"]} for one in objects(BOXES, score=0.9)]
    assert average_precision(truth, [wrong, []], "bbox")["ap"] == 0
    assert average_precision(truth, [[], objects(BOXES, score=0.9)], "bbox")["ap"] == 0  # in the other image
    with pytest.raises(ValueError, match="There is no object in any image"):
        average_precision([objects(BOXES, iscrowd=1)], [[]], "bbox")


def test_nothing_is_wrong_in_a_crowd() -> None:
    crowd = {"category_id": 0, "bbox": [100.0, 0, 100, 100], "area": 1e4, "iscrowd": 1}
    inside = [{"category_id": 0, "bbox": [120.0, 10, 20, 20], "score": 0.99}]
    found = objects(BOXES, score=0.9) + inside
    assert average_precision([[*objects(BOXES), crowd]], [found], "bbox")["ap"] == pytest.approx(1)
    assert average_precision([objects(BOXES)], [found], "bbox")["ap"] < 0.8


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_numbers_are_those_of_pycocotools_on_files(shared_data: Path, tmp_path: Path, kind: Any) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    people = kind == "keypoints"
    file = "coco-keypoints-mini/person_keypoints.json" if people else "coco-mini/annotations/instances_val2017.json"
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(shared_data / file))
        results = []
        for one in reference.dataset["annotations"]:
            found = {"image_id": one["image_id"], "category_id": one["category_id"], "score": float(rng.random())}
            if kind == "bbox":
                found["bbox"] = (np.array(one["bbox"]) * rng.uniform(0.85, 1.15, 4)).tolist()
            elif kind == "segm":
                other = rng.choice(reference.dataset["annotations"]) if rng.random() < 0.2 else one
                image = reference.imgs[one["image_id"]]
                code = reference.annToRLE({**other, "image_id": image["id"]})
                found["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
            else:
                points = np.array(one["keypoints"], float).reshape(-1, 3)
                points[:, :2] += rng.normal(0, 4, points[:, :2].shape)
                found["keypoints"] = points.ravel().tolist()
            results.append(found)
        (tmp_path / "results.json").write_text(json.dumps(results))
        judge = COCOeval(reference, reference.loadRes(str(tmp_path / "results.json")), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    images = sorted(reference.imgs)
    truth: list[list[dict[str, Any]]] = [reference.imgToAnns[image] for image in images]
    if kind == "segm":
        truth = [[{**one, "segmentation": reference.annToRLE(one)} for one in several] for several in truth]
    found = [[one for one in results if one["image_id"] == image] for image in images]
    ours = average_precision(truth, found, kind)
    names = ["ap", "ap50", "ap75", "ap_medium", "ap_large"] if people else list(ours)
    expected = dict(zip(names, judge.stats, strict=False))
    assert 0.1 < ours["ap"] < 0.95
    assert ours == pytest.approx({name: value for name, value in expected.items() if value >= 0}, abs=1e-12)
