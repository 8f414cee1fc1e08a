"""What DINO's, iBOT's and DINOv2's pipelines draw, measured over 10,000 draws of the pipelines themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_equissl.views.augmentation import VIEW_DRAWS
from hf_equissl.views.base import Item
from hf_equissl.views.collator import ViewCollator
from hf_equissl.views.needs import Needs
from hf_equissl.views.pipelines import PIPELINES, ViewPipeline, build_pipeline

COUNT = 10_000
SIDE = 5  # of crops in the tests of colours: half of DINOv2's blur kernel can still be reflected
# Of global view 1, global view 2, the local crops; from the papers' code.
BLUR = {
    "dino": (1.0, 0.1, 0.5),
    "ibot": (1.0, 0.1, 0.5),
    "dinov2": (0.0, 0.9, 0.5),
    "dinov2_nominal": (1.0, 0.1, 0.5),
}
SCALES = {
    "dino": ((0.4, 1.0), (0.05, 0.4)),
    "ibot": ((0.25, 1.0), (0.05, 0.25)),
    "dinov2": ((0.32, 1.0), (0.05, 0.32)),
}
LOCAL = {"dino": 8, "ibot": 10, "dinov2": 8, "dinov2_nominal": 8}


def make(name: str, needs: Needs, image_size: int = 224, **overrides: Any) -> ViewPipeline:
    return build_pipeline(
        name,
        image_size=image_size,
        transformation=None,
        needs=needs,
        image_mean=(0.0,) * 3,
        image_std=(1.0,) * 3,
        patch_size=16,
        **overrides,
    )


def crops_of(pipeline: ViewPipeline, images: int, local: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch whose global crops are black and whose local crops are all ``local`` (3, s, s)."""
    rng = np.random.default_rng(0)
    return {
        "global_crops": torch.zeros(images, 2, 3, SIDE, SIDE, dtype=torch.uint8),
        "local_crops": local.expand(images, LOCAL[pipeline.name], *local.shape),
        "draws": torch.from_numpy(rng.random((images, pipeline.num_draws), dtype=np.float32)),
    }


@pytest.mark.parametrize("name", BLUR)
def test_frequencies_of_the_global_views(name: str) -> None:
    pipeline = make(name, Needs(photometric=True))
    rng = np.random.default_rng(0)
    drawn = pipeline(
        {
            "global_crops": torch.zeros(COUNT, 2, 3, SIDE, SIDE, dtype=torch.uint8),
            "draws": torch.from_numpy(rng.random((COUNT, pipeline.num_draws), dtype=np.float32)),
        }
    ).photometric
    blurred = (drawn["blur_sigma"] > 0).float().mean(dim=1).tolist()
    assert blurred == pytest.approx(BLUR[name][:2], abs=0.015)
    assert [share in (0.0, 1.0) for share in blurred] == [share in (0.0, 1.0) for share in BLUR[name][:2]]
    for key, expected in {
        "solarize": (0.0, 0.2),
        "flip": (0.5, 0.5),
        "jitter_applied": (0.8, 0.8),
        "grayscale": (0.2, 0.2),
    }.items():
        assert drawn[key].float().mean(dim=1).tolist() == pytest.approx(expected, abs=0.015), key
    sigma = drawn["blur_sigma"][drawn["blur_sigma"] > 0]
    assert (sigma.min().item(), sigma.max().item()) == pytest.approx((0.1, 2.0), abs=0.01)
    applied = drawn["jitter_applied"]
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for key, limits in ranges.items():
        values = drawn[key][applied]
        assert (values.min().item(), values.max().item()) == pytest.approx(limits, abs=0.005), key


@pytest.mark.parametrize("name", BLUR)
def test_frequencies_of_the_local_crops(name: str) -> None:
    """Seen in the pixels: a red dot left of the middle is moved, turned grey, spread, but never inverted."""
    images = COUNT // LOCAL[name]  # times crops: 10,000 draws
    dot = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    dot[0, 2, 1] = 255
    pipeline = make(name, Needs(local_crops=True), local={"jitter_probability": 0})
    local = pipeline(crops_of(pipeline, images, dot)).local_crops.flatten(0, 1)
    red, green, _ = local.unbind(1)
    middle = red[:, 2]
    shares = {
        "flip": (middle[:, 3] > middle[:, 1], 0.5),
        "grayscale": (green.amax(dim=(1, 2)) > 0, 0.2),
        "blur": (red[:, 1].amax(dim=1) > 0, BLUR[name][2]),
        "solarize": (middle.amax(dim=1) == 0, 0.0),  # neither grey nor spread, it would be inverted to black
    }
    for key, (chosen, expected) in shares.items():
        assert chosen.float().mean().item() == pytest.approx(expected, abs=0.02 if expected else 0), key

    # On an even grey only brightness is seen.
    pipeline = make(name, Needs(local_crops=True), local={"grayscale_probability": 0})
    grey = torch.full((3, SIDE, SIDE), 102, dtype=torch.uint8)
    local = pipeline(crops_of(pipeline, images, grey)).local_crops.flatten(0, 1)[:, 0, 0, 0]
    assert ((local - 0.4).abs() > 1e-4).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (local.min().item(), local.max().item()) == pytest.approx((0.24, 0.56), abs=0.003)


@pytest.mark.parametrize("name", SCALES)
def test_areas_of_the_crops(name: str) -> None:
    """Boxes of the global crops as reported, those of the local ones as seen in pixels that say where they lay."""
    count, size, side = 4000, 500, 16
    place = (np.arange(size) * 256 // size).astype(np.uint8)
    image = Image.fromarray(np.stack(np.broadcast_arrays(place[None], place[:, None], np.uint8(0)), axis=2))
    # The filter has no part in where boxes lie, and "nearest" keeps the pixels that say so.
    overrides = {"interpolation": "nearest", "local": {"interpolation": "nearest", "size": side}}

    def draw(key: str, images: int, **needs: bool) -> torch.Tensor:
        pipeline = make(name, Needs(**needs), image_size=side, **overrides)
        return torch.stack([pipeline.crop(Item((image,)), np.random.default_rng(seed))[key] for seed in range(images)])

    boxes = draw("crop_boxes", count // 2, crop_boxes=True)
    areas = {"global": (boxes[..., 2] * boxes[..., 3]).flatten().numpy()}
    local = draw("local_crops", count // LOCAL[name], local_crops=True).flatten(0, 1).double()
    spans = [(local[:, channel, -1, -1] - local[:, channel, 0, 0]) / 256 * side / (side - 1) for channel in (0, 1)]
    areas["local"] = (spans[0] * spans[1]).numpy()

    rng = np.random.default_rng(1)
    for kind, (low, high) in zip(areas, SCALES[name], strict=True):
        area, ratio = rng.uniform(low, high, 200_000), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 200_000))
        expected = area[(area * ratio <= 1) & (area / ratio <= 1)]  # boxes that do not fit are drawn again
        levels = [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98]
        drawn = np.quantile(areas[kind], levels)
        np.testing.assert_allclose(drawn, np.quantile(expected, levels), atol=0.03 * (high - low), err_msg=kind)
    assert [len(drawn) for drawn in areas.values()] == [count, count]


@pytest.mark.parametrize("name", BLUR)
def test_counts_and_sizes(name: str) -> None:
    pipeline = make(name, Needs(local_crops=True, masks=name != "dino"))
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    samples = []
    for index in range(2):
        samples.append({**pipeline.crop(Item((image,)), rng), "index": index})
    views = pipeline(ViewCollator(pipeline)(samples))
    assert views.global_crops.shape == (2, 2, 3, 224, 224)
    assert views.local_crops.shape == (LOCAL[name], 2, 3, 96, 96)
    assert (views.masks is None) == (name == "dino")
    if views.masks is not None:
        assert views.masks.shape == (2, 2, 196)
    kernels = {spec.kernel_size(224) for spec in pipeline.spec.views} | {pipeline.spec.local.view.kernel_size(96)}
    assert kernels == ({9} if name.startswith("dinov2") else {23, 13})
    thresholds = {spec.solarize_threshold for spec in pipeline.spec.views}
    assert thresholds == {128 / 255}


def test_dinov2_nominal_differs_in_blur_alone() -> None:
    actual, nominal = PIPELINES["dinov2"], PIPELINES["dinov2_nominal"]
    assert (actual.masks, actual.local) == (nominal.masks, nominal.local)
    for one, other in zip(actual.views, nominal.views, strict=True):
        assert one != other == dataclasses.replace(one, blur_probability=other.blur_probability)


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_local_crops_in_one_call_equal_one_at_a_time(name: str) -> None:
    """The pipeline augments all local crops together; here each crop of each image goes through one of its own."""
    together = make(name, Needs(local_crops=True), image_size=16, local={"size": 12, "count": 3})
    one = make(name, Needs(local_crops=True), image_size=16, local={"size": 12, "count": 1})
    rng = np.random.default_rng(0)
    batch = {
        "global_crops": torch.zeros(4, 2, 3, 16, 16, dtype=torch.uint8),
        "local_crops": torch.from_numpy(rng.integers(0, 256, (4, 3, 3, 12, 12), dtype=np.uint8)),
        "draws": torch.from_numpy(rng.random((4, together.num_draws), dtype=np.float32)),
    }
    expected = together(batch).local_crops
    shared = one.num_draws - len(VIEW_DRAWS)
    for crop in range(3):
        own = batch["draws"][:, shared + crop * len(VIEW_DRAWS) :][:, : len(VIEW_DRAWS)]
        for row in range(4):
            single = {
                "global_crops": batch["global_crops"][row : row + 1],
                "local_crops": batch["local_crops"][row : row + 1, crop : crop + 1],
                "draws": torch.cat((batch["draws"][:, :shared], own), dim=1)[row : row + 1],
            }
            torch.testing.assert_close(one(single).local_crops[0, 0], expected[crop, row], atol=1e-6, rtol=0)
