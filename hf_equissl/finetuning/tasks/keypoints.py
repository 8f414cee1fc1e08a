"""Key points of people by heat maps: what COCO's and MPII's tasks share, and COCO's."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig, VitPoseConfig
from transformers.models.vitpose.image_processing_pil_vitpose import post_dark_unbiased_data_processing
from transformers.models.vitpose.modeling_vitpose import VitPoseClassicDecoder, VitPoseSimpleDecoder

from ...data import ImageSource
from ...evaluation.coco import average_precision, check_pycocotools
from ...evaluation.metrics import Metric
from ..settings import FineTuningSettings
from .annotations import Category, load_annotations
from .base import EncoderInput, Splits, Step
from .dense import DenseTask
from .people import PeopleSamples, Person, affine, cut_out, invert, move_points

# The heat maps are four times as fine as the encoder's patches.
FINER = 4
# Standard deviation of a point's bump, in cells of its heat map, as in HRNet and ViTPose.
SIGMA = 2.0
# Share of the training samples that are turned, and the height from which a heat map's top counts for a person's score:
# HRNet's (https://github.com/leoxiaobin/deep-high-resolution-net.pytorch, lib/dataset/JointsDataset.py, coco.py).
TURNED, COUNTED = 0.6, 0.2
COCO_POINTS = 17
# From the number of a pixel, counted from 0, to the place of its middle.
HALF = 0.5


class KeypointModel(nn.Module):
    """ViTPose's head (https://arxiv.org/abs/2204.12484) of transformers on a backbone, at any size of images.

    Args:
        config: The backbone's.
        num_points: K.
        simple: Bilinear upsampling and one convolution, instead of two transposed convolutions and a linear map.
    """

    def __init__(self, config: PreTrainedConfig, num_points: int, simple: bool) -> None:
        super().__init__()
        self.backbone: Any = AutoBackbone.from_config(config)
        sizes: dict[str, Any] = {"num_labels": num_points, "scale_factor": FINER}
        head = VitPoseConfig(backbone_config=config, **sizes)
        self.head = VitPoseSimpleDecoder(head) if simple else VitPoseClassicDecoder(head)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute heat maps (B, K, 4 rows, 4 columns) of images (B, 3, H, W)."""
        return self.head(self.backbone(pixel_values).feature_maps[-1])


class PeopleTask(DenseTask):
    """Key points of people whose boxes are known; left to write are the data and the metric.

    A person is cut out of the image, its box widened by a quarter and brought to the shape of the input, whose height
    is the encoder's image size. In training it is shown larger or smaller, turned, and mirrored, image and points by
    one exact map: kornia 0.9, for one, mirrors points a pixel to the left. The loss is the squared error of heat maps
    with a Gaussian bump at each point (transformers has none for its head); points are read off by DARK
    (https://arxiv.org/abs/1910.06278).

    Args:
        simple: ViTPose's simple head instead of the classic one.
        rotation: Standard deviation of the turn in degrees; at most twice that.
        scaling: Standard deviation, and the most, by which a person is shown larger or smaller.
        layers: The block that the head reads; ``None``: the last one.

    Attributes:
        aspect: Width of the input over its height.
        mirrors: Whether it is known which points change places in a mirror.
    """

    num_layers = 1
    head = "ViTPose's head"
    stacked = ("pixels", "points", "weights", "truth", "facts", "inverse")
    unread = (*DenseTask.unread, "crop_scale")
    aspect: ClassVar[float] = 1.0
    mirrors: bool = True
    patch_size: int
    size: tuple[int, int]

    def __init__(
        self, *, simple: bool = False, rotation: float, scaling: float, layers: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(layers=layers)
        if rotation < 0 or not 0 <= scaling < 1:
            raise ValueError(
                f"rotation and scaling (--set) are {rotation} and {scaling}: expected 0 or more, and 0 to below 1."
            )
        self.simple, self.rotation, self.scaling = simple, rotation, scaling

    def options(self) -> dict[str, Any]:
        """Return what decides the head and the training samples."""
        own = {"simple": self.simple, "rotation": self.rotation, "scaling": self.scaling}
        return {**super().options(), **own}

    def protocol(self) -> dict[str, Any]:
        """Say how people were cut out."""
        width, height = self.size
        return {**self.options(), "input": f"{height} x {width}", "flip_probability": 0.5 * self._flips}

    @property
    def _flips(self) -> bool:
        return self.settings.flip and self.mirrors

    def bind(self, settings: FineTuningSettings, inputs: EncoderInput) -> None:
        """Remember what samples shall be made for: as wide as whole patches come next to ``aspect``."""
        super().bind(settings, inputs)
        patches = max(1, round(inputs.image_size * self.aspect / self.patch_size))
        self.size = (patches * self.patch_size, inputs.image_size)

    # ---- data ----

    @abstractmethod
    def mirror_pairs(self) -> list[int]:
        """Return for each key point the one that it is in a mirror."""

    @abstractmethod
    def num_points(self) -> int:
        """Return the number of key points."""

    def blank(self) -> dict[str, Any]:
        """Return a black image with somebody of whom no point is labelled."""
        side = self.inputs.image_size
        person = Person(0, np.zeros((self.num_points(), 3)), (side / 2, side / 2), (side, side))
        return {"image": Image.new("RGB", (side, side)), "person": person}

    def transform(self, sample: dict[str, Any], rng: Any) -> dict[str, Any]:
        """Cut a person out.

        Draws: how large, whether turned, by how much, whether mirrored.

        Returns:
            ``pixels`` uint8 (3, H, W); ``points`` float32 (K, 2), in its pixels; ``weights`` float32 (K,), 1 of points
            that are labelled and in the cut-out, else 0; ``inverse`` float32 (2, 3), the way back; ``truth`` float32
            (K, 3), as in the image; ``facts`` float32 (7,): row, area, head, box.
        """
        person: Person = sample["person"]
        scale, degrees, mirrored = 1.0, 0.0, False
        if rng is not None:
            scale = 1 + self.scaling * float(np.clip(rng.normal(), -1, 1))
            turned = rng.random() < TURNED
            degrees = self.rotation * float(np.clip(rng.normal(), -2, 2)) * turned
            mirrored = bool(rng.random() < 0.5) and self._flips
        matrix = affine(person, self.size, scale, degrees, mirrored)
        pixels = cut_out(sample["image"], matrix, self.size)
        order = self.mirror_pairs() if mirrored else list(range(len(person.points)))
        points = move_points(person.points[order, :2], matrix)
        inside = ((points >= 0) & (points < self.size)).all(1)
        return {
            "pixels": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
            "points": torch.from_numpy(points.astype(np.float32)),
            "weights": torch.from_numpy((inside & (person.points[order, 2] > 0)).astype(np.float32)),
            "inverse": torch.from_numpy(invert(matrix).astype(np.float32)),
            "truth": torch.from_numpy(person.points.astype(np.float32)),
            "facts": torch.tensor([person.row, person.area, person.head, *person.box], dtype=torch.float32),
        }

    # ---- model ----

    def build(self, backbone_config: PreTrainedConfig, classes: Sequence[str]) -> nn.Module:
        """Make the model with random weights."""
        config: Any = backbone_config
        self.patch_size = int(torch.as_tensor(config.patch_size).max())
        return KeypointModel(backbone_config, len(classes), self.simple)

    # ---- loss and metrics ----

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Step:
        """Compute the mean squared error of the heat maps of labelled points, in fp32."""
        maps = model(batch["pixel_values"]).float()
        cell = batch["pixel_values"].shape[-1] / maps.shape[-1]
        errors = (maps - heat_maps(batch["points"] / cell, maps.shape[2:])).square().mean((2, 3))
        weights = batch["weights"]
        return Step((errors * weights).sum() / weights.sum().clamp(min=1), (maps, cell))

    def judge(self, output: tuple[Tensor, float], batch: dict[str, Any]) -> tuple[Any, Any]:
        """Return the points in pixels of the stored image with their scores, (B, K, 3), and what was to be found."""
        maps, cell = output
        found = [read_heat_maps(one) for one in maps.cpu().numpy()]
        points = torch.from_numpy(np.stack(found)).to(maps)
        places, inverse = points[..., :2] * cell, batch["inverse"]
        moved = places @ inverse[:, :, :2].transpose(1, 2) + inverse[:, None, :, 2]
        return torch.cat([moved, points[..., 2:]], 2), {"points": batch["truth"], "facts": batch["facts"]}


def heat_maps(points: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw a bump of height 1 at each point: (B, K, 2), x and y in cells, corners counting -> (B, K, rows, columns)."""
    rows, columns = (torch.arange(count, device=points.device) + 0.5 for count in shape)
    across = (columns - points[..., :1]).square()
    down = (rows - points[..., 1:]).square()
    return torch.exp(-(down[..., :, None] + across[..., None, :]) / (2 * SIGMA**2))


def read_heat_maps(maps: np.ndarray) -> np.ndarray:
    """Find the tops of one person's heat maps: (K, rows, columns) -> (K, 3), x and y in cells, and the height."""
    columns = maps.shape[2]
    flat = maps.reshape(len(maps), -1)
    best = flat.argmax(1)
    cells = np.stack([best % columns, best // columns], 1).astype(np.float64)
    refined = post_dark_unbiased_data_processing(cells[None].copy(), maps[None])[0]
    # The top lies in the cell or next to it; a flat map would say anything.
    refined = cells + np.clip(refined - cells, -1, 1)
    return np.concatenate([refined + 0.5, flat.max(1)[:, None]], 1)


class KeypointTask(PeopleTask):
    """Key points in COCO's form, judged by the average precision over object key point similarity.

    People are cut out by their true boxes, where COCO's own table has a detector's.

    Args:
        simple: As in ``PeopleTask``.
        rotation, scaling: As in ``PeopleTask``; HRNet's for COCO.
        sigmas: How exact each point can be said, relative to the size of a person; ``None``: COCO's, of its 17 points.
        layers: As in ``PeopleTask``.
    """

    name = "keypoints"
    noun = "key points"
    result = "Key point model"
    metrics = (
        Metric("oks_ap", "%", digits=2, hub_type="map", library="pycocotools"),
        Metric("oks_ap50", "%", digits=2, library="pycocotools"),
    )
    aspect = 0.75

    def __init__(
        self,
        *,
        simple: bool = False,
        rotation: float = 45.0,
        scaling: float = 0.35,
        sigmas: tuple[float, ...] | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(simple=simple, rotation=rotation, scaling=scaling, layers=layers)
        self.sigmas = sigmas
        self.names: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Return the options that were given."""
        return {**super().options(), **({"sigmas": list(self.sigmas)} if self.sigmas else {})}

    def mirror_pairs(self) -> list[int]:
        """Pair points whose names differ in left and right; a point whose partner is missing stays what it is."""
        mirrored = list(map(_mirrored_name, self.names))
        return [self.names.index(name) if name in self.names else index for index, name in enumerate(mirrored)]

    def num_points(self) -> int:
        """Return the number of names."""
        return len(self.names)

    def load(self, settings: FineTuningSettings) -> Splits:
        """Open images and annotations; see ``load_annotations``. People without a labelled point are left out.

        Raises:
            ValueError: as there; no category with named points, or several; nobody has a labelled point; points that
                are not x, y, visibility; no sigmas for other points than COCO's.
            PycocotoolsMissingError: without pycocotools.
        """
        check_pycocotools()
        found = load_annotations(settings, "person_keypoints")
        label, category = _category_of(found.categories, settings.data)
        self.names = category.keypoints
        changed = [name for name in self.names if _mirrored_name(name) != name]
        self.mirrors = bool(changed) and {*map(_mirrored_name, changed)} == {*changed}
        if len(self.sigmas or range(COCO_POINTS)) != len(self.names):
            raise ValueError(
                f"{settings.data}: there are {len(self.names)} key points, and sigmas of "
                f"{len(self.sigmas or range(COCO_POINTS))}. Give one for each: --set sigmas='[0.03, ...]'."
            )
        sources = found.sources.limit(settings.train_images, settings.test_images)
        (train, notes), (test, more) = (
            find_people(source, label, len(self.names)) for source in (sources.train, sources.test)
        )
        remarks = (*sources.remarks(), *notes, *more)
        if settings.flip and not self.mirrors:
            remarks += (
                "note: people are not mirrored, because the names of their key points do not say which one is which in "
                "a mirror: each with left in its name needs one with right, as left_eye and right_eye",
            )
        return Splits(train, test, sources.train_split, sources.test_split, self.names, tuple(dict.fromkeys(remarks)))

    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Compute COCO's average precision; a person's score is the mean height of its heat maps that are clear."""
        truth: dict[int, list[dict[str, Any]]] = {}
        found: dict[int, list[dict[str, Any]]] = {}
        for said, points, facts in zip(predictions, targets["points"], targets["facts"], strict=True):
            row, area, _, *box = facts.tolist()
            labelled = points[:, 2] > 0
            one = {"category_id": 0, "bbox": box, "area": area, "num_keypoints": int(labelled.sum())}
            truth.setdefault(int(row), []).append({**one, "keypoints": points.ravel().tolist()})
            heights = said[:, 2][said[:, 2] > COUNTED]
            score = float(heights.mean()) if len(heights) else 0.0
            found.setdefault(int(row), []).append(
                {"category_id": 0, "keypoints": said.ravel().tolist(), "score": score}
            )
        result = average_precision(list(truth.values()), [found[row] for row in truth], "keypoints", self.sigmas)
        return {f"oks_{name}": value for name, value in result.items()}


def _mirrored_name(name: str) -> str:
    """Return the name of the point that this one is in a mirror, by the words left and right."""
    swap = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return next((name.replace(one, other) for one, other in swap.items() if one in name), name)


def _category_of(categories: Sequence[Category], data: str) -> tuple[int, Category]:
    named = [(number, category) for number, category in enumerate(categories) if category.keypoints]
    if len(named) != 1:
        raise ValueError(
            f"{data}: {len(named)} of its {len(categories)} categories name key points; expected one that does, as "
            "person does in COCO's person_keypoints files."
        )
    return named[0]


def find_people(source: ImageSource, label: int, num_points: int) -> tuple[PeopleSamples, list[str]]:
    """List the people of a source who have a labelled point; points outside of their image become unlabelled.

    COCO's points are numbers of pixels, from 0; here they are places, and the middle of the first pixel is 0.5.

    Returns:
        The people, and remarks.

    Raises:
        ValueError: there are none, or somebody's points are not x, y, visibility of each.
    """
    people: list[Person] = []
    outside, example = 0, ""
    rows: Any = source.dataset
    for row, (text, size) in enumerate(zip(rows["objects"][:], rows["size"][:], strict=True)):
        limits = [math.inf if length is None else length for length in size]
        for one in json.loads(text):
            if one["label"] != label or one.get("crowd") or not one.get("keypoints"):
                continue
            where = source.item_name(source.row(row), row)
            points = read_points(one, num_points, where)
            beyond = (points[:, 2] > 0) & ((points[:, :2] < 0) | (points[:, :2] > limits)).any(1)
            if beyond.any():
                outside, example = outside + int(beyond.sum()), example or where
                points[beyond, 2] = 0
            points[:, :2] += HALF
            if (points[:, 2] > 0).any():
                x, y, width, height = one["bbox"]
                middle = (x + width / 2, y + height / 2)
                people.append(Person(row, points, middle, (width, height), (x, y, width, height), one["area"]))
    if not people:
        raise ValueError(f"{source.name}: nobody in its {len(source)} images has a labelled key point.")
    notes = [f"note: {outside} key points lie outside of their images and do not count, e.g. in {example}"]
    return PeopleSamples(source, people), notes if outside else []


def read_points(one: Mapping[str, Any], num_points: int, where: str) -> np.ndarray:
    """Read x, y, visibility of each point: float64 (K, 3).

    Raises:
        ValueError: they are something else.
    """
    try:
        points = np.asarray(one["keypoints"], dtype=np.float64).reshape(num_points, 3)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: somebody's keypoints are {str(one['keypoints'])[:60]}...; expected x, y, visibility of each of "
            f"{num_points} points."
        ) from error
    if not np.isfinite(points).all():
        raise ValueError(f"{where}: a key point is not finite.")
    return points
