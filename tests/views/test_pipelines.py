"""Augmentation pipelines: the distribution of what they draw, what they make of it, and what they refuse."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_equissl.views import TRANSFORMATIONS, build_transformation, photometric
from hf_equissl.views.augmentation import VIEW_DRAWS
from hf_equissl.views.base import Item
from hf_equissl.views.collator import collate_views
from hf_equissl.views.cropping import center_box, random_box, resize_box
from hf_equissl.views.needs import Needs
from hf_equissl.views.pipelines import PIPELINES, PipelineSpec, ViewPipeline, ViewSpec, build_pipeline

SIZE = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERYTHING = Needs(fractions=(1 / 3, 2 / 3), parameters=True, crop_boxes=True, photometric=True, labels=True)


def make(name: str = "vicreg", needs: Needs = Needs(), g: str | None = None, **overrides: Any) -> ViewPipeline:  # noqa: B008
    family = build_transformation(g) if g else None
    return build_pipeline(
        name, image_size=SIZE, transformation=family, needs=needs, image_mean=MEAN, image_std=STD, **overrides
    )


def picture(number: int = 0, width: int = 40, height: int = 32) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def item(number: int = 0, label: int | None = None) -> Item:
    return Item((picture(number),), label=label)


def make_batch(pipeline: ViewPipeline, size: int = 8) -> dict[str, Any]:
    samples = []
    for number in range(size):
        rng = np.random.default_rng(100 + number)
        samples.append({**pipeline.crop(item(number, label=number % 3), rng), "index": number})
    return collate_views(samples)


def denormalize(images: Tensor) -> Tensor:
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


# ---- g, its targets, normalisation ----


@pytest.mark.parametrize("g", sorted(TRANSFORMATIONS))
def test_view_2_is_g_of_the_augmented_crop(g: str) -> None:
    continuous = TRANSFORMATIONS[g].continuous
    needs = dataclasses.replace(EVERYTHING, fractions=(1 / 3, 2 / 3) if continuous else ())
    pipeline = make(needs=needs, g=g)
    batch = make_batch(pipeline)
    views = pipeline(batch)
    plain = make()(batch)
    assert torch.equal(views.global_crops[0], plain.global_crops[0])
    # u: the same augmentation without g and without normalisation.
    u = build_pipeline(
        "vicreg", image_size=SIZE, transformation=None, needs=Needs(), image_mean=(0,) * 3, image_std=(1,) * 3
    )(batch).global_crops[1]
    theta = views.parameters
    assert torch.equal(theta, pipeline.transformation.sample(batch["draws"][:, : pipeline.transformation.num_draws]))
    assert torch.equal(views.normalized_parameters, pipeline.transformation.targets(theta))
    expected = pipeline.normalize(pipeline.transformation.apply(u, theta, 1.0).clone())
    assert torch.equal(views.global_crops[1], expected)
    for number, fraction in enumerate(needs.fractions):
        step = pipeline.normalize(pipeline.transformation.apply(u, theta, fraction).clone())
        torch.testing.assert_close(views.intermediate_images[:, number], step)
    assert views.global_crops.isfinite().all()


@pytest.mark.parametrize("g", ["rotation", "translation", "se2", "color_jitter"])
def test_without_g_all_targets_are_view_2(g: str) -> None:
    pipeline = make(needs=EVERYTHING, g=g)
    batch = make_batch(pipeline)
    batch["draws"][:, : pipeline.transformation.num_draws] = 0.5
    views = pipeline(batch)
    assert views.parameters.abs().max() == 0
    torch.testing.assert_close(views.global_crops[1], make()(batch).global_crops[1])
    for step in range(2):
        assert torch.equal(views.intermediate_images[:, step], views.global_crops[1])


def test_full_g_as_a_target() -> None:
    pipeline = make(needs=Needs(fractions=(0.5, 1.0)), g="rotation")
    views = pipeline(make_batch(pipeline))
    assert views.intermediate_images.shape == (8, 2, 3, SIZE, SIZE)
    assert torch.equal(views.intermediate_images[:, 1], views.global_crops[1])
    assert not torch.equal(views.intermediate_images[:, 0], views.global_crops[1])


def test_center_pipeline_leaves_images_alone() -> None:
    pipeline = make("center", needs=Needs(parameters=True), g="rotation")
    image = picture(width=SIZE, height=SIZE)
    crops = pipeline.crop(Item((image,)), np.random.default_rng(0))
    assert torch.equal(crops["global_crops"][0].permute(1, 2, 0), torch.from_numpy(np.array(image)))
    batch = collate_views([{**crops, "index": 0}])
    view = denormalize(pipeline(batch).global_crops[0, 0])
    torch.testing.assert_close(view * 255, crops["global_crops"][0].float(), atol=1e-3, rtol=0)


def test_normalisation() -> None:
    pipeline = make("center")
    batch = make_batch(pipeline, 2)
    views = pipeline(batch).global_crops
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(views[1], (batch["global_crops"][:, 1].float() / 255 - mean) / std)


# ---- what is in the views ----


def test_only_what_is_needed() -> None:
    pipeline = make(g="rotation")
    views = pipeline(make_batch(pipeline))
    filled = {item.name for item in dataclasses.fields(views) if getattr(views, item.name) not in (None, {})}
    assert filled == {"global_crops"}
    for need, part in [
        (Needs(parameters=True), "parameters"),
        (Needs(fractions=(0.5,)), "intermediate_images"),
        (Needs(crop_boxes=True), "crop_boxes"),
        (Needs(photometric=True), "photometric"),
        (Needs(labels=True), "labels"),
    ]:
        views = make(needs=need, g="rotation")(make_batch(pipeline))
        present = {item.name for item in dataclasses.fields(views) if getattr(views, item.name) not in (None, {})}
        assert present == {"global_crops", part} | ({"normalized_parameters"} if part == "parameters" else set())


def test_shapes_and_reported_draws() -> None:
    pipeline = make(needs=EVERYTHING, g="se2")
    batch = make_batch(pipeline)
    before = {key: value.clone() for key, value in batch.items() if isinstance(value, Tensor)}
    views = pipeline(batch)
    assert all(torch.equal(batch[key], value) for key, value in before.items()), "the batch was changed"
    assert views.global_crops.shape == (2, 8, 3, SIZE, SIZE)
    assert views.global_crops.dtype == torch.float32
    assert views.intermediate_images.shape == (8, 2, 3, SIZE, SIZE)
    assert views.crop_boxes.shape == (2, 8, 4)
    assert views.labels.tolist() == [number % 3 for number in range(8)]
    names = {"flip", "jitter_applied", "brightness", "contrast", "saturation", "hue", "grayscale", "solarize"}
    assert set(views.photometric) == names | {"blur_applied", "blur_sigma"}
    assert all(value.shape == (2, 8) for value in views.photometric.values())


def test_reported_draws_reproduce_the_views() -> None:
    """The photometric parameters, applied by hand one image at a time, give the view."""
    pipeline = make(needs=Needs(photometric=True))
    batch = make_batch(pipeline, 32)
    views = pipeline(batch)
    for v, spec in enumerate(pipeline.spec.views):
        drawn = {key: value[v] for key, value in views.photometric.items()}
        for b in range(32):
            image = batch["global_crops"][b : b + 1, v].float() / 255
            one = {key: value[b : b + 1] for key, value in drawn.items()}
            if one["flip"]:
                image = image.flip(-1)
            image = photometric.adjust_brightness(image, one["brightness"])
            image = photometric.adjust_contrast(image, one["contrast"])
            image = photometric.adjust_saturation(image, one["saturation"])
            image = photometric.adjust_hue(image, one["hue"])
            if one["grayscale"]:
                image = photometric.to_grayscale(image)
            image = photometric.gaussian_blur(image, one["blur_sigma"], spec.kernel_size(SIZE))
            if one["solarize"]:
                image = photometric.solarize(image, 128 / 255)
            torch.testing.assert_close(denormalize(views.global_crops[v, b]), image[0], atol=1e-5, rtol=0)


def test_batch_equals_its_samples() -> None:
    pipeline = make(needs=EVERYTHING, g="rotation")
    batch = make_batch(pipeline)
    whole = pipeline(batch)
    for row in range(8):
        single = pipeline({key: value[row : row + 1] for key, value in batch.items() if isinstance(value, Tensor)})
        torch.testing.assert_close(single.global_crops[:, 0], whole.global_crops[:, row], atol=1e-5, rtol=0)
        torch.testing.assert_close(single.intermediate_images[0], whole.intermediate_images[row], atol=1e-5, rtol=0)


def test_autocast_does_not_reach_the_pixels() -> None:
    pipeline = make(needs=EVERYTHING, g="gaussian_blur")
    batch = make_batch(pipeline)
    expected = pipeline(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = pipeline(batch)
    assert torch.equal(views.global_crops, expected.global_crops)


def test_branch_for_devices_that_must_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where images cannot be selected without waiting for the device, all are computed; the result is the same."""
    from hf_equissl.views import augmentation

    pipeline = make(needs=EVERYTHING, g="rotation")
    batch = make_batch(pipeline)
    expected = pipeline(batch)
    monkeypatch.setattr(augmentation, "SELECTING_IS_FREE", frozenset())
    torch.testing.assert_close(pipeline(batch).global_crops, expected.global_crops, atol=1e-6, rtol=0)


@pytest.mark.parametrize("g", sorted(TRANSFORMATIONS))
def test_nothing_is_read_back_from_the_device(g: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values refuse to be looked at: the whole device part runs on them."""
    from hf_equissl.views import augmentation

    monkeypatch.setattr(augmentation, "SELECTING_IS_FREE", frozenset())
    needs = dataclasses.replace(EVERYTHING, fractions=(0.5,) if TRANSFORMATIONS[g].continuous else ())
    pipeline = make(needs=needs, g=g)
    batch = make_batch(make(needs=needs, g=g))
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in batch.items() if isinstance(value, Tensor)}
        assert pipeline(fake).global_crops.shape == (2, 8, 3, SIZE, SIZE)


# ---- statistics ----


def test_draws_have_the_right_frequencies() -> None:
    pipeline = make(needs=Needs(photometric=True))
    rng = np.random.default_rng(0)
    count = 10_000
    batch = {
        "global_crops": torch.zeros(count, 2, 3, 4, 4, dtype=torch.uint8),
        "draws": torch.from_numpy(rng.random((count, pipeline.num_draws), dtype=np.float32)),
    }
    drawn = pipeline(batch).photometric
    frequencies = {
        "flip": (0.5, 0.5),
        "jitter_applied": (0.8, 0.8),
        "grayscale": (0.2, 0.2),
        "solarize": (0.0, 0.2),
    }
    blurred = (drawn["blur_sigma"] > 0).float().mean(dim=1)
    assert blurred.tolist() == pytest.approx([1.0, 0.1], abs=0.015)
    for key, expected in frequencies.items():
        assert drawn[key].float().mean(dim=1).tolist() == pytest.approx(expected, abs=0.015), key
    sigma = drawn["blur_sigma"][0]
    assert 0.1 <= sigma.min() < 0.12
    assert 1.98 < sigma.max() <= 2.0
    assert sigma.mean().item() == pytest.approx(1.05, abs=0.03)
    applied = drawn["jitter_applied"][0]
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for key, (low, high) in ranges.items():
        values = drawn[key][0][applied]
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high
        assert set(drawn[key][0][~applied].tolist()) == {0.0 if key == "hue" else 1.0}
    # The two views draw on their own.
    both = (drawn["flip"][0] & drawn["flip"][1]).float().mean().item()
    assert both == pytest.approx(0.25, abs=0.015)


def test_crop_boxes_have_the_right_distribution() -> None:
    rng = np.random.default_rng(0)
    width, height = 500, 375
    boxes = np.array([random_box(width, height, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(4000)])
    left, top, right, lower = boxes.T
    assert (boxes >= 0).all()
    assert (right <= width).all()
    assert (lower <= height).all()
    share = (right - left) * (lower - top) / (width * height)
    ratio = (right - left) / (lower - top)
    assert share.min() == pytest.approx(0.08, abs=0.005)
    assert share.max() > 0.95
    # Large boxes of extreme ratio do not fit and are drawn again: the same by rejection, in real numbers.
    area = rng.uniform(0.08, 1.0, 100_000) * width * height
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 100_000))
    fits = (np.sqrt(area * aspect) <= width) & (np.sqrt(area / aspect) <= height)
    assert share.mean() == pytest.approx((area[fits] / (width * height)).mean(), abs=0.015)
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert np.log(ratio).mean() == pytest.approx(np.log(aspect[fits]).mean(), abs=0.015)
    # Small boxes lie anywhere, each position as often as the other.
    small = share < 0.2
    centre = ((left + right) / 2 / width)[small]
    assert centre.mean() == pytest.approx(0.5, abs=0.02)
    assert (top == 0).any()
    assert (lower == height).any()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((10, 10), None)],
)
def test_crops_of_extreme_images(size: tuple[int, int], expected: tuple[int, ...] | None) -> None:
    box = random_box(*size, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert box == expected or (expected is None and box[2] <= 10 and box[3] <= 10)


def test_center_box() -> None:
    assert center_box(224, 224, 224) == (0, 0, 224, 224)
    assert center_box(256, 256, 224) == (16, 16, 240, 240)
    assert center_box(512, 256, 224) == (144, 16, 368, 240)
    assert center_box(100, 50, 224) == (28.125, 3.125, 71.875, 46.875)


def test_crops_follow_from_the_generator_and_show_their_boxes() -> None:
    pipeline = make()
    crops = pipeline.crop(item(), np.random.default_rng(5))
    for view, (top, left, height, width) in enumerate(crops["crop_boxes"].double().tolist()):
        box = (round(left * 40), round(top * 32), round((left + width) * 40), round((top + height) * 32))
        expected = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
        resize_box(np.array(picture()), box, "bicubic", expected)
        assert torch.equal(crops["global_crops"][view].permute(1, 2, 0), torch.from_numpy(expected))
    again = pipeline.crop(item(), np.random.default_rng(5))
    assert torch.equal(crops["global_crops"], again["global_crops"])
    assert not torch.equal(crops["crop_boxes"][0], crops["crop_boxes"][1])


def test_other_g_sees_the_same_crops_and_colours() -> None:
    pipelines = [make(g=g) for g in (None, *TRANSFORMATIONS)]
    assert len({pipeline.num_draws for pipeline in pipelines}) == 1
    batch = make_batch(pipelines[0])
    first_views = [pipeline(batch).global_crops[0] for pipeline in pipelines]
    assert all(torch.equal(view, first_views[0]) for view in first_views)


# ---- local crops ----


def test_local_crops() -> None:
    local = {"count": 3, "size": 8, "crop_scale": (0.05, 0.4), "blur_probability": 0.0}
    pipeline = make(needs=Needs(local_crops=True), local=local)
    batch = make_batch(pipeline)
    assert pipeline.num_draws == 24 + len(VIEW_DRAWS) * 5
    assert batch["local_crops"].shape == (8, 3, 3, 8, 8)
    views = pipeline(batch)
    assert views.local_crops.shape == (3, 8, 3, 8, 8)
    assert not torch.equal(views.local_crops[0], views.local_crops[1])
    unasked = make(local=local)
    assert "local_crops" not in make_batch(unasked)
    assert "3 local crops of 8 px" in pipeline.describe()
    assert "local crops" not in unasked.describe()


# ---- configuration ----


def test_overrides() -> None:
    pipeline = make(crop_scale=[0.35, 1.0], flip_probability=0, view_2={"blur_probability": 1, "flip_probability": 0.1})
    first, second = pipeline.spec.views
    assert first.crop_scale == second.crop_scale == (0.35, 1.0)
    assert (first.flip_probability, second.flip_probability) == (0, 0.1)
    assert (first.blur_probability, second.blur_probability) == (1.0, 1)
    assert PIPELINES["vicreg"].views[1].blur_probability == 0.1
    assert make(local={"count": 2}, needs=Needs(local_crops=True)).local.count == 2
    three = PipelineSpec((ViewSpec(),) * 3).override({"view_3": {"hue": 0}})
    assert [spec.hue for spec in three.views] == [0.1, 0.1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vicregg"}, "'vicreg'"),
        ({"crop_scael": (0.1, 1)}, "'crop_scale'"),
        ({"view_3": {}}, "'view_2'|'view_1'"),
        ({"view_2": {"blur_probabilty": 0.1}}, "view_2.*'blur_probability'"),
        ({"view_2": 0.1}, "view_2 is 0.1"),
        ({"local": {"counts": 2}}, "local.*'count'"),
        ({"local": {"count": 0}}, "local.count is 0"),
        ({"flip_probability": 1.5}, r"flip_probability is 1.5.*\[0, 1\]"),
        ({"flip_probability": True}, "flip_probability is True"),
        ({"hue": 0.6}, "hue is 0.6"),
        ({"brightness": -0.1}, "brightness is -0.1"),
        ({"crop_scale": (0.5, 0.1)}, "crop_scale"),
        ({"crop_scale": (0, 1)}, "crop_scale"),
        ({"crop_scale": 0.5}, "crop_scale is 0.5, expected two numbers"),
        ({"crop_scale": (0.5, 1.5)}, "at most 1"),
        ({"blur_sigma": (0.1, 0.2, 0.3)}, "blur_sigma"),
        ({"blur_kernel_size": 4}, "odd"),
        ({"interpolation": "cubic"}, "bicubic"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"needs": Needs(fractions=(0.5,))}, "names no transformation"),
        ({"needs": Needs(parameters=True)}, "names no transformation"),
        ({"needs": Needs(fractions=(0.5,)), "g": "flip"}, "no path from the identity"),
        ({"needs": Needs(fractions=(1.5,)), "g": "rotation"}, "fractions"),
        ({"needs": Needs(local_crops=True)}, "local"),
        ({"needs": Needs(masks=True)}, "masks"),
    ],
)
def test_needs_that_cannot_be_met(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("changes", [{"image_size": 0}, {"image_mean": (0.5,)}, {"image_std": (0.5, 0.5, 0)}])
def test_wrong_image_settings(changes: dict[str, Any]) -> None:
    settings = {"image_size": SIZE, "image_mean": MEAN, "image_std": STD, **changes}
    with pytest.raises(ValueError, match=next(iter(changes))):
        build_pipeline("vicreg", transformation=None, needs=Needs(), **settings)


def test_batch_of_another_pipeline() -> None:
    pipeline = make(needs=Needs(local_crops=True), local={})
    with pytest.raises(ValueError, match=r"44 draws.*124"):
        pipeline(make_batch(make()))


def test_kernel_follows_the_size() -> None:
    assert [ViewSpec().kernel_size(size) for size in (32, 64, 96, 224)] == [3, 7, 9, 23]
    assert ViewSpec(blur_kernel_size=9).kernel_size(224) == 9


def test_describe_and_pickle() -> None:
    pipeline = make(needs=EVERYTHING, g="rotation")
    text = pipeline.describe()
    for part in (
        "vicreg: 2 views of 16 px",
        "crop 0.08-1 bicubic",
        "solarize p 0.2",
        "RotationFamily(",
        "0.333, 0.667",
    ):
        assert part in text
    assert "g: none" in make("center").describe()
    assert "path=linear" in make(g="se2").describe()
    batch = make_batch(pipeline)
    expected = pipeline(batch).global_crops
    assert torch.equal(pickle.loads(pickle.dumps(pipeline))(batch).global_crops, expected)
