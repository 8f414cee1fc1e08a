"""A disk that is full when a checkpoint is saved: a small tmpfs, on one and on two processes."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_equissl.checkpoints import newest_checkpoint
from tests.distributed.launching import ROOT, run

SCRIPT = ROOT / "tests" / "running" / "full_disk.py"
SMALL = [
    "--recipe", "cifar10_ibot_rot", "--model.hidden_size", "32", "--model.num_hidden_layers", "2",
    "--objectives.invariance.num_prototypes", "64", "--objectives.invariance.head_hidden_size", "32",
    "--training.bf16", "false", "--training.max_steps", "6", "--training.save_steps", "2",
    "--training.logging_steps", "1", "--training.warmup_steps", "1", "--monitor.every_steps", "null",
    "--training.freeze_last_layer_by", "learning_rate", "--training.save_total_limit", "2",
]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here to make a small disk with")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_a_full_disk_stops_all_processes_and_loses_nothing(engine: str, photo_folder: Path, small_disk: Path) -> None:
    output = small_disk / "run"
    batch = "8" if engine == "single" else "4"
    words = ["--data", str(photo_folder), "--output_dir", str(output), *SMALL]
    words += ["--training.per_device_train_batch_size", batch]
    # Full in the middle of the first save; before the second, when the size is known; when the encoder is written; then
    # there is room again.
    fills = [[1, 300_000], [3, 300_000], ["end", 20_000], None]
    result = run(engine, json.dumps(words), json.dumps(fills), script=SCRIPT)
    assert result.returncode == 0, result.stderr[-4000:]
    codes = [[1], [1], [1], [0]] if engine == "single" else [[1, 1], [1, 1], [1, 1], [0, 0]]
    ends = re.findall(r"^codes (\[.*?\]) left (\[.*?\])", result.stdout, re.MULTILINE)
    assert [json.loads(code) for code, _ in ends] == codes
    left = [json.loads(folders.replace("'", '"')) for _, folders in ends]
    end = ["checkpoint-4", "checkpoint-6"]
    assert left == [[], ["checkpoint-2"], end, [*end, "encoder"]]
    errors = re.findall(r"error: The checkpoint.*", result.stderr)
    assert len(errors) == 2, result.stderr[-4000:]  # one for all processes
    assert "The checkpoint of step 2 cannot be written" in errors[0]
    assert f"in {output}: " in errors[0]
    assert "are free). There is no earlier checkpoint" in errors[0]
    expected = (
        r"step 4 cannot be written in .*: it needs about \d\.\d MiB, \d\.\d MiB more than there are \(.* are free\)"
    )
    assert re.search(expected, errors[1]), errors[1]
    assert f"The last complete checkpoint is {output / 'checkpoint-2'}." in errors[1]
    exports = re.findall(r"error: The run is trained.*", result.stderr)
    assert len(exports) == 1, result.stderr[-4000:]
    assert f"its encoder cannot be written in {output / 'encoder'}: " in exports[0]
    assert f"The last complete checkpoint is {output / 'checkpoint-6'}: make room" in exports[0]
    assert "Traceback" not in result.stderr
    assert f"resuming from {output / 'checkpoint-2'}" in result.stdout
    assert newest_checkpoint(output) == str(output / "checkpoint-6")
