"""What an R2 is read beside: images without corners, raw pixels, random weights, probes that learn little."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from hf_equissl.encoders import FrozenEncoder, open_frozen
from hf_equissl.evaluation import EvaluationData, ImageSet, TransformationRegressionEvaluator, cli, load_records
from hf_equissl.evaluation.circular_mask import DiskFamily, disk_radius
from hf_equissl.evaluation.ridge import fit_ridge, solve_ridge
from hf_equissl.views import build_transformation

from .conftest import PixelEncoder, gradient_images

QUICK = {"epochs": 12, "num_draws": 4, "batch_size": 32, "hidden_width": 64, "seeds": 1, "progress": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls") / "encoder"
    torch.manual_seed(5)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(crop_size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("count", "width"), [(60, 5), (20, 40)])
def test_ridge_is_that_of_sklearn(count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(count, size, generator=generator) + 3 for size in (width, 2))
    for penalty, (weight, bias) in zip((1e-3, 10.0), solve_ridge(inputs, targets, (1e-3, 10.0)), strict=True):
        reference = Ridge(alpha=penalty * count).fit(inputs.numpy(), targets.numpy())
        assert torch.allclose(weight, torch.from_numpy(reference.coef_).float(), atol=1e-4)
        assert torch.allclose(bias, torch.from_numpy(reference.intercept_).float(), atol=1e-3)


def test_the_penalty_is_chosen_by_samples_that_were_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 60, generator=generator)
    noise = torch.randn(40, 1, generator=generator)
    weight, _ = fit_ridge(inputs, noise)
    assert weight.norm() < 0.1 * solve_ridge(inputs, noise, (1e-3,))[0][0].norm()  # nothing there: the largest penalty
    weight, _ = fit_ridge(inputs[:, :5], inputs[:, :1] * 2)
    assert torch.allclose(weight, torch.tensor([[2.0, 0, 0, 0, 0]]), atol=0.02)


@pytest.mark.parametrize(
    ("name", "options", "radius"),
    [
        ("rotation", {"max_degrees": 180}, 16.0),
        ("translation", {"max_shift": 3, "unit": "pixels"}, 13),
        ("se2", {"max_shift": 4, "unit": "pixels"}, 16 - 4 * 2**0.5),
        ("crop", {}, 16.0),
    ],
)
def test_a_white_image_tells_nothing_through_the_disk(name: str, options: dict[str, object], radius: float) -> None:
    family = DiskFamily(build_transformation(name, **options))
    assert disk_radius(family.family, 32) == pytest.approx(radius, abs=1.5)
    white = torch.ones(50, 3, 32, 32)
    draws = torch.rand(50, family.num_draws, generator=torch.Generator().manual_seed(3))
    moved = family.apply(white, family.sample(draws))
    assert torch.allclose(moved, family.mask(white), atol=2e-3)
    assert 0.3 < moved.mean() < 0.8


def test_a_disk_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--fill circle: TranslationFamily moves .* Choose a smaller range"):
        disk_radius(build_transformation("translation", max_shift=1.0, unit="fraction"), 32)


def test_black_corners_tell_the_angle_and_the_disk_hides_it(pixels_12: FrozenEncoder) -> None:
    # White images of several brightnesses: all there is to see of a rotation is the corners.
    levels = np.random.default_rng(0).integers(150, 250, 250)
    images = [np.full((12, 12, 3), level, dtype=np.uint8) for level in levels]
    data = EvaluationData(*(ImageSet(part, progress=False) for part in (images[:200], images[200:])))
    found = {}
    for fill in ("zeros", "circle"):
        evaluator = TransformationRegressionEvaluator(data, ["translation", "flip"], fill=fill, **QUICK)
        found[fill] = {record.metric: record.value for record in evaluator(pixels_12) if record.task == "translation"}
        assert evaluator.settings("translation")["family"]["fill"] == fill
        assert "fill" not in evaluator.settings("flip")["family"]
    assert found["zeros"]["r2"] > 0.9
    assert found["zeros"]["r2_linear"] > 0.5
    assert all(abs(value) < 0.2 for value in found["circle"].values()), found


def test_probes_of_little_capacity_are_recorded_beside_the_mlp(ramps: EvaluationData, pixels_12: FrozenEncoder) -> None:
    evaluator = TransformationRegressionEvaluator(ramps, ["translation"], **QUICK | {"seeds": 2}, few_shot_images=20)
    values = {record.metric: record for record in evaluator(pixels_12)}
    assert values["r2_linear"].values[0] == values["r2_linear"].values[1]
    assert values["r2_few_shot"].values[0] != values["r2_few_shot"].values[1]  # each seed draws its images
    assert values["r2_few_shot"].value < values["r2_linear"].value < 1
    assert values["r2_linear"].value > 0.8  # ramps shift linearly with the image
    assert [record.metric for record in values.values() if record.primary] == ["r2"]
    assert values["r2"].protocol["few_shot_images"] == 20


def test_raw_pixels_are_the_image() -> None:
    pixels = torch.from_numpy(np.stack(gradient_images(2, 0))).permute(0, 3, 1, 2)
    encoder = open_frozen("raw_pixels", image_size=12, device="cpu", image_mean=[0, 0, 0], image_std=[1, 1, 1])
    made = encoder.encode(pixels, ("cls", "backbone"))
    assert torch.equal(made["backbone"], (pixels / 255).flatten(1))  # once, not as CLS and as mean patch
    assert torch.equal(made["backbone"], made["cls"])
    large = open_frozen("raw_pixels", image_size=64, device="cpu")
    assert large.encode(torch.rand(1, 3, 64, 64), ("cls",))["cls"].shape == (1, 3 * 32 * 32)
    rows, kept = ImageSet(gradient_images(3, 0), progress=False).features(encoder, ("backbone", "patches"))
    assert len(rows) == 3
    assert torch.equal(kept["backbone"], kept["patches"])
    with pytest.raises(ValueError, match="--image_size"):
        open_frozen("raw_pixels")


def test_untrained_is_the_architecture_with_random_weights(saved: Path) -> None:
    state = torch.get_rng_state()
    trained, first, again, other = (
        open_frozen(f"{prefix}{saved}", device="cpu") for prefix in ("", *["untrained:"] * 2, "untrained@1:")
    )
    assert torch.equal(state, torch.get_rng_state())
    assert first.digest() == again.digest()
    assert len({encoder.digest() for encoder in (trained, first, other)}) == 3
    assert (first.image_size, first.image_mean) == (16, [0.1, 0.2, 0.3])
    assert first.name == f"untrained:{saved}"
    assert type(first.module) is type(trained.module)
    assert open_frozen(f"untrained:{saved}", device="cpu", image_size=8).image_size == 8


def test_they_stand_as_rows_of_the_table(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row, pixels in enumerate(gradient_images(40, 0)):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{row}.png")
    words = ["--data", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out"), "--tests", "rotation"]
    words += ["--fill", "circle", "--epochs", "1", "--seeds", "1", "--features", "cls", "backbone"]
    words += ["--encoder", "raw_pixels"]
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "raw_pixels has no image size of its own" in capsys.readouterr().err
    cli.main([*words, "--encoder", f"{saved}/", "--encoder", f"untrained:{saved}/", "--encoder", f"untrained:{saved}"])
    shown = capsys.readouterr().out
    records = [record for record in load_records(tmp_path / "out" / "results.json") if record.metric == "r2"]
    assert [(record.encoder, record.features) for record in records] == [
        ("raw_pixels", "cls"),
        *[(name, features) for name in (str(saved), f"untrained:{saved}") for features in ("cls", "backbone")],
    ]
    assert {record.protocol["image_size"] for record in records} == {16}
    assert "rotation r2 [circle]" in shown
    assert "rotation r2_few_shot [circle]" in shown
    assert "raw_pixels" in (tmp_path / "out" / "results.md").read_text()


def test_features_of_encoders_with_tokens_are_composed_as_before(pixels_12: FrozenEncoder) -> None:
    assert isinstance(pixels_12.module, PixelEncoder)
    made = pixels_12.encode(torch.rand(2, 3, 12, 12), ("cls", "backbone"))
    assert torch.equal(made["backbone"], torch.cat([made["cls"]] * 2, 1))
