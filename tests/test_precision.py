"""On a device without units for bf16 nothing that ships asks for bf16: recipes, protocols, commands, the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_equissl.encoders.frozen import FrozenEncoder
from hf_equissl.evaluation import build_evaluator
from hf_equissl.evaluation import cli as probe_cli
from hf_equissl.evaluation.data import EvaluationData
from hf_equissl.evaluation.images import ImageSet
from hf_equissl.evaluation.protocols import PROTOCOLS
from hf_equissl.extraction.settings import ExtractionSettings
from hf_equissl.finetuning import cli as finetune_cli
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.run_record import RunRecord
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.recipes.sweep import is_sweep
from hf_equissl.running.resume import is_finished
from hf_equissl.running.run import prepare, pretrain
from hf_equissl.utils import devices
from hf_equissl.utils.options import read_options
from hf_equissl.utils.strict_yaml import load_yaml
from hf_equissl.utils.suggestions import RecipeError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for path in (ROOT / "training" / "recipes").glob("*.yaml"))
WORDS_THAT_ASK = r"--precision bf16|--bf16(?! false)|--training\.bf16 true|--dtype bf16"
TINY = """
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8, image_size: 32,
        feature_size: 32, equivariant_size: 16}
objectives: {invariance: {name: vicreg, expander_sizes: [32, 32]}}
views: {pipeline: {name: vicreg}}
training: {max_steps: 2, per_device_train_batch_size: 8, use_cpu: true, bf16: auto, report_to: none}
"""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_no_recipe_asks_for_it(path: Path, without_bf16: None, tmp_path: Path) -> None:
    if is_sweep(path):
        assert "bf16" not in path.read_text()
        return
    args = Recipe.load(path, {"training.use_cpu": True}).build_training_arguments(tmp_path)
    assert args.bf16 is False
    assert args.precision == "fp32"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_no_protocol_asks_for_it(name: str, without_bf16: None) -> None:
    class Flat(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values.flatten(1)

    encoder = FrozenEncoder(Flat(), image_size=8, precision="auto")
    data = EvaluationData(*(ImageSet([0], dataset="x", split=split) for split in ("train", "test")))
    evaluator = build_evaluator("transformation_regression", data, protocol=name)
    protocol = evaluator.protocol(encoder, "rotation")
    assert (protocol["encoder_precision"], protocol["probe_precision"]) == ("fp32", "fp32")


def test_no_default_asks_for_it(without_bf16: None, tmp_path: Path) -> None:
    words = ["--encoder", "x", "--data", "x", "--output_dir", "x"]
    read = read_options(probe_cli.build_parser().parse_args(words), probe_cli.ENCODER_OPTIONS)
    assert read["precision"] == "auto"
    assert finetune_cli.read_arguments([])["bf16"] == "auto"
    assert ExtractionSettings("x", "x", "x").precision == "fp32"
    assert EquiSSLTrainingArguments(str(tmp_path), use_cpu=True).precision == "fp32"


@pytest.mark.parametrize("name", ["README.md", "training/quickstart.py", "training/side_by_side.py", "Makefile"])
def test_no_command_that_people_copy_asks_for_it(name: str) -> None:
    assert re.findall(WORDS_THAT_ASK, (ROOT / name).read_text(), re.MULTILINE) == []


def test_auto_is_bf16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "bf16_units", lambda device: ("units",))
    build: Any = EquiSSLTrainingArguments
    assert build(str(tmp_path), use_cpu=True, bf16="auto").bf16 is True
    with pytest.raises(ValueError, match="bf16 must be true, false or auto, got 'yes'"):
        build(str(tmp_path), use_cpu=True, bf16="yes")


def recipe(photo_folder: Path, tmp_path: Path, **training: Any) -> Recipe:
    (tmp_path / "tiny.yaml").write_text(TINY)
    overrides = {f"training.{key}": value for key, value in training.items()}
    return Recipe.load(tmp_path / "tiny.yaml", {"data.source": str(photo_folder), **overrides})


def test_a_run_keeps_the_precision_in_which_it_began(
    photo_folder: Path, tmp_path: Path, without_bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "product_speed", lambda device, dtype: 0.8 if dtype == torch.bfloat16 else 53.0)
    output = tmp_path / "run"
    run = prepare(recipe(photo_folder, tmp_path, bf16=True), output)
    assert "0.8 GFLOP/s in bf16 and at 53 in fp32" in run.notes[1]
    pretrain(run)
    # As if a device with bf16 had begun, and this one went on.
    auto = recipe(photo_folder, tmp_path)
    assert is_finished(auto, output)
    longer = prepare(recipe(photo_folder, tmp_path, max_steps=3), output)
    assert longer.checkpoint is not None
    assert longer.args.bf16 is True
    assert "precision bf16" in longer.notes[0]
    assert "the run began in it" in longer.notes[0]
    pretrain(longer)
    assert load_yaml((output / "recipe.yaml").read_text(), "recipe")["training"]["bf16"] is True
    assert RunRecord.load(output).precision == "bf16"
    with pytest.raises(RecipeError, match=r"holds a run with training.bf16 = True, and this recipe says False"):
        prepare(recipe(photo_folder, tmp_path, max_steps=4, bf16=False), output)


def test_what_is_stored_says_what_ran(photo_folder: Path, tmp_path: Path, without_bf16: None) -> None:
    output = tmp_path / "run"
    run = prepare(recipe(photo_folder, tmp_path), output)
    assert run.notes[0].startswith("precision fp32 on ")
    pretrain(run)
    assert load_yaml((output / "recipe.yaml").read_text(), "recipe")["training"]["bf16"] is False
    record = RunRecord.load(output)
    assert (record.precision, record.hardware["cpu"]) == ("fp32", devices.describe_cpu())
    assert is_finished(recipe(photo_folder, tmp_path), output)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="plans are for the accelerator that is there")
def test_a_plan_without_an_accelerator_is_for_gpus_with_bf16(without_bf16: None, tmp_path: Path) -> None:
    path = ROOT / "training" / "recipes" / "cifar10_vicreg.yaml"
    assert prepare(Recipe.load(path), None, dry=True).args.precision == "bf16"
    assert prepare(Recipe.load(path, {"training.use_cpu": True}), None, dry=True).args.precision == "fp32"
