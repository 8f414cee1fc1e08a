"""Weak scaling is measured on processes, each engine is what it is called, and the shares say what they mean."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.distributed import TCPStore

from hf_equissl.benchmarking import scaling as benchmarking_scaling
from hf_equissl.benchmarking.scaling import Launcher, MeasurementError, Setup, settings, setups, summarize, write_images
from hf_equissl.benchmarking.step_clock import STEP, TASK, Steps, Task, collective_share, measure
from hf_equissl.distributed.engines import Engine
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.training import scaling
from hf_equissl.training.side_by_side import ENVIRONMENT
from hf_equissl.utils.suggestions import RecipeError
from tests.distributed import launching

TINY = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, image_size: 32,
        feature_size: 32, equivariant_size: 16}
objectives:
  invariance: {name: vicreg, expander_sizes: [32, 32]}
  equivariance: [{name: reconstruction, weight: 0.5, decoder_widths: [8, 8, 8]}]
views: {pipeline: {name: vicreg}, transformation: {name: rotation}}
"""
CPU_ONLY = pytest.mark.skipif(torch.accelerator.is_available(), reason="what happens where there are only CPUs")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    return file


@CPU_ONLY
def test_one_and_two_processes(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = SimpleNamespace(Popen=launching.popen, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(benchmarking_scaling, "subprocess", forked)
    words = ["--recipe", str(path), "--engines", "ddp", "--processes", "1", "2", "--batch_size", "4"]
    words += ["--steps", "3", "--warmup", "1", "--profiled", "2", "--repeats", "1", "--output_dir", str(tmp_path / "o")]
    assert scaling.main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    for text in ("tiny: 4 images per process", "ddp x 2 (DistributedDataParallel)", "in collectives", "1 thread"):
        assert text in printed
    text = (tmp_path / "o" / "scaling.json").read_text()
    assert str(tmp_path) not in text
    report = json.loads(text)
    one, side, ddp = report["setups"]
    assert [row["setup"] for row in (one, side, ddp)] == ["single x 1", "no exchange x 2", "ddp x 2"]
    assert [row["wrapped"] for row in (one, side)] == ["EquiSSLForPreTraining"] * 2
    for row in (one, side, ddp):
        assert [len(steps) for steps in row["steps"]] == [3]
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["images_per_second"] == pytest.approx(4 * row["processes"] * row["copies"] / row["seconds"])
        assert row["threads"] == 1
        if len(os.sched_getaffinity(0)) >= 2:
            assert row["cores"] == 1
    assert one["collectives"] is side["collectives"] is None
    assert 0 < ddp["collectives"] < 1
    assert ddp["efficiency"] + ddp["sharing"] + ddp["exposed"] == pytest.approx(1)


@CPU_ONLY
def test_a_wrong_engine_is_not_measured(path: Path, tmp_path: Path) -> None:
    """In this process nothing wraps the model, whatever was asked for."""
    steps = Steps(warmup=1, timed=2, profiled=1)
    images = write_images(tmp_path / "images", count=4, size=32)
    recipe = Recipe.load(path, settings(steps, batch_size=2) | {"data.source": str(images)})
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cores = os.sched_getaffinity(0)
    try:
        for engine in (Engine.SINGLE, Engine.DDP, Engine.FSDP2):
            folder = tmp_path / engine.value
            task = Task(engine.value, store.port, engine.value, count=1, first=0, images=None, output_dir=str(folder))
            if engine is Engine.SINGLE:
                measure(recipe, task, steps)
                assert len(json.loads(store.get("single/result 0"))["wall"]) == 2
            else:
                with pytest.raises(RecipeError, match=f"{engine.value} was asked for, and single wraps the model"):
                    measure(recipe, task, steps)
                assert b"the times would be those of another engine" in store.get(f"{engine.value}/error")
    finally:
        os.sched_setaffinity(0, cores)


def test_a_launch_that_fails_ends_the_others(tmp_path: Path) -> None:
    script, sleeper = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(f"""
import json, os, pathlib, sys, time
pid = pathlib.Path({str(sleeper)!r})
if json.loads(os.environ["{TASK}"])["first"]:
    pid.with_suffix(".new").write_text(str(os.getpid()))
    pid.with_suffix(".new").rename(pid)
    time.sleep(600)
while not pid.exists():
    time.sleep(0.1)
sys.exit("nothing works")
""")
    launcher = Launcher(script, [], scaling.CONFIGS, tmp_path, None, ENVIRONMENT, print)
    with pytest.raises(MeasurementError, match=r"no exchange x 2 stopped with code 1:(.|\n)*nothing works"):
        launcher(Setup(copies=2))
    gone = Path("/proc", sleeper.read_text())
    assert not gone.exists() or "zombie" in (gone / "status").read_text()


def test_time_in_collectives_counts_once_and_within_steps() -> None:
    def event(name: str, start: float, end: float) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=DeviceType.CPU)

    events = [
        event("gloo:broadcast", 0, 100),  # begins before the first step and reaches 10 into it
        event(STEP, 90, 190),
        event("gloo:all_reduce", 120, 150),
        event("gloo:all_reduce", 130, 140),  # within the other
        event("ncclDevKernel_AllReduce_Sum_f32", 145, 160),  # 10 beyond it
        event("aten::mm", 100, 190),
        event(STEP, 200, 300),
        event("gloo:all_gather", 290, 400),  # 10 in the second step
    ]
    assert collective_share(events) == pytest.approx((10 + 30 + 10 + 10) / 200)


def test_shares() -> None:
    def process(*wall: float, collectives: float | None = None) -> dict[str, object]:
        values = {"wall": wall, "cpu": wall, "collectives": collectives}
        return {**values, "wrapped": "", "threads": 1, "cores": 1}

    wanted = setups([Engine.DDP], [2, 1, 2])
    assert wanted == [Setup(), Setup(copies=2), Setup(Engine.DDP, 2)]
    results = {
        wanted[0]: [[process(6, 5, 7)], [process(8, 8, 8)]],
        wanted[1]: [[process(5, 8, 1), process(8, 1, 8)], [process(8, 8, 8), process(9, 9, 9)]],
        wanted[2]: [
            [process(10, 9, 1, collectives=0.2), process(9, 10, 10, collectives=0.4)],
            [process(10, 10, 10, collectives=0.1), process(9, 9, 9, collectives=0.3)],
        ],
    }
    one, side, ddp = summarize(results, images=4)
    assert ddp["steps"] == [[10, 10, 10], [10, 10, 10]]
    assert (one["seconds"], one["seconds_min"], one["seconds_max"]) == (7.5, 5, 8)
    assert ddp["images_per_second"] == pytest.approx(2 * 4 / 10)
    assert side["sharing_rounds"] == pytest.approx([(8 - 6) / 8, (9 - 8) / 9])
    assert ddp["efficiency_rounds"] == pytest.approx([0.6, 0.8])
    assert ddp["sharing_rounds"] == pytest.approx([0.2, 0.1])
    assert ddp["exposed_rounds"] == pytest.approx([0.2, 0.1])
    assert ddp["collectives_rounds"] == pytest.approx([0.3, 0.2])
    assert one["exposed"] is side["exposed"] is None


def test_mistakes(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*words: str) -> str:
        assert scaling.main(["--recipe", str(path), *words]) == 2
        return capsys.readouterr().err

    assert "--processes 0: expected at least 1" in message("--processes", "0", "2")
    assert "--steps 0: expected at least 1" in message("--steps", "0")
    assert "Use --steps" in message("--training.max_steps", "3")
    assert "Use --batch_size" in message("--training.per_device_train_batch_size", "3")
    assert "Use --data" in message("--data.source", "photos")
    assert "sets this itself" in message("--training.save_strategy", "steps")
    assert "Did you mean --repeats" in message("--repeat", "3")
    assert "is not loaded here" in message("--model.init_from", "facebook/dino-vits16")
    assert "nowhere" in message("--data", str(tmp_path / "nowhere"))
    if not torch.accelerator.is_available():
        assert "no FSDP2 on CPUs" in message("--engines", "ddp", "fsdp2")
