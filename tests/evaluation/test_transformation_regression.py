from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import EvaluationData, ImageSet, TransformationRegressionEvaluator
from hf_equissl.views import TRANSFORMATIONS

from .conftest import ConstantEncoder, PixelEncoder, gradient_images

QUICK = {"epochs": 12, "num_draws": 4, "batch_size": 32, "hidden_width": 64, "seeds": 1, "progress": False}


def test_features_that_keep_everything_score_high_for_every_family(
    ramps: EvaluationData, pixels_12: FrozenEncoder
) -> None:
    families = ["rotation", "translation", "color_jitter", "flip", "se2"]
    evaluator = TransformationRegressionEvaluator(ramps, families, **QUICK)
    records = evaluator(pixels_12)
    assert [record.task for record in records if record.primary] == families
    found = {record.task: record.value for record in records if record.primary}
    assert min(value for name, value in found.items() if name != "flip") > 0.9, found
    assert found["flip"] > 0.7, found  # two values, and the probe guesses numbers between
    rotation = records[0]
    assert rotation.details["r2_angle"] == list(rotation.values)
    assert rotation.protocol["family"]["class"] == "RotationFamily"
    assert (rotation.dataset, rotation.split, rotation.encoder) == ("ramps", "test", "pixels")


def test_features_that_know_nothing_score_zero(ramps: EvaluationData) -> None:
    encoder = FrozenEncoder(ConstantEncoder(), image_size=12)
    records = TransformationRegressionEvaluator(ramps, ["rotation", "color_jitter", "gaussian_blur"], **QUICK)(encoder)
    assert all(-0.2 < record.value < 0.05 for record in records), [record.value for record in records]


def test_same_seed_same_number_and_seeds_are_independent(ramps: EvaluationData, pixels_12: FrozenEncoder) -> None:
    settings = {**QUICK, "epochs": 3, "num_draws": 2}
    before = {name: value.clone() for name, value in pixels_12.module.state_dict().items()}
    state = torch.manual_seed(1).get_state()
    both = TransformationRegressionEvaluator(ramps, ["rotation"], **{**settings, "seeds": (0, 1)})(pixels_12)[0]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    alone = TransformationRegressionEvaluator(ramps, ["rotation"], **{**settings, "seeds": (1,)})(pixels_12)[0]
    assert both.values[1] == alone.values[0]
    assert both.values[0] != both.values[1]
    assert both.key == alone.key
    assert all(torch.equal(value, before[name]) for name, value in pixels_12.module.state_dict().items())
    assert all(module.training for module in pixels_12.module.modules())


def test_the_encoder_runs_once_per_draw_and_once_for_the_base_images(ramps: EvaluationData) -> None:
    module = PixelEncoder()
    encoder = FrozenEncoder(module, image_size=12, batch_size=512)
    evaluator = TransformationRegressionEvaluator(
        ramps, ["rotation", "flip"], features=("cls", "patches", "backbone"), **{**QUICK, "seeds": 2}
    )
    evaluator(encoder)
    # Base images of both sets; per family: the test images and four draws.
    assert module.calls == 2 + 2 * (1 + 4)


def test_a_new_draw_each_epoch(ramps: EvaluationData) -> None:
    module = PixelEncoder()
    encoder = FrozenEncoder(module, image_size=12, batch_size=512)
    TransformationRegressionEvaluator(ramps, ["rotation"], **{**QUICK, "num_draws": None, "epochs": 5})(encoder)
    assert module.calls == 2 + 1 + 5


def test_draws_are_fixed_and_differ_between_epochs_families_and_test(ramps: EvaluationData) -> None:
    evaluator = TransformationRegressionEvaluator(ramps, ["rotation", "gaussian_blur"], **QUICK)
    first = evaluator.parameters("rotation", 64, -1)
    assert torch.equal(first, evaluator.parameters("rotation", 64, -1))
    assert not torch.equal(first, evaluator.parameters("rotation", 64, 0))
    other = TransformationRegressionEvaluator(ramps, ["rotation"], **{**QUICK, "draw_seed": 1})
    assert not torch.equal(first, other.parameters("rotation", 64, -1))


def test_scalar_form_is_of_normalised_targets(ramps: EvaluationData, pixels_12: FrozenEncoder) -> None:
    records = TransformationRegressionEvaluator(ramps, ["translation"], **QUICK)(pixels_12)
    r2, scalar = (next(item.value for item in records if item.metric == name) for name in ("r2", "r2_scalar"))
    assert r2 == pytest.approx(scalar, abs=0.02)  # both columns are uniform in [-1, 1]
    columns = next(item.details for item in records if item.metric == "r2")
    assert r2 == pytest.approx(sum(values[0] for values in columns.values()) / 2)


def test_fill_reaches_the_families_that_have_it(ramps: EvaluationData) -> None:
    evaluator = TransformationRegressionEvaluator(ramps, ["rotation", "gaussian_blur"], fill="reflect", **QUICK)
    assert evaluator.settings("rotation")["family"]["fill"] == "reflect"
    assert "fill" not in evaluator.settings("gaussian_blur")["family"]
    narrow = TransformationRegressionEvaluator(
        ramps, ["rotation"], family_options={"rotation": {"max_degrees": 10}}, **QUICK
    )
    assert narrow.settings("rotation")["family"]["max_degrees"] == 10


def test_standardising_makes_scale_irrelevant(ramps: EvaluationData, pixels_12: FrozenEncoder) -> None:
    class Scaled(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.flatten(1) * 1024  # a power of two: floats lose nothing

    class Plain(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values.flatten(1)

    settings = {**QUICK, "epochs": 2, "num_draws": 1}
    values = {}
    for name, module in (("plain", Plain()), ("scaled", Scaled())):
        for standardize in (True, False):
            evaluator = TransformationRegressionEvaluator(ramps, ["rotation"], standardize=standardize, **settings)
            values[name, standardize] = evaluator(FrozenEncoder(module, image_size=12))[0].value
    assert values["plain", True] == pytest.approx(values["scaled", True], abs=1e-3)
    assert abs(values["plain", False] - values["scaled", False]) > 0.01


def test_subsets_and_broken_images(pixels_12: FrozenEncoder) -> None:
    images = [*gradient_images(150, 0), b"not an image"]
    train = ImageSet(images, list(range(151)), "d", "train", progress=False)
    rows, features = train.features(pixels_12, ("cls",))
    assert rows.tolist() == list(range(150))
    part = train.subset(40)
    assert len(part) == 40
    part_rows, part_features = part.features(pixels_12, ("cls",))
    assert torch.allclose(part_features["cls"], features["cls"][part.labels[part_rows]])
    with pytest.raises(
        ValueError, match=r"(?s)1 of 21 images .* do not decode.*d \(train\), row 20: .*--max_bad_share"
    ):
        ImageSet([*images[:20], b"x"], None, "d", "train", progress=False).features(pixels_12, ("cls",))
    with pytest.raises(ValueError, match="hold images"):
        ImageSet([b"x"], None, "d", "train", max_bad_share=1, progress=False).features(pixels_12, ("cls",))


def test_features_are_computed_again_when_weights_change(ramps: EvaluationData, pixels_12: FrozenEncoder) -> None:
    before = ramps.test.features(pixels_12, ("cls",))[1]["cls"]
    with torch.no_grad():
        pixels_12.module.scale.mul_(2)
    assert torch.allclose(ramps.test.features(pixels_12, ("cls",))[1]["cls"], 2 * before)


def test_images_beyond_the_cache_are_decoded_again_with_the_same_result(pixels_12: FrozenEncoder) -> None:
    images = gradient_images(30, 0)
    kept, streamed = (ImageSet(images, cache_bytes=size, progress=False) for size in (1 << 20, 0))
    for _ in range(2):
        assert torch.equal(kept.encode(pixels_12, ("cls",))[1]["cls"], streamed.encode(pixels_12, ("cls",))[1]["cls"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": ["rotatoin"]}, "rotation"),
        ({"families": []}, "at least one family"),
        ({"epochs": 0}, "at least 1"),
        ({"seeds": 0}, "at least one seed"),
    ],
)
def test_mistakes_are_named_before_compute(ramps: EvaluationData, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformationRegressionEvaluator(ramps, **settings)  # type: ignore[arg-type]


def test_constant_targets_are_an_error_before_compute(ramps: EvaluationData) -> None:
    module = PixelEncoder()
    evaluator = TransformationRegressionEvaluator(
        ramps, ["rotation"], family_options={"rotation": {"max_degrees": 0}}, **QUICK
    )
    with pytest.raises(ValueError, match="undefined"):
        evaluator(FrozenEncoder(module, image_size=12))
    assert module.calls == 0


def test_every_family_of_the_registry_can_be_regressed(ramps: EvaluationData, pixels_12: FrozenEncoder) -> None:
    # Blur needs images larger than half its kernel; 12 pixels are.
    evaluator = TransformationRegressionEvaluator(
        ramps, list(TRANSFORMATIONS), **{**QUICK, "epochs": 1, "num_draws": 1}
    )
    records = evaluator(pixels_12)
    assert {record.task for record in records} == set(TRANSFORMATIONS)
    assert all(math.isfinite(record.value) for record in records)
