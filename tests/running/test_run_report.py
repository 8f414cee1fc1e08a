"""The page at the end of a run says what the run's own files say, and replaces nobody else's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from hf_equissl.running.output_folder import CURVES_FILE, KEPT_REPORT, REPORT_FILE
from hf_equissl.running.run_report import FEWEST_POINTS, write_report
from hf_equissl.training import pretrain
from tests.hub.tiny_run import RECIPE


@pytest.fixture
def words(photo_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return ["--recipe", str(tmp_path / "tiny.yaml"), "--data", str(photo_folder), "--output_dir", str(tmp_path / "run")]


def test_the_page_of_a_run(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steps = FEWEST_POINTS
    more = ["--monitor.every_steps", "5", "--monitor.train_images", "8", "--monitor.test_images", "0"]
    assert pretrain.main([*words, "--training.max_steps", str(steps), *more]) == 0
    folder = tmp_path / "run"
    text = (folder / REPORT_FILE).read_text()
    record = json.loads((folder / "run.json").read_text())
    history = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in history if "loss" in entry]
    monitored = json.loads((folder / "monitor.jsonl").read_text().splitlines()[-1])
    assert text.startswith(f"{KEPT_REPORT}\n\n# tiny\\_rot" if "tiny\\_rot" in text else f"{KEPT_REPORT}\n\n# tiny_rot")
    assert f"| `loss` | {losses[0]['loss']:.4g} | {losses[-1]['loss']:.4g} |" in text
    assert f"| optimizer steps | {steps} |" in text
    assert "8 x 1 x 1 = 8" in text
    assert record["command"] in text
    assert re.search(r"\| peak memory, main process \| [\d.]+ [MG]iB", text)
    assert re.search(r"Images per second between log lines: [\d.]+ \(median\)", text)
    assert f"| {monitored['monitor/effective_rank']:.4g} |" in text
    pictures = re.findall(r"\]\((\S+\.png)\)", text)
    assert sorted(pictures) == sorted([CURVES_FILE, "monitor.png", "reconstructions.png"])
    assert all((folder / name).is_file() for name in pictures)
    # What cannot be written costs no run.
    (folder / REPORT_FILE).unlink()
    (folder / REPORT_FILE).symlink_to("elsewhere.md")
    assert write_report(folder, "again", history) is None


def test_commands_hold_whatever_the_folder_is_called(words: list[str], tmp_path: Path) -> None:
    name = "Tom's runs; $HOME"
    assert pretrain.main([*words[:-1], str(tmp_path / name), "--training.max_steps", "1"]) == 0
    text = (tmp_path / name / REPORT_FILE).read_text().split("## Measure and publish")[1]
    probe, push = ([*shlex.split(line)] for line in text.splitlines() if line.startswith("python "))
    assert probe[3] == str(tmp_path / name / "encoder")
    assert push[2] == str(tmp_path / name)


def test_a_short_run_has_no_curves_and_an_option_switches_all_off(words: list[str], tmp_path: Path) -> None:
    assert pretrain.main([*words, "--training.max_steps", "2"]) == 0
    assert (tmp_path / "run" / REPORT_FILE).is_file()
    assert not (tmp_path / "run" / CURVES_FILE).exists()
    off = [*words[:-1], str(tmp_path / "off"), "--training.max_steps", "2"]
    assert pretrain.main([*off, "--training.run_report", "false", "--training.picture_steps", "0"]) == 0
    left = {path.name for path in (tmp_path / "off").iterdir()}
    assert not left & {REPORT_FILE, "reconstructions.png", CURVES_FILE}
