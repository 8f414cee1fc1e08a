"""Two tiny systems are trained, probed and put into a table by one command, which goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_equissl.distributed.signals import EXIT_PREEMPTED
from hf_equissl.evaluation import load_records
from hf_equissl.training import compare, side_by_side
from hf_equissl.training.members import MemberLane, expected_end
from hf_equissl.training.recipe_options import parse_words
from tests import processes

BASE = """
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8, image_size: 16,
        feature_size: 8, equivariant_size: 4}
objectives: {invariance: {name: vicreg, expander_sizes: [16, 16]}, equivariance: []}
views: {pipeline: {name: vicreg}, transformation: {name: rotation}}
training: {per_device_train_batch_size: 4, max_steps: 1, disable_tqdm: true, use_cpu: true, bf16: false,
           dataloader_num_workers: 0}
"""
SYSTEMS = """
description: Two tiny systems.
sweep:
  - {name: "base_seed-{seed}", extends: base.yaml, cross: {training.seed: [3, 4]}}
  - name: "fast-{seed}"
    extends: base.yaml
    set: {training.learning_rate: 0.01}
    cross: {training.seed: [3]}
"""
PROBE = ("--tests", "rotation", "color_jitter", "--epochs", "1", "--num_draws", "1", "--set", "knn.k=2")


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of the command; what it starts are forks of the tests' server."""
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "systems.yaml").write_text(SYSTEMS)
    rng = np.random.default_rng(0)
    for number in range(32):
        folder = tmp_path / "images" / ("test" if number < 12 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")

    def start(command: list[str], log: Path, environment: dict[str, str]) -> processes.Child:
        log.unlink(missing_ok=True)
        return processes.start(command, log=log)

    monkeypatch.setattr(side_by_side, "start_process", start)
    data = str(tmp_path / "images")
    return ["--recipe", str(tmp_path / "systems.yaml"), "--data", data, "--output_dir", str(tmp_path / "runs")]


def test_from_nothing_to_a_table_and_on(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    # A member that cannot be trained: the others are.
    (runs / "fast-3").mkdir(parents=True)
    (runs / "fast-3" / "pretrain.log").mkdir()
    assert compare.main([*words, "--step_repeats", "0", "--references", "--", *PROBE]) == 1
    printed = capsys.readouterr()
    assert "fast-3 failed, the others go on" in printed.out
    assert "error: 1 of 3 members failed: fast-3" in printed.err
    (runs / "fast-3" / "pretrain.log").rmdir()

    weights = {path: path.stat().st_mtime_ns for path in runs.glob("*/encoder/model.safetensors")}
    assert len(weights) == 2
    assert compare.main([*words, "--list", "--", *PROBE]) == 0
    listed = capsys.readouterr().out
    assert "base_seed-3       probed" in listed
    assert "fast-3            not finished" in listed
    logs = {path: path.stat().st_mtime_ns for path in runs.glob("*/*.log")}
    assert compare.main([*words, "--step_repeats", "1", "--", *PROBE]) == 0
    printed = capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == before for path, before in weights.items())  # nothing was done twice
    assert len(logs) == 4
    assert all(path.stat().st_mtime_ns == before for path, before in logs.items())

    folder = runs / "probes"
    text = (folder / "table.md").read_text()
    values = {
        seed: next(
            record.value
            for record in load_records(runs / f"base_seed-{seed}" / "probes" / "results.json")
            if (record.task, record.metric, record.features) == ("rotation", "r2", "equivariant")
        )
        for seed in (3, 4)
    }
    mean, std = statistics.fmean(values.values()), statistics.stdev(values.values())
    equivariant = text.split("Features: equivariant")[1]
    assert f"| base | 3 4 | {mean:.4f} +- {std:.4f} |" in equivariant
    rows = [line.split(" | ")[:2] for line in equivariant.splitlines() if line.startswith("| ")]
    assert rows[2:5] == [["| untrained", "3 4"], ["| base", "3 4"], ["| fast", "3"]]
    assert "| raw_pixels | 0 | " in text.split("Features: equivariant")[0]
    assert "linear top1" in text
    assert "knn top1" in text
    assert {"base", "fast"} == json.loads((folder / "benchmark.json").read_text())["systems"].keys()
    assert "rotation r2 [zeros]" in printed
    assert (folder / "table.png").is_file()

    # Another budget in the same place is refused.
    path = runs / "fast-3" / "probes" / "results.json"
    content = json.loads(path.read_text())
    for entry in content["results"]:
        entry["protocol"]["train_images"] = 7
    path.write_text(json.dumps(content))
    assert compare.main([*words, "--", *PROBE]) == 2
    assert "train_images is 7 for fast, seed 3, and 20 for raw_pixels, seed 0" in capsys.readouterr().err


def test_places_of_probes_and_ways_to_fill(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--only", "fast", "--probes", "other", "--fill", "zeros", "reflect"]
    options, overrides = parse_words(compare._parser(), [*words, *more, "--import", "json"])
    comparison = compare.Comparison(options, overrides, ["--epochs", "2"])
    pixels, untrained, fast = comparison.chosen
    assert [lane.title for lane in comparison.chosen] == ["raw_pixels", "untrained_seed-3", "fast-3"]
    assert pixels.probe[0][:2] == ["--encoder", "raw_pixels"]
    assert untrained.probe[0][:2] == ["--encoder", str(tmp_path / "runs" / "untrained_seed-3" / "encoder")]
    for command, fill in zip(fast.probe, ("zeros", "reflect"), strict=True):
        assert command[-4:] == ["--epochs", "2", "--fill", fill]
        assert command[command.index("--import") + 1] == "json"
        assert str(tmp_path / "runs" / "fast-3" / "probes_other") in command
        assert str(tmp_path / "runs" / "fast-3" / "encoder") in command
    assert fast.train[-4:] == ["--data.source", json.dumps(str(tmp_path / "images")), "--import", "json"]


def test_a_request_to_stop_ends_all(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both trainings that run end as after a signal of their own; the third one does not begin."""
    runs = tmp_path / "runs"

    def ask() -> None:
        with contextlib.suppress(TimeoutError):
            processes.wait_until(lambda: all(any(runs.glob(f"base_seed-{n}/checkpoint-*")) for n in (3, 4)), 60.0)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    long = ["--training.max_steps", "100000", "--training.save_steps", "2", "--training.save_total_limit", "1"]
    assert compare.main([*words, *long, "--side_by_side", "2", "--references"]) == EXIT_PREEMPTED
    asking.join()
    assert "stopped: SIGTERM: the same command goes on" in capsys.readouterr().err
    records = [json.loads((runs / f"base_seed-{seed}" / "run.json").read_text()) for seed in (3, 4)]
    assert all(record["preempted"] and 2 <= record["steps"] < 100_000 for record in records)
    assert not (runs / "fast-3").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--side_by_side", "0"], "--side_by_side 0: expected at least 1"),
        (["--only", "bas"], "--only bas: no run of this name. Did you mean"),
        (["--finished_only"], "no chosen member is finished"),
        (["--", "--set", "knn=2"], "expected EVALUATOR.KEY=VALUE"),
        (["--", "--set", "kn.k=2"], "Did you mean 'knn'"),
        (["--", "--import", "no_measures"], "there is no module 'no_measures'"),
    ],
)
def test_mistakes(words: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([*words, *more]) == 2
    assert message in capsys.readouterr().err


def test_words_that_the_probe_does_not_know(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main([*words, "--", "--tests", "rotaton"])
    assert "Did you mean 'rotation'" in capsys.readouterr().err
    assert compare.main([*words[:2], *words[4:]]) == 2
    assert "no data set is named. Give one with --data" in capsys.readouterr().err
    assert compare.main(words[:4]) == 2
    assert "--output_dir is missing" in capsys.readouterr().err


def test_the_end_is_expected_from_what_is_known(tmp_path: Path) -> None:
    """Two at once: 100 s of training to come for each of three members, and their probes of 20 s."""
    lanes = [MemberLane(name, tmp_path / name, system=name, train=["x"], probe=[["x"]]) for name in "abcd"]
    assert expected_end(lanes, 2) == ""
    lanes[0].finish()
    lanes[0].seconds = {"training": 100.0}
    assert "done in about 2:30, " in expected_end(lanes, 2)
    assert expected_end(lanes, 2).endswith("without probes")
    lanes[0].seconds["probing"] = 20.0
    assert "done in about 3:00, " in expected_end(lanes, 2)
    lanes[1].stage, lanes[1].bar, lanes[1].log = "training", "bar", tmp_path / "log"
    lanes[1].log.write_text("bar:  10%|#  | 30/40 [00:01<00:09]")
    lanes[1].first_seen = (
        time.monotonic() - 20.0,
        20,
    )  # 2 s per step, 10 left; the others take 90 s, as known ones on average
    assert "done in about 2:10, " in expected_end(lanes, 2)
