"""The whole command on two processes (DDP over gloo): exact resume inside an epoch, an error when a loss breaks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import launching

ROOT = Path(__file__).resolve().parents[2]
# 32 images in batches of 2 x 4: four steps an epoch, so checkpoint-5 lies inside the second.
SMALL = ["--training.per_device_train_batch_size", "4", "--training.max_steps", "7", "--training.save_steps", "5"]
SMALL += ["--training.logging_steps", "1", "--training.warmup_steps", "1"]
VICREG, IBOT = "cifar10_vicreg_rot", "cifar10_ibot_rot"
SMALL += ["--model.hidden_size", "32", "--model.num_hidden_layers", "2"]
RECIPES = {VICREG: [], IBOT: ["--training.bf16", "false"]}


def run(photos: Path, output: Path, *extra: str, recipe: str = VICREG) -> subprocess.CompletedProcess[str]:
    words = ["--recipe", recipe, "--data", str(photos), "--output_dir", str(output), *SMALL, *RECIPES[recipe], *extra]
    return launching.run("ddp", *words, script=ROOT / "training" / "pretrain.py")


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_on_two_processes_is_exact(recipe: str, photo_folder: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first = run(photo_folder, whole, recipe=recipe)
    assert first.returncode == 0, first.stderr
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")
    second = run(photo_folder, resumed, recipe=recipe)
    assert second.returncode == 0, second.stderr
    left, right = (load_file(folder / "checkpoint-7" / "model.safetensors") for folder in (whole, resumed))
    for key, value in left.items():
        assert torch.equal(value, right[key]), key
    assert (resumed / "encoder" / "model.safetensors").is_file()


def test_a_broken_loss_stops_both_processes(photo_folder: Path, tmp_path: Path) -> None:
    result = run(photo_folder, tmp_path / "run", "--training.learning_rate", "1e25")
    assert result.returncode != 0
    assert "error: The loss is not finite at step" in result.stderr or "error: The weight" in result.stderr
    assert "Traceback" not in result.stderr.split("error: The")[0]
