"""The sweep command: it runs what is missing, goes on where it was killed, and says which runs failed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModel

from hf_equissl.distributed.signals import EXIT_PREEMPTED, MARKER_FILE
from hf_equissl.training import sweep
from tests.distributed import launching
from tests.processes import start, wait_until

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_STEPS = 60, 5
BASE = f"""
description: A tiny one.
model: {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8, image_size: 16}}
objectives: {{invariance: {{name: vicreg, expander_sizes: [16, 16]}}, equivariance: []}}
views: {{pipeline: {{name: vicreg}}}}
training: {{per_device_train_batch_size: 4, save_steps: {SAVE_STEPS}, save_total_limit: 1, disable_tqdm: true,
           use_cpu: true}}
"""
MANY = f"""
description: Two tiny ones.
sweep:
  - name: "steps-{{max_steps}}"
    extends: base.yaml
    cross: {{training.max_steps: [1, {STEPS}]}}
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "many.yaml").write_text(MANY)
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(images / f"{index}.png")
    return ["--recipe", str(tmp_path / "many.yaml"), "--data", str(images), "--output_dir", str(tmp_path / "runs")]


# Its runs are forks, without accelerate's launcher.
SWEEP = """
from types import SimpleNamespace
from hf_equissl.training import sweep
from tests.process_server import fork
sweep.LAUNCHER, sweep.subprocess = sweep.LAUNCHER[:1], SimpleNamespace(Popen=fork)
sweep.main()
"""


def test_a_killed_sweep_goes_on(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(Popen=launching.popen))
    runs, second = tmp_path / "runs", f"steps-{STEPS}"
    process = start([sys.executable, "-c", SWEEP, *words])
    wait_until(lambda: process.poll() is not None or list(runs.glob(f"{second}/checkpoint-*")), 240.0)
    assert process.poll() is None, "the sweep ended by itself"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (runs / second / "encoder").exists()
    weights = (runs / "steps-1" / "encoder" / "model.safetensors").stat().st_mtime_ns
    capfd.readouterr()

    assert sweep.main([*words, "--", "--num_processes", "1"]) == 0
    said = capfd.readouterr().out
    assert "[1/2] steps-1: finished before, skipped" in said
    assert f"[2/2] {second}: running" in said
    assert f"resuming from {runs / second / 'checkpoint-'}" in said
    assert "all 2 runs are finished" in said
    assert (runs / "steps-1" / "encoder" / "model.safetensors").stat().st_mtime_ns == weights
    assert AutoModel.from_pretrained(runs / second / "encoder").config.hidden_size == 16

    assert sweep.main(words) == 0
    assert "running" not in capfd.readouterr().out


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_marker_of_an_earlier_start_says_nothing_of_this_one(code: int, tmp_path: Path) -> None:
    marker = tmp_path / MARKER_FILE
    marker.write_text("SIGTERM: stopped")
    assert sweep._launch([sys.executable, "-c", f"raise SystemExit({code})"], marker) == code
    stopped = f"import pathlib; pathlib.Path({str(marker)!r}).touch(); raise SystemExit(1)"  # a launcher's code
    assert sweep._launch([sys.executable, "-c", stopped], marker) == EXIT_PREEMPTED


def test_a_signal_is_passed_on_to_the_run(tmp_path: Path) -> None:
    marker = tmp_path / MARKER_FILE
    run = f"""
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: pathlib.Path({str(marker)!r}).touch())
os.kill({os.getpid()}, signal.SIGUSR1)
while not pathlib.Path({str(marker)!r}).exists():
    time.sleep(0.05)
"""
    assert sweep._launch([sys.executable, "-c", run], marker) == EXIT_PREEMPTED


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, which pytest-xdist's workers ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_until_the_launcher_has_ended(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    run = f"import os, pathlib, time; os.kill({os.getpid()}, 2); time.sleep(0.5); pathlib.Path({str(ended)!r}).touch()"
    with pytest.raises(KeyboardInterrupt):
        sweep._launch([sys.executable, "-c", run], tmp_path / MARKER_FILE)
    assert ended.exists()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_launcher_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SECONDS_TO_END", 0.2)
    run = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'id')!r}).write_text(str(os.getpid())); " + (
        f"os.kill({os.getpid()}, 2); time.sleep(60)"
    )
    with pytest.raises(KeyboardInterrupt):
        sweep._launch([sys.executable, "-c", run], tmp_path / MARKER_FILE)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "id").read_text()), 0)


def test_a_run_that_fails_does_not_stop_the_others(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_if_short = f"import sys; sys.exit(0 if 'steps-{STEPS}' in str(sys.argv) else 3)"
    monkeypatch.setattr(sweep, "LAUNCHER", [sys.executable, "-c", fails_if_short])
    assert sweep.main(words) == 1
    out, err = capfd.readouterr()
    assert "[1/2] steps-1: failed with code 3" in out
    assert f"[2/2] steps-{STEPS}: done" in out
    assert "error: 1 of 2 runs failed: steps-1" in err


@pytest.mark.parametrize("content", [b"model: [", b"\xff", b"[1]"])
def test_a_damaged_folder_does_not_stop_the_others(
    words: list[str], content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "LAUNCHER", [sys.executable, "-c", ""])
    folder = tmp_path / "runs" / "steps-1"
    (folder / "encoder").mkdir(parents=True)
    (folder / "encoder" / "config.json").write_text("{}")
    (folder / "recipe.yaml").write_bytes(content)
    assert sweep.main(words) == 1
    out, err = capfd.readouterr()
    assert f"[1/2] steps-1: failed: {folder} holds a run whose recipe.yaml cannot be read (" in out
    assert f"[2/2] steps-{STEPS}: done" in out
    assert "error: 1 of 2 runs failed: steps-1" in err


def test_a_dry_run_without_a_folder_writes_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.chdir(empty)
    at = words.index("--output_dir")
    assert sweep.main([*words[:at], *words[at + 2 :], "--dry_run", "--only", "steps-1"]) == 0
    assert not list(empty.iterdir())


def test_list_and_dry_run(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*words, "--list"]) == 0
    listed = capfd.readouterr().out
    assert f"steps-{STEPS}\n    --recipe base\n    --training.max_steps {STEPS}\n2 runs" in listed
    assert sweep.main([*words, "--dry_run", "--only", "steps-1", "--training.weight_decay", "0"]) == 0
    report = capfd.readouterr().out
    assert "[1/1] steps-1" in report
    assert "weight_decay: 0" in report
    assert "GFLOP/image" in report
    assert not list(tmp_path.glob("runs/*/checkpoint-*"))
    assert sweep.main([*words, "--dry_run"]) == 0
    first, second, end = capfd.readouterr().out.splitlines()
    assert first.startswith("steps-1   batch 4, learning rate ")
    assert ", 1 steps, " in first
    assert f", {STEPS} steps, " in second
    assert end.startswith("2 runs, times at 40 % of an A100's peak")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "steps-2"], "--only steps-2: no run of this name. Did you mean 'steps-1'"),
        (["--training.max_steps", "3"], "--training.max_steps would replace what steps-1 sets: 1"),
        (["--training.max_step", "3"], "steps-1: training: unknown key 'max_step'. Did you mean 'max_steps'"),
        (["--data.source", "x"], "give one of them"),
        (["--onyl", "x"], "Did you mean --only"),
    ],
)
def test_mistakes(words: list[str], more: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*words, *more]) == 2
    assert message in capfd.readouterr().err


def test_what_is_missing(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(words[:4]) == 2
    assert "--output_dir is missing" in capfd.readouterr().err
    assert sweep.main(words[2:]) == 2
    assert "--recipe is missing" in capfd.readouterr().err
    assert sweep.main(["--recipe", "vits16_ibot_swep", "--list"]) == 2
    assert "Did you mean 'vits16_ibot_sweep'" in capfd.readouterr().err
