"""Key points of MPII: its annotations, and PCKh at half a head."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ...data import Decoding, ImageSource
from ...data.image_folders import encode_path, show_name
from ...data.splits import TEST_SPLITS, SourceSplits, pair_splits
from ...evaluation.keypoints import pckh
from ...evaluation.metrics import Metric
from ..settings import FineTuningSettings
from .annotations import SPLIT_WORDS, split_of, standard_split
from .base import Splits
from .keypoints import PeopleTask
from .people import PeopleSamples, Person

NAMES = (
    *("right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax"),
    *("upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder"),
    *("left_shoulder", "left_elbow", "left_wrist"),
)
MIRRORED = [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]
# Pelvis and thorax do not count, as in HRNet's lib/dataset/mpii.py.
LEFT_OUT = (6, 7)
NECK, HEAD_TOP = 8, 9
# A head's size is 0.6 of the diagonal of its box (MPII's toolbox); a person of scale s is 200 s pixels high.
HEAD_SHARE, PIXELS = 0.6, 200.0
# MPII counts pixels from 1, as Matlab does; here points are places, and the middle of the first pixel is 0.5.
FIRST_PIXEL = 0.5
# HRNet moves the middle down by 15 s pixels, so that feet are not cut off.
DOWN = 15.0


class MpiiKeypointTask(PeopleTask):
    """Sixteen key points of people in MPII's form, judged by PCKh@0.5.

    ``--data`` is a folder with ``annotations.json``, or ``annot/`` or ``annotations/`` with ``train.json``,
    ``valid.json`` (or ``mpii_train.json``, ...): lists with ``image``, ``joints``, ``joints_vis``, ``center`` and
    ``scale``, as HRNet and MMPose have converted them; images lie beside or in ``images/``. The size of a head is 0.6
    of the diagonal of its box where the entry has one (``head_box``: x1, y1, x2, y2); otherwise, as that list lacks the
    boxes, the distance from neck to top of the head, which is longer or shorter than MPII's own, person by person.

    Args:
        simple: As in ``PeopleTask``.
        rotation, scaling: As in ``PeopleTask``; HRNet's for MPII.
        layers: As in ``PeopleTask``.
    """

    name = "mpii_keypoints"
    noun = "key points of MPII"
    result = "Key point model"
    metrics = (Metric("pckh", "%", digits=2),)

    def __init__(
        self,
        *,
        simple: bool = False,
        rotation: float = 30.0,
        scaling: float = 0.25,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(simple=simple, rotation=rotation, scaling=scaling, layers=layers)

    def mirror_pairs(self) -> list[int]:
        """Return left for right."""
        return MIRRORED

    def num_points(self) -> int:
        """Return 16."""
        return len(NAMES)

    def load(self, settings: FineTuningSettings) -> Splits:
        """Open images and annotations.

        Raises:
            ValueError: no such file or split, an image that is not there, or an entry of another form: names file and
                image.
        """
        root = Path(settings.data)
        files = _find_files(root) if root.is_dir() else {}
        if not files:
            raise ValueError(
                f"{settings.data}: there is no list of MPII's form, such as annotations.json, annot/train.json or "
                "annotations/mpii_train.json."
            )
        given = settings.source_options
        decoding = Decoding(**{name: given[name] for name in ("value_range", "max_pixels") if name in given})
        wanted = split_of(settings.train_split, files, root)
        if settings.test_split is not None:
            name: str | None = split_of(settings.test_split, files, root)
        else:
            name = next(
                (split for split in map(standard_split, TEST_SPLITS) if split in files and split != wanted), None
            )
        train = _open(files[wanted], root, wanted, decoding)
        test = None if name is None else (_open(files[name], root, name, decoding), settings.test_split or name)
        paired = pair_splits(train, test, settings.train_split, settings.train_images, settings.test_images)
        sources = paired.limit(settings.train_images, settings.test_images)
        return _splits(sources)

    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Compute PCKh@0.5."""
        points, facts = np.asarray(targets["points"]), np.asarray(targets["facts"])
        said = np.asarray(predictions)[..., :2]
        return {"pckh": pckh(said, points[..., :2], points[..., 2], facts[:, 2], left_out=LEFT_OUT)}


def _splits(sources: SourceSplits) -> Splits:
    train, test = (_people(source) for source in (sources.train, sources.test))
    if not any(person.head > 0 for person in test.people):
        raise ValueError(
            f"{test.name}: of nobody the size of the head is known (head_box, or neck and top of the head)."
        )
    return Splits(train, test, sources.train_split, sources.test_split, NAMES, sources.remarks())


def _find_files(root: Path) -> dict[str, Path]:
    """Find split -> list of people."""
    found: dict[str, Path] = {}
    for place in (root, root / "annot", root / "annotations"):
        for file in sorted(place.glob("*.json")) if place.is_dir() else ():
            with file.open("rb") as opened:
                is_list = opened.read(200).lstrip().startswith(b"[")
            split = next((SPLIT_WORDS[name] for name in SPLIT_WORDS if name in file.stem.lower()), "train")
            if is_list and "trainval" not in file.stem.lower():
                found.setdefault(split, file)
    return found


def _open(path: Path, root: Path, split: str, decoding: Decoding) -> ImageSource:
    """Read and check a list; a row is an image with all its people."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    people: dict[str, list[dict[str, Any]]] = {}
    for number, entry in enumerate(entries):
        people.setdefault(str(entry.get("image", "")), []).append(_check(entry, f"{path}, entry {number}"))
    places = [path.parent, root, root / "images"]
    first = next(iter(people), "")
    folder = next((place for place in places if first and (place / first).is_file()), None)
    missing = [image for image in people if folder is None or not (folder / image).is_file()]
    if folder is None or missing:
        tried = folder or ", ".join(map(str, dict.fromkeys(places)))
        raise ValueError(
            f"{path}: {len(missing)} images are not in {tried}, e.g. {show_name(missing[0]) if missing else ''}."
        )
    rows = {
        "image": [encode_path(str((folder / image).relative_to(root))) for image in people],
        "people": [json.dumps(several) for several in people.values()],
    }
    return ImageSource(
        datasets.Dataset.from_dict(rows),
        f"{root} ({split})",
        "image",
        root=root,
        more={"people": "people"},
        decoding=decoding,
    )


def _check(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what is used of an entry, checked."""
    try:
        joints = np.asarray(entry["joints"], dtype=np.float64).reshape(len(NAMES), 2)
        visible = np.asarray(entry["joints_vis"], dtype=np.float64).reshape(len(NAMES))
        middle, scale = np.asarray(entry["center"], dtype=np.float64).reshape(2), float(entry["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} ({entry.get('image')}): expected joints (16 x 2), joints_vis (16), center and scale ({error})."
        ) from error
    if not scale > 0 or not np.isfinite(joints).all():
        raise ValueError(f"{where} ({entry.get('image')}): its scale is {scale}, or joints are not finite.")
    return {
        "points": np.column_stack([joints - FIRST_PIXEL, visible]).tolist(),
        "middle": [middle[0] - FIRST_PIXEL, middle[1] - FIRST_PIXEL + DOWN * scale],
        "extent": PIXELS * scale,
        "head": _head_size(entry, joints, visible),
    }


def _head_size(entry: Mapping[str, Any], joints: np.ndarray, visible: np.ndarray) -> float:
    if (box := entry.get("head_box")) is not None:
        return HEAD_SHARE * math.dist(box[:2], box[2:])
    known = visible[NECK] > 0 and visible[HEAD_TOP] > 0
    return math.dist(joints[NECK], joints[HEAD_TOP]) if known else 0.0


def _people(source: ImageSource) -> PeopleSamples:
    rows: Any = source.dataset
    people = [
        Person(row, np.asarray(one["points"]), tuple(one["middle"]), (one["extent"],) * 2, head=one["head"])
        for row, text in enumerate(rows["people"][:])
        for one in json.loads(text)
    ]
    return PeopleSamples(source, people)
