"""A suite of probes and fine-tuning tasks on two tiny encoders: run, gone on with, reported; bad suites are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import IJepaConfig, IJepaModel

from hf_equissl.encoders import save_encoder
from hf_equissl.encoders.export import image_processor
from hf_equissl.evaluation import load_records
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.training import evaluate_encoder, side_by_side
from hf_equissl.training.suite import SUITES, read_suite
from tests import processes

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 16}
PROBE = {
    "evaluators": ["transformation_regression", "equivariance", "knn"],
    "tests": ["rotation"],
    "features": ["backbone"],
    "epochs": 1,
    "num_draws": 1,
    "seeds": 1,
    "set": {"knn": {"k": 2, "features": ["backbone"]}},
}
SUITE = {
    "references": ["raw_pixels"],
    "tasks": [
        {"name": "probes", "probe": PROBE},
        {"name": "pairs", "finetune": {"task": "homography", "method": "frozen", "batch_size": 8, "epochs": 1}},
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders, of which transformers has no backbone for one, and images in two classes."""
    root = tmp_path_factory.mktemp("suites")
    torch.manual_seed(0)
    save_encoder(EquiSSLModel(EquiSSLConfig(**SMALL)), root / "ours", [0.5] * 3, [0.25] * 3)
    IJepaModel(IJepaConfig(**SMALL, intermediate_size=32)).save_pretrained(root / "ijepa")
    image_processor(16, [0.5] * 3, [0.25] * 3).save_pretrained(root / "ijepa")
    rng = np.random.default_rng(0)
    for number in range(32):
        folder = root / "images" / ("test" if number < 12 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture
def words(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words of the command; what it starts are forks of the tests' server."""

    def start(command: list[str], log: Path, environment: dict[str, str]) -> processes.Child:
        log.unlink(missing_ok=True)
        return processes.start(command, log=log)

    monkeypatch.setattr(side_by_side, "start_process", start)
    write(tmp_path, SUITE)
    words = ["--suite", str(tmp_path / "suite.yaml"), "--data", str(place / "images")]
    return [*words, "--output_dir", str(tmp_path / "out"), "--encoder", str(place / "ours")]


def write(folder: Path, suite: Any) -> None:
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))


def test_a_suite_is_run_gone_on_with_and_reported(
    words: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [*words, "--encoder", str(place / "ijepa"), "--side_by_side", "1"]
    assert evaluate_encoder.main([*both, "--baseline", "ours"]) == 0
    printed = capsys.readouterr().out
    assert "5 tasks of 3 encoders" in printed
    report = tmp_path / "out" / "report"
    assert {path.name for path in report.iterdir()} >= {"report.md", "results.json", "differences.png", "r2.png"}
    records = load_records(report / "results.json")
    found = {(Path(each.encoder).name, each.evaluator) for each in records}
    probes = {"transformation_regression", "equivariance", "knn"}
    expected = {(name, evaluator) for name in ("ours", "ijepa") for evaluator in probes} | {("ours", "finetune")}
    assert found == expected | {("raw_pixels", "transformation_regression"), ("raw_pixels", "knn")}
    text = (report / "report.md").read_text()
    assert "## Differences to" in text
    left_out = text.split("## Not measured")[1]
    assert "equivariance is not run for raw" in left_out
    assert "ijepa model, for which transformers has no backbone" in left_out
    assert left_out.count("\n- ") == 2
    assert "ijepa model, for which transformers has no backbone" in printed

    # Nothing is done twice, and what is missing is.
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.log")}
    assert len(logs) == 4
    (note,) = (tmp_path / "out").glob("*ours/probes/task.json")
    note.unlink()
    assert evaluate_encoder.main(both) == 0
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.log")}
    assert [path.parent for path in logs if again[path] != logs[path]] == [note.parent]
    assert len(load_records(report / "results.json")) == len(records)

    # Neither other settings nor other weights take the place of what is there.
    capsys.readouterr()
    write(tmp_path, {"tasks": [{**SUITE["tasks"][0], "probe": {**PROBE, "fill": "reflect"}}]})  # type: ignore[index]
    assert evaluate_encoder.main(words) == 2
    assert "was measured with other settings or data. Name another --output_dir" in capsys.readouterr().err
    write(tmp_path, SUITE)
    entry = json.loads(note.read_text())
    note.write_text(json.dumps({**entry, "weights": [1, 2]}))
    assert evaluate_encoder.main(words) == 2
    assert "was measured with other weights" in capsys.readouterr().err


def test_a_task_that_fails_stops_no_other(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    knn = {"name": "knn", "probe": {"evaluators": ["knn"], "set": {"knn": {"k": 2}}}}
    write(tmp_path, {"tasks": [{"name": "tuned", "finetune": {"method": "linear", "batch_size": 999}}, knn]})
    assert evaluate_encoder.main(words) == 1
    said = capsys.readouterr()
    assert "999 is more than the 20 training images" in said.out
    assert "error: 1 of 2 tasks failed" in said.err
    assert len(load_records(tmp_path / "out" / "report" / "results.json")) > 0


def edit(**changes: Any) -> dict[str, Any]:
    """The suite with a task of these contents alone."""
    return {"tasks": [{"name": "one", **changes}]}


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"tasks": []}, "there are no tasks in it"),
        ({"references": ["raw_pixels"]}, "tasks must be given"),
        ({**SUITE, "referenses": []}, "unknown key 'referenses'. Did you mean 'references'?"),
        ({**SUITE, "references": ["pixels"]}, "references: expected a list of (one of 'raw_pixels', 'untrained')"),
        ({"tasks": [*SUITE["tasks"], SUITE["tasks"][0]]}, "expected a name of its own, such as linear, got 'probes'"),  # type: ignore[index, misc]
        (edit(probe={}, finetune={}), "expected one of probe and finetune"),
        (edit(), "expected one of probe and finetune"),
        (edit(probe={"evaluatrs": ["knn"]}), "unknown key 'evaluatrs'. Did you mean 'evaluators'?"),
        (edit(probe={"evaluators": ["knnn"]}), "task one: --evaluators: there is no 'knnn'. Did you mean 'knn'?"),
        (edit(probe={"output_dir": "x"}), "unknown key 'output_dir'"),
        (edit(probe={"set": {"knnn": {"k": 1}}}), "there is no 'knnn'. Did you mean 'knn'?"),
        (edit(probe={"set": {"knn": 3}}), "probe.set.knn: expected a mapping, got 3"),
        (edit(probe={"epochs": True}), "probe.epochs: expected a value, got true"),
        (edit(probe={"epochs": "many"}), "argument --epochs: expected an integer"),
        (edit(probe={}, seeds=[1]), "seeds: those of a probe are its option"),
        (edit(finetune={"task": "homografy"}), "--task: there is no 'homografy'. Did you mean 'homography'?"),
        (edit(finetune={"method": "half"}), "half"),
        (edit(finetune={}, seeds=["a"]), "seeds: expected a list of (an integer)"),
        (edit(finetune={}, data="/no/such/place"), "/no/such/place: no such file or folder"),
        ([1], "expected a suite, keys with values, got a list"),
    ],
)
def test_suites_that_cannot_be_are_refused(
    words: list[str], tmp_path: Path, suite: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, suite)
    assert evaluate_encoder.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_command(words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--suite", "quik"], "--suite quik: no suite of this name. Did you mean 'quick'? Suites: cifar10, quick"),
        (["--only", "probs"], "--only: there is no 'probs'. Did you mean 'probes'?"),
        (["--encoder", "/no/such/encoder"], "No encoder at '/no/such/encoder'"),
        (["--side_by_side", "0"], "expected at least 1"),
        (["--encoder", "x/y", "--encoder", "x_y"], "would share a folder"),
    ):
        assert evaluate_encoder.main([*words, *more]) == 2, more
        assert message in capsys.readouterr().err
    given = words.index("--data")
    assert evaluate_encoder.main([*words[:given], *words[given + 2 :]]) == 2
    assert "it names no images for probes. Give them with --data" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_suites_that_ship_are_what_the_commands_take(
    words: list[str], place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, tasks = read_suite(name)
    assert suite.description
    assert evaluate_encoder.main([*words, "--suite", name, "--dry_run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    probes = sum(task.kind == "probe" for task in tasks)
    seeds = sum(len(task.seeds) for task in tasks if task.kind == "finetune")
    assert len(printed) == 3 * probes + seeds  # the encoder, its architecture untrained, raw pixels
    assert sum("--encoder untrained:" in line for line in printed) == probes
    assert sum(line.endswith("--image_size 16") for line in printed) == probes
