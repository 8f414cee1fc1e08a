"""Runs on two processes that are killed without warning, also while they write a checkpoint, and started again."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_equissl.checkpoints import MODEL_SHARDS, Manifest, list_checkpoints, newest_checkpoint, read_checkpoint_weights
from tests.processes import limit

from .launching import ENGINES, ROOT, TIMEOUT, Launch, needs_deepspeed, run, start

STEPS = 6
SHARDED = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")
# Batches of 8, 4 an epoch, a checkpoint every 2 steps: some lie inside an epoch. Drop path draws random numbers.
SMALL = [
    "--recipe", "cifar10_ibot_rot", "--model.hidden_size", "32", "--model.num_hidden_layers", "2",
    "--model.drop_path_rate", "0.2", "--objectives.invariance.num_prototypes", "64",
    "--objectives.invariance.head_hidden_size", "32", "--training.bf16", "false",
    "--training.per_device_train_batch_size", "4", "--training.max_steps", str(STEPS), "--training.save_steps", "2",
    "--training.logging_steps", "1", "--training.warmup_steps", "1", "--training.freeze_last_layer_by",
    "learning_rate", "--monitor.every_steps", "null",
]  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "launcher", "moment", "tolerance"),
    [
        pytest.param("ddp", (), ".saving/checkpoint-4", 0.0, id="ddp"),
        pytest.param("fsdp2", (), ".saving/checkpoint-4", 1e-6, id="fsdp2-full"),
        pytest.param("fsdp2", SHARDED, ".saving/checkpoint-4/model_shards", 1e-6, id="fsdp2-sharded"),
        pytest.param("zero1", (), "checkpoint-4", 1e-6, id="zero1"),
        pytest.param("zero2", (), ".saving/checkpoint-4", 1e-6, id="zero2"),
        pytest.param("zero3", (), ".saving/checkpoint-4/global_step4", 1e-6, id="zero3"),
    ],
)
def test_kill_9_and_the_same_command_give_the_unbroken_run(
    engine: str, launcher: tuple[str, ...], moment: str, tolerance: float, photo_folder: Path, tmp_path: Path
) -> None:
    if engine.startswith("zero"):
        needs_deepspeed()
    broken, unbroken, other = (tmp_path / name for name in ("broken", "unbroken", "other"))
    words = ["--data", str(photo_folder), *SMALL]
    keep_all, keep_two = ["--training.save_total_limit", "9"], ["--training.save_total_limit", "2"]
    process = start(
        engine, *words, *keep_all, "--output_dir", str(broken), log=tmp_path / "killed.log", launcher=launcher
    )
    kill_9(process, broken / moment, tmp_path / "killed.log")
    left = newest_checkpoint(broken)
    assert left is not None
    assert Manifest.read(left).engine == engine
    assert not (broken / "encoder").exists()
    before = {path.name: _content(path) for path in list_checkpoints(broken)}

    runs = [
        [*words, *keep_all, "--output_dir", str(broken)],
        [*words, *keep_two, "--output_dir", str(unbroken)],
        [*words, *keep_all, "--output_dir", str(other)],
    ]
    if launcher == SHARDED:  # what one engine wrote goes on under another
        shutil.copytree(broken / "checkpoint-2", other / "checkpoint-2")
        shutil.copy(broken / "recipe.yaml", other)
    several = ROOT / "tests" / "distributed" / "several.py"
    result = run(engine, json.dumps(runs[:2]), script=several, launcher=launcher)
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"resuming from {left}" in result.stdout
    for name, content in before.items():  # nothing that was saved is lost or written again
        assert _content(broken / name) == content, name
    assert [path.name for path in list_checkpoints(broken)] == [f"checkpoint-{step}" for step in (2, 4, 6)]
    assert [path.name for path in list_checkpoints(unbroken)] == ["checkpoint-4", "checkpoint-6"]
    assert not list(tmp_path.glob("*/.saving"))
    assert json.loads((broken / "facts.json").read_text())["wrapped"] == ENGINES[engine][1]
    _check_equal(unbroken, broken, tolerance)
    assert (broken / f"checkpoint-{STEPS}" / MODEL_SHARDS).is_dir() == (launcher == SHARDED)
    if launcher == SHARDED:
        result = run("ddp", *runs[2])
        assert result.returncode == 0, result.stderr[-4000:]
        assert "was written by fsdp2 on 2 processes; this launch goes on as ddp on 2 processes" in result.stdout
        # Adam makes steps of full length from the rounding of gradients that are zero: those of the keys' biases.
        _check_equal(unbroken, other, 1e-6, weights=1e-4)


def _check_equal(unbroken: Path, resumed: Path, tolerance: float, weights: float | None = None) -> None:
    """Logged losses, all weights of the last checkpoint, and the exported encoder."""
    curves = [_losses(folder / f"checkpoint-{STEPS}") for folder in (unbroken, resumed)]
    assert sorted(curves[0]) == list(range(1, STEPS + 1))
    assert curves[1] == pytest.approx(curves[0], rel=tolerance, abs=0.0)
    states = [read_checkpoint_weights(folder / f"checkpoint-{STEPS}") for folder in (unbroken, resumed)]
    weights = tolerance if weights is None else weights
    states[0] |= load_file(unbroken / "encoder" / "model.safetensors")
    states[1] |= load_file(resumed / "encoder" / "model.safetensors")
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=weights, atol=weights, msg=lambda text: name + text)  # noqa: B023


def _losses(checkpoint: Path) -> dict[int, float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_9(process: Launch, moment: Path, log: Path) -> None:
    """SIGKILL to all processes of a run, as soon as ``moment`` exists."""
    end = time.monotonic() + limit(TIMEOUT)
    while not moment.exists():
        assert process.poll() is None, f"the run ended before it could be killed\n{log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"no {moment} after {TIMEOUT} s"
        time.sleep(0.002)
    process.kill()
    process.wait()
