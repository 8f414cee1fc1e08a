"""Two tiny systems are trained, probed and put into a table by one command, which goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_equissl.distributed.signals import EXIT_PREEMPTED, Signals
from hf_equissl.evaluation import load_records
from hf_equissl.evaluation.results import FORMAT_VERSION
from hf_equissl.training import compare, side_by_side
from hf_equissl.training.members import MemberLane, check_alike, expected_end, read_words
from hf_equissl.training.recipe_options import parse_words
from hf_equissl.training.side_by_side import CommandError
from hf_equissl.training.step_times import StepTimes
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
    # Nor can the steps be measured: the table is written all the same.
    (runs / "probes" / "benchmark.log").mkdir(parents=True)
    assert compare.main([*words, "--step_repeats", "1", "--references", "--", *PROBE]) == 1
    printed = capsys.readouterr()
    assert "No step times: " in printed.out
    assert "| base | 3 4 | " in (runs / "probes" / "table.md").read_text()
    assert (runs / "probes" / "table.png").is_file()
    (runs / "probes" / "benchmark.log").rmdir()
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

    # Other words are refused before anything is written, and the first command goes on.
    kept = {path: path.read_bytes() for path in runs.glob("*/probes/*.json")}
    assert compare.main([*words, "--", *PROBE, "--train_images", "10"]) == 2
    refused = capsys.readouterr().err
    assert "was probed without --train_images, and raw_pixels would be probed with --train_images 10" in refused
    assert "--probes NAME" in refused
    assert kept == {path: path.read_bytes() for path in runs.glob("*/probes/*.json")}
    assert compare.main([*words, "--step_repeats", "1", "--", *PROBE]) == 0
    assert (folder / "table.md").read_text() == text

    # Encoders that were deleted to save space stay in the table, and nothing is trained or made anew for them.
    kept_encoders = tmp_path / "encoders"
    for name in ("base_seed-4", "untrained_seed-3"):
        shutil.move(runs / name / "encoder", kept_encoders / name)
    capsys.readouterr()
    assert compare.main([*words, "--list", "--", *PROBE]) == 0
    assert "base_seed-4       probed" in capsys.readouterr().out
    assert compare.main([*words, "--step_repeats", "1", "--", *PROBE]) == 0
    assert (folder / "table.md").read_text() == text
    assert not list(runs.glob("base_seed-4/encoder")) + list(runs.glob("untrained_seed-3/encoder"))
    for name in ("base_seed-4", "untrained_seed-3"):
        shutil.move(kept_encoders / name, runs / name / "encoder")

    # Rows beside the chosen ones stand for what this command would train and probe.
    capsys.readouterr()
    recipe, encoder = runs / "base_seed-4" / "recipe.yaml", runs / "base_seed-3" / "encoder" / "model.safetensors"
    before, stat = recipe.read_text(), encoder.stat()
    recipe.write_text(before.replace("max_steps: 1", "max_steps: 9"))
    os.utime(encoder, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert compare.main([*words, "--only", "fast", "--step_repeats", "0", "--", *PROBE]) == 0
    printed = capsys.readouterr().out
    for reason in (
        "base_seed-3: its encoder is not the one that was probed",
        "base_seed-4 was trained in another way: training.max_steps is 9, not 1",
    ):
        assert printed.count(reason) == 1
        assert reason in (folder / "table.md").read_text()
    assert "| base | " not in (folder / "table.md").read_text()
    recipe.write_text(before)
    os.utime(encoder, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    # Another budget in the same place is refused.
    path = runs / "fast-3" / "probes" / "results.json"
    content = json.loads(path.read_text())
    for entry in content["results"]:
        entry["protocol"]["train_images"] = 7
    path.write_text(json.dumps(content))
    assert compare.main([*words, "--", *PROBE]) == 2
    unlike = "train_images is 7 for fast, seed 3, and 20 for raw_pixels, seed 0"
    assert unlike in capsys.readouterr().err
    # Where that shows on the way, nothing stops for it.
    comparison = compare.Comparison(*parse_words(compare._parser(), words), PROBE)
    with Signals() as signals:
        assert comparison.run(signals) == 1
    printed = capsys.readouterr()
    assert (
        printed.out.count(f"No table: rotation r2 on backbone features was measured in different ways: {unlike}") == 1
    )
    assert unlike in printed.err


def test_what_is_damaged_or_cannot_be_written_stops_nobody_else(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A member has a damaged recipe, and the table cannot be written: the other member is done all the same."""
    runs = tmp_path / "runs"
    (runs / "base_seed-3").mkdir(parents=True)
    (runs / "base_seed-3" / "recipe.yaml").write_text("model: [")
    (runs / "probes").write_text("in the way")
    some = [*words, "--only", "base_seed-3", "fast", "--references", "--step_repeats", "0"]
    damage = f"{runs / 'base_seed-3'} holds a run whose recipe.yaml cannot be read"
    assert compare.main([*some, "--list", "--", *PROBE]) == 0
    assert f"base_seed-3  damaged: {damage}" in capsys.readouterr().out
    assert compare.main([*some, "--", *PROBE]) == 1
    printed = capsys.readouterr()
    assert printed.out.count(f"base_seed-3 failed, the others go on. {damage}") == 1
    assert printed.out.count(f"No table in {runs / 'probes'} for now: File exists. The trainings go on.") == 1
    assert "error: 1 of 2 members failed: base_seed-3; [Errno 17] File exists: " in printed.err
    assert "Traceback" not in printed.err
    weights = (runs / "fast-3" / "encoder" / "model.safetensors").stat().st_mtime_ns

    (runs / "probes").unlink()
    assert compare.main([*some, "--", *PROBE]) == 1
    assert "error: 1 of 2 members failed: base_seed-3\n" in capsys.readouterr().err
    assert "| fast | 3 |" in (runs / "probes" / "table.md").read_text()
    assert (runs / "fast-3" / "encoder" / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", b"model: [", "recipe.yaml cannot be read"),
        ("recipe.yaml", b"\xff\xfe\x00", "recipe.yaml cannot be read"),
        ("recipe.yaml", b"- 1", "recipe.yaml cannot be read"),
        ("probes/probes.json", b"[", "probes.json is damaged"),
        ("probes/probes.json", b"[3]", "probes.json is damaged"),
        ("probes/probes.json", b"{}}", "probes.json is damaged"),
        ("probes/results.json", b"{", "results.json is not JSON"),
        ("probes/results.json", b"\xff", "results.json is not JSON"),
        ("probes/results.json", b'{"format": 1}', "results.json is not a result file"),
        ("probes/results.json", b'{"format": 1, "results": [{"task": 3}]}', "results.json is damaged"),
    ],
)
@pytest.mark.parametrize("chosen", ["base_seed-3", "fast"])
def test_damaged_folders_are_named_and_left_out(
    words: list[str], name: str, content: bytes, message: str, chosen: str, tmp_path: Path
) -> None:
    """Of members that are chosen, and of those beside them that would be rows of the table."""
    folder = tmp_path / "runs" / "base_seed-3"
    (folder / "probes").mkdir(parents=True)
    (folder / "probes" / "results.json").write_text(json.dumps({"format": FORMAT_VERSION, "results": []}))
    (folder / name).write_bytes(content.replace(b'"format": 1', b'"format": %d' % FORMAT_VERSION))
    options, overrides = parse_words(compare._parser(), [*words, "--only", chosen])
    comparison = compare.Comparison(options, overrides, PROBE)
    comparison.check()
    assert comparison.write() == ""
    (damaged,) = (lane for lane in comparison.lanes if lane.damage)
    assert damaged.title == "base_seed-3"
    assert message in damaged.damage
    assert message in damaged.why_no_row(comparison.recipes["base_seed-3"])
    with pytest.raises(CommandError, match=message):
        damaged.work()


def test_probes_that_were_only_begun_count_as_measured(tmp_path: Path) -> None:
    lane = MemberLane("pixels", tmp_path, probes=tmp_path, source="raw_pixels", probe=[["--fill", "x", "--epochs=2"]])
    (tmp_path / "results.json").write_text("{}")
    lane._note(["--epochs", "1"], None)
    with pytest.raises(
        ValueError, match="pixels was probed with --epochs 1, and pixels would be probed with --epochs 2"
    ):
        check_alike([lane])
    lane.probe = [["--epochs", "1"]]
    check_alike([lane])
    assert not lane.is_probed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "a.k=1", "--set", "b.k=2"], {"--set a.k": ("1",), "--set b.k": ("2",)}),
        (["--set=a.k=1", "--set=b.k=2"], {"--set a.k": ("1",), "--set b.k": ("2",)}),
        (["--set", "a.k=1", "c.k=4", "--set=a.k=3"], {"--set a.k": ("3",), "--set c.k": ("4",)}),
        (["--further_test=x", "--further_test", "y", "test"], {"--further_test": ("x", "y", "test")}),
        (["--epochs=1", "--epochs", "2"], {"--epochs": ("2",)}),
        (["--tests", "a", "b", "--tests=c"], {"--tests": ("c",)}),
        (["--overwrite"], {"--overwrite": ()}),
    ],
)
def test_words_of_probes_are_read_in_both_forms(words: list[str], expected: dict[str, tuple[str, ...]]) -> None:
    assert read_words(words) == expected


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
    # Raw pixels have no score but R2.
    comparison = compare.Comparison(options, {}, ["--evaluators", "equivariance"])
    assert [lane.title for lane in comparison.chosen] == ["untrained_seed-3", "fast-3"]
    both = ["--evaluators", "transformation_regression", "equivariance"]
    pixels = compare.Comparison(options, {}, both).chosen[0]
    assert pixels.title == "raw_pixels"
    assert read_words(pixels.probe[0])["--evaluators"] == ("transformation_regression",)


def test_images_of_one_size_in_one_table(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "systems.yaml").write_text(SYSTEMS.replace("training.learning_rate: 0.01", "model.image_size: 32"))
    assert compare.main(words) == 2
    assert "have several: 16 (base_seed-4), 32 (fast-3). Choose" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_column_of_steps_by_device_and_overrides(tmp_path: Path) -> None:
    timings = {"base": {}, "ours": {"overhead": 0.5, "cpu_overhead": 0.25}}
    for device, cell in (("cpu", "1.25"), ("NVIDIA H200", "1.50")):
        settings = {"overrides": {"model.image_size": 32}}
        report = {"environment": {"device": device}, "settings": settings, "systems": timings}
        (tmp_path / "benchmark.json").write_text(json.dumps(report))
        column, notes = StepTimes(tmp_path, tmp_path, {"model.image_size": 32, "data.source": "x"}).column()
        assert column == {"step": {"base": "1.00", "ours": cell}}
        assert f"in turns on {device}" in notes[0]
    assert StepTimes(tmp_path, tmp_path, {"model.image_size": 64}).column() == ({}, [])


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
