"""``accelerate launch training/pretrain.py`` with a shipped recipe, killed without warning and started again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_equissl.data.throughput import LOG_KEYS
from tests.distributed.launching import TIMEOUT, Launch, start
from tests.distributed.test_resume import kill_9
from tests.processes import limit

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
SMALL = ["--training.per_device_train_batch_size", "16", "--training.max_steps", str(STEPS)]
SMALL += ["--training.save_steps", "4", "--training.logging_steps", "2", "--training.warmup_steps", "2"]
SMALL += ["--model.hidden_size", "32", "--model.num_hidden_layers", "2"]
# Epochs of 2 steps: the temperature rises over 4 of them and the prototypes wait for 3, so that every schedule moves on
# both sides of checkpoint-4.
IBOT = ["--training.bf16", "false"]
IBOT += ["--objectives.invariance.teacher_temperature_warmup_epochs", "4", "--training.freeze_last_layer_epochs", "3"]
IBOT += ["--training.epoch_steps", "2", "--training.grad_clipping", "parameter", "--training.max_grad_norm", "3"]
IBOT += ["--objectives.invariance.teacher_temperature", "0.07"]
IBOT += ["--objectives.invariance.num_prototypes", "64", "--objectives.invariance.head_hidden_size", "32"]


def launch(recipe: str, data: Path, output: Path, *extra: str) -> Launch:
    words = ["--recipe", recipe, "--data", str(data), "--output_dir", str(output), *SMALL, *extra]
    return start("single", *words, script=ROOT / "training" / "pretrain.py", log=output.with_suffix(".log"))


@pytest.mark.parametrize(
    ("recipe", "source", "options"),
    [
        pytest.param("cifar10_vicreg_rot", "cifar10", [], id="cifar10"),
        pytest.param("cifar10_vicreg_rot", "photographs", [], id="photographs"),
        pytest.param("cifar10_ibot_rot", "photographs", IBOT, id="ibot"),
    ],
)
def test_kill_9_and_resume_gives_the_unbroken_run(
    recipe: str, source: str, options: list[str], request: pytest.FixtureRequest, photo_folder: Path, tmp_path: Path
) -> None:
    data = request.getfixturevalue("shared_data") / "cifar10" if source == "cifar10" else photo_folder
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = launch(recipe, data, unbroken, *options)
    workers = "--training.dataloader_num_workers"
    kill_9(launch(recipe, data, broken, *options, workers, "1"), broken / "checkpoint-4", broken.with_suffix(".log"))
    assert not (broken / "encoder").exists()
    assert launch(recipe, data, broken, *options, workers, "2").wait(limit(TIMEOUT)) == 0
    assert whole.wait(limit(TIMEOUT)) == 0
    for file in (f"checkpoint-{STEPS}/model.safetensors", "encoder/model.safetensors"):
        left, right = load_file(unbroken / file), load_file(broken / file)
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(value, right[key]), f"{file}: {key}"
    if recipe == "cifar10_ibot_rot":
        check_schedules(load_file(unbroken / f"checkpoint-{STEPS}" / "model.safetensors"), unbroken, broken)


def check_schedules(weights: dict[str, torch.Tensor], *runs: Path) -> None:
    """Equal could mean that nothing moved: teacher, centers and every schedule did, on both sides of the break."""
    student, teacher = (weights[f"{role}.encoder.layer.0.mlp.fc1.weight"] for role in ("student", "teacher"))
    assert not torch.equal(student, teacher)
    assert weights["invariance.cls_center"].abs().max() > 0
    assert weights["invariance.patch_center"].abs().max() > 0
    states = [json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()) for run in runs]
    logs = [[entry for entry in state["log_history"] if "loss" in entry] for state in states]
    logs = [[{key: entry[key] for key in entry.keys() - LOG_KEYS} for entry in log] for log in logs]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0]] == list(range(2, STEPS + 1, 2))
    for name in ("teacher_momentum", "weight_decay"):
        assert len({entry[name] for entry in logs[0]}) == len(logs[0]), name
    temperatures = [entry["ibot/teacher_temperature"] for entry in logs[0]]
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert {"loss_reconstruction", "ibot/loss_patch"} <= logs[0][0].keys()
