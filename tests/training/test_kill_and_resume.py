"""``accelerate launch training/pretrain.py`` with a shipped recipe, killed without warning and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
SMALL = ["--training.per_device_train_batch_size", "16", "--training.max_steps", str(STEPS)]
SMALL += ["--training.save_steps", "4", "--training.logging_steps", "2", "--training.warmup_steps", "2"]


def launch(data: Path, output: Path, *extra: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["training/pretrain.py", "--recipe", "cifar10_vicreg_rot", "--data", str(data)]
    command += ["--output_dir", str(output), *SMALL, *extra]
    log = output.with_suffix(".log").open("ab")
    # A session of its own, so that the launcher and its child die together.
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def kill_at(process: subprocess.Popen[bytes], checkpoint: Path, timeout: float = 240) -> None:
    """SIGKILL as soon as ``checkpoint`` appears: the run is then somewhere in the steps behind it."""
    end = time.monotonic() + timeout
    while not checkpoint.is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, f"no {checkpoint.name} after {timeout} s"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("source", ["cifar10", "photographs"])
def test_kill_9_and_resume_gives_the_unbroken_run(
    source: str, request: pytest.FixtureRequest, photo_folder: Path, tmp_path: Path
) -> None:
    data = request.getfixturevalue("shared_data") / "cifar10" if source == "cifar10" else photo_folder
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = launch(data, unbroken)
    kill_at(launch(data, broken, "--training.dataloader_num_workers", "1"), broken / "checkpoint-4")
    assert not (broken / "encoder").exists()
    assert launch(data, broken, "--training.dataloader_num_workers", "2").wait(timeout=240) == 0
    assert whole.wait(timeout=240) == 0
    for file in (f"checkpoint-{STEPS}/model.safetensors", "encoder/model.safetensors"):
        left, right = load_file(unbroken / file), load_file(broken / file)
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(value, right[key]), f"{file}: {key}"
