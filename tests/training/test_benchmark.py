"""The benchmark measures what it says: equal steps but for the reconstruction, equal crops but for the loader."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_equissl.benchmarking import loader
from hf_equissl.benchmarking.overhead import (
    BASE,
    EQUIVARIANCE,
    EQUIVARIANCE_BACKWARD,
    FULL,
    PARTS,
    SIDES,
    TEACHER,
    UPDATE,
    both_recipes,
    build_sides,
    peak_memory,
    synthetic_images,
)
from hf_equissl.benchmarking.timing import take_turns
from hf_equissl.data import ImageViewDataset
from hf_equissl.data.jpeg import name_decoder
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.training import benchmark
from hf_equissl.views.cropping import resize_box

TINY = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, image_size: 32,
        feature_size: 32, equivariant_size: 16}
objectives:
  invariance: {name: vicreg, expander_sizes: [32, 32]}
  equivariance: [{name: reconstruction, weight: 0.5, decoder_widths: [8, 8, 8]}]
views: {pipeline: {name: vicreg}, transformation: {name: rotation}}
"""
IBOT = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, image_size: 32,
        feature_size: 32, equivariant_size: 16}
objectives:
  invariance: {name: ibot, num_prototypes: 16, head_hidden_size: 32, bottleneck_size: 8}
  equivariance: [{name: reconstruction, weight: 0.5, decoder_widths: [8, 8, 8]}]
views:
  pipeline: {name: ibot, local: {count: 2, size: 16, crop_scale: [0.1, 0.35]}, masks: {min_patches: 1}}
  transformation: {name: rotation}
training: {grad_clipping: parameter, max_grad_norm: 3.0, layer_decay: 0.9, teacher_momentum: 0.9}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


def test_report(path: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", str(path), "--data", str(photo_folder), "--output_dir", str(tmp_path / "out")]
    words += ["--batch_size", "4", "--repeats", "2", "--loader_images", "8", "--device", "cpu"]
    words += ["--dtype", "fp32", "bf16"]
    assert benchmark.main(words) == 0
    printed = capsys.readouterr().out
    for text in (*PARTS, *SIDES, "fp32, ms", "bf16, ms", "aim: at most half, +7.35 %", "against plain", "threads: 1"):
        assert text in printed

    text = (tmp_path / "out" / "benchmark.json").read_text()
    assert str(tmp_path) not in text
    assert str(photo_folder.parent) not in text
    report = json.loads(text)
    assert report["recipe"] == "tiny"
    assert {"torch", "transformers", "hf_equissl", "cpu", "threads", "commit"} <= report["environment"].keys()
    assert report["settings"]["batch_size"] == 4
    for dtype in ("fp32", "bf16"):
        check_timing(report["steps"][dtype], repeats=2)
    check_loader(report["loader"], images=8, repeats=2)


def check_loader(timing: dict[str, Any], images: int, repeats: int) -> None:
    assert timing["images"] == images
    assert timing["decoder"] == name_decoder()
    assert set(timing["parts"]) == {*loader.PARTS, *loader.PLAIN_PARTS}
    assert all(timing["parts"][name] > 0 for name in (loader.READ, loader.DECODE, loader.RESIZE, loader.COLLATE))
    loaders = [loader.LOADER] + [loader.LOADER_PILLOW] * timing["decoder"].startswith("simplejpeg")
    for prefix in ("", "cpu_"):
        assert all(timing[f"{prefix}rates"][name] > 0 for name in (*loaders, loader.PLAIN))
        assert [len(ratios) for ratios in timing[f"{prefix}ratios"].values()] == [repeats] * len(loaders)


def test_the_loader_alone(tmp_path: Path, photo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a recipe with local crops and without an equivariance objective; of JPEG files, whose decoder is named."""
    file, photos = tmp_path / "ibot.yaml", tmp_path / "photos"
    file.write_text(IBOT)
    photos.mkdir()
    for path in sorted(photo_folder.iterdir())[:6]:
        Image.open(path).save(photos / f"{path.stem}.jpg")
    words = ["--recipe", str(file), "--loader_only", "--loader_images", "4", "--repeats", "3", "--batch_size", "3"]
    words += ["--objectives.equivariance", "[]", "--views.transformation", "null"]
    assert benchmark.main([*words, "--data", str(photos), "--output_dir", str(tmp_path / "out")]) == 0
    assert f"4 images; {name_decoder()}" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    check_loader(report["loader"], images=4, repeats=3)
    assert report["settings"]["images"] == "photos"
    assert benchmark.main(words) == 2
    assert "name them with --data" in capsys.readouterr().err


def check_timing(timing: dict[str, Any], repeats: int) -> None:
    assert len(timing["ratios"]) == len(timing["cpu_ratios"]) == repeats
    assert timing["overhead"] == pytest.approx(np.median(timing["ratios"]) - 1)
    for name in SIDES:
        side = timing["sides"][name]
        assert 0 < side["wall_min"] <= side["wall"]
        assert set(side["parts"]) == {*PARTS, EQUIVARIANCE_BACKWARD}
    assert timing["sides"][BASE]["parts"][EQUIVARIANCE] == timing["sides"][BASE]["parts"][EQUIVARIANCE_BACKWARD] == 0
    assert timing["sides"][FULL]["parts"][EQUIVARIANCE] > 0
    assert timing["sides"][FULL]["parts"][EQUIVARIANCE_BACKWARD] > 0
    assert {"cpu_overhead", "parts_overhead", "parts_cpu_overhead"} <= timing.keys()


def test_the_steps_differ_in_the_reconstruction_alone(path: Path) -> None:
    sides = build_sides(both_recipes(Recipe.load(path)), 4, torch.device("cpu"), synthetic_images(3, 32))
    base, full = sides[BASE], sides[FULL]
    assert len(base.model.equivariance) == 0
    assert len(full.model.equivariance) == 1
    assert all(torch.equal(base.batch[key], full.batch[key]) for key in ("global_crops", "draws"))
    ours, theirs = full.views(), base.views()
    torch.testing.assert_close(ours.global_crops, theirs.global_crops)
    assert ours.intermediate_images.shape == (4, 2, 3, 32, 32)
    assert theirs.intermediate_images is None
    before = {name: parameter.detach().clone() for name, parameter in full.model.named_parameters()}
    run = full.step("fp32")
    trained = {name for name, parameter in full.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("decoder" in name for name in trained)
    assert any("encoder.layer.1" in name for name in trained)
    assert sum(run["parts"].values()) == pytest.approx(run["wall"])  # nothing of the step is left out


def test_a_step_with_a_teacher(tmp_path: Path) -> None:
    """Its pass and its update belong to the step: on masked crops and local ones, as the Trainer has them."""
    file = tmp_path / "ibot.yaml"
    file.write_text(IBOT)
    sides = build_sides(both_recipes(Recipe.load(file)), 4, torch.device("cpu"), synthetic_images(3, 32))
    for side in sides.values():
        assert {"masks", "mask_indices", "local_crops"} <= side.batch.keys()
        assert {group["lr_multiplier"] for group in side.optimizer.param_groups} == {1.0, 0.9, 0.9**2, 0.9**3}
        before = side.model.teacher.layernorm.bias.clone()
        run = side.step("fp32")
        after, student = side.model.teacher.layernorm.bias, side.model.student.layernorm.bias
        torch.testing.assert_close(after, 0.9 * before + 0.1 * student.detach())
        assert not torch.equal(after, before)
        assert run["parts"][TEACHER] > 0
        assert run["parts"][UPDATE] > 0
        assert sum(run["parts"].values()) == pytest.approx(run["wall"])
    assert sides[FULL].equivariance_alone("fp32")["parts"][EQUIVARIANCE_BACKWARD] > 0


def test_another_recipe_as_the_base(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plain method, without stem and without g."""
    plain = tmp_path / "plain.yaml"
    values = "model: {feature_size: null, equivariant_size: null}\nobjectives: {equivariance: []}\n"
    plain.write_text(f"extends: {path}\n{values}views: {{transformation: null}}\n")
    words = ["--recipe", str(path), "--base", str(plain), "--batch_size", "2", "--repeats", "1", "--dtype", "fp32"]
    assert benchmark.main([*words, "--output_dir", str(tmp_path)]) == 0
    assert "against plain" in capsys.readouterr().out
    assert json.loads((tmp_path / "benchmark.json").read_text())["base"] == "plain"


def test_the_systems_of_a_sweep(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One member of each, against itself with lambda = 0; labels are there where they are needed."""
    (tmp_path / "many.yaml").write_text("""
sweep:
  - {name: "rot_seed-{seed}", extends: tiny.yaml, cross: {training.seed: [0, 1]}}
  - name: "plain_seed-{seed}"
    extends: tiny.yaml
    set: {objectives.equivariance: []}
    cross: {training.seed: [0]}
  - {name: "{name}", extends: tiny.yaml, cross: {objectives.invariance.name: [supervised]}}
""")
    words = ["--recipe", str(tmp_path / "many.yaml"), "--repeats", "2", "--dtype", "fp32", "--device", "cpu"]
    words += ["--output_dir", str(tmp_path)]
    assert benchmark.main([*words, "--training.per_device_train_batch_size", "4"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"rot +4 +[\d.]+ +[\d.]+ +[+-][\d.]+%", printed)
    assert re.search(r"plain +4 +[\d.]+ +[\d.]+ +a base", printed)
    systems = json.loads((tmp_path / "benchmark.json").read_text())["systems"]
    assert list(systems) == ["rot", "plain", "supervised"]
    for name in ("rot", "supervised"):
        timing = systems[name]
        assert len(timing["ratios"]) == 2
        assert timing["cpu_overhead"] == pytest.approx(np.median(timing["cpu_ratios"]) - 1)
        assert timing["wall"] > 0
    assert "ratios" not in systems["plain"]

    assert benchmark.main([*words, "--only", "plian"]) == 2
    assert "--only: there is no 'plian'. Did you mean 'plain'" in capsys.readouterr().err
    assert benchmark.main([*words, "--base", "tiny"]) == 2
    assert "--base is for one recipe, and many is a sweep" in capsys.readouterr().err
    assert benchmark.main(["--recipe", str(path), "--only", "rot"]) == 2
    assert "--only chooses systems of a sweep" in capsys.readouterr().err


def test_the_plain_loop_cuts_the_same_crops(tmp_path: Path, photo_folder: Path) -> None:
    file = tmp_path / "ibot.yaml"
    file.write_text(IBOT)
    recipe = Recipe.load(file, {"data.source": str(photo_folder)})
    dataset = ImageViewDataset(recipe.build_source(), recipe.build_pipeline(loader.find_needs(recipe)), seed=3)
    keys, plain = loader.plain_crops(dataset, 4)
    assert keys == [(0, index) for index in range(4)]
    for key, (content, crops) in zip(keys, plain, strict=True):
        pixels, expected = np.array(Image.open(BytesIO(content)).convert("RGB")), []
        for size, interpolation, box in crops:
            expected.append(np.empty((size, size, 3), dtype=np.uint8))
            resize_box(pixels, box, interpolation, expected[-1])
        sample = dataset[key]
        found = [crop for name in ("global_crops", "local_crops") for crop in sample[name].permute(0, 2, 3, 1).numpy()]
        assert len(found) == len(expected) > 2
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_take_turns_alternates_and_drops_the_first_round() -> None:
    calls: list[str] = []
    results = take_turns({name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}, repeats=3)
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert results == {"a": [3, 6, 7], "b": [4, 5, 8]}


def test_how_well_steps_use_the_device(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Operations are those that the plan counts on tensors without storage; a base has no overhead."""
    (tmp_path / "ibot.yaml").write_text(IBOT)
    (tmp_path / "both.yaml").write_text("""
sweep:
  - {name: "ibot_{seed}", extends: ibot.yaml, cross: {training.seed: [0]}}
  - {name: "plain_{seed}", extends: tiny.yaml, set: {objectives.equivariance: []}, cross: {training.seed: [0]}}
""")
    words = ["--utilisation", "--repeats", "1", "--dtype", "fp32", "--device", "cpu", "--batch_size", "4"]
    words += ["--modes", "eager", "--device_tflops", "1e-3", "--output_dir", str(tmp_path)]
    assert benchmark.main(["--recipe", str(tmp_path / "both.yaml"), *words]) == 0
    printed = capsys.readouterr().out
    assert "peak: 0.001 TFLOP/s (as given)" in printed
    assert re.search(r"ibot +eager +4 +[\d.]+ +[\d.]+ +[\d.]+ +[+-][\d.]+% +[\d.e-]+ +[\d.]+%", printed)
    [ibot], [plain] = json.loads((tmp_path / "benchmark.json").read_text())["systems"].values()
    assert plain["overhead"] is None
    assert (ibot["memory"], ibot["waits"]) == (None, None)  # a CPU has no counters of these
    for measured, file in ((ibot, "ibot.yaml"), (plain, "tiny.yaml")):
        overrides = {"objectives.equivariance": []} if file == "tiny.yaml" else {}
        recipe = Recipe.load(tmp_path / file, {"training.per_device_train_batch_size": 4, **overrides})
        assert measured["flops"] / 4 == pytest.approx(prepare(recipe, None, dry=True).cost().flops, rel=0.1)

    for more, said in (
        (["--memory"], "--memory does not go with --utilisation"),
        (["--device_tflops", "0"], "--device_tflops 0: expected a number above 0"),
    ):
        assert benchmark.main(["--recipe", str(path), *words, *more]) == 2
        assert said in capsys.readouterr().err
    assert benchmark.main(["--recipe", str(path), "--modes", "eager"]) == 2
    assert "--modes is read with --utilisation alone" in capsys.readouterr().err


def test_mistakes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*words: str) -> str:
        assert benchmark.main(words) == 2
        return capsys.readouterr().err

    recipe = ("--recipe", str(path))
    assert "nothing to compare" in message(*recipe, "--objectives.equivariance", "[]")
    assert "nothing to compare" in message(*recipe, "--objectives.equivariance.0.weight", "0")
    assert "'dino' is not loaded here" in message(*recipe, "--model.init_from", "dino")
    assert "expected at least 1" in message(*recipe, "--repeats", "0")
    assert "Did you mean --batch_size" in message(*recipe, "--batch_siz", "4")
    assert "not a device" in message(*recipe, "--device", "abacus")
    assert "'vits16_vicreg_rot'" in message("--recipe", "vits16_vicreg_rto")


@pytest.mark.slow
def test_peak_memory_on_cpu(path: Path) -> None:
    """In new interpreters, which take seconds each: of one recipe, with a teacher and the most kinds of crops."""
    path.write_text(IBOT)
    recipe = Recipe.load(path)
    sides = build_sides(both_recipes(recipe), 64, torch.device("cpu"), synthetic_images(2, 32))
    memory = peak_memory(both_recipes(recipe), sides, "fp32")
    if isinstance(memory, str):
        pytest.skip(memory)
    assert memory[FULL] > memory[BASE] > 0
