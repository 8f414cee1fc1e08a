"""The quick start, with a handful of steps: everything is there, loads, and is found again by a second call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

import hf_equissl  # noqa: F401  (registers the encoder with AutoModel)
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.training import photographs, quickstart
from hf_equissl.training.side_by_side import CommandError, Lane, follow, share_cores
from hf_equissl.utils.figures import denormalize, plot_image_grid, plot_losses

pytest.importorskip("matplotlib")
SCRIPT = Path(quickstart.__file__)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder of a short run, and what it printed."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    output = tmp_path_factory.mktemp("quickstart") / "output"
    return output, start(output)


def start(output: Path) -> str:
    words = ["--output_dir", str(output), "--steps", "2", "--crops_per_photograph", "12"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_is_written(finished: tuple[Path, str]) -> None:
    output, text = finished
    assert f"AutoModel.from_pretrained('{output / 'encoder'}')" in text
    assert "rotation" in text
    for name in ("loss.png", "r2.png", "reconstructions.png"):
        with Image.open(output / name) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 5  # something is drawn
    assert "| lambda = 50 |" in (output / "results.md").read_text()
    results = json.loads((output / "results.json").read_text())["results"]
    measured = {(Path(entry["encoder"]).name, entry["task"]) for entry in results if entry["metric"] == "r2"}
    assert measured == {(name, task) for name in ("encoder", "encoder_lambda0") for task in quickstart.TESTS}


def test_encoders_load_and_differ_in_the_loss_alone(finished: tuple[Path, str]) -> None:
    output, _ = finished
    encoder = AutoModel.from_pretrained(output / "encoder")
    images = torch.randn(2, 3, 32, 32)
    assert encoder.reconstruct(images, images).shape == (2, 2, 3, 32, 32)
    assert AutoModel.from_pretrained(output / "encoder_lambda0").config.decoder_type is None
    first, second = (Recipe.load(output / "runs" / name / "recipe.yaml") for name in ("encoder", "encoder_lambda0"))
    assert (first.model, first.views, first.data, first.training) == (
        second.model,
        second.views,
        second.data,
        second.training,
    )
    assert [recipe.objectives.equivariance[0]["weight"] for recipe in (first, second)] == [50, 0]


def test_a_second_call_trains_and_measures_nothing(finished: tuple[Path, str]) -> None:
    output, _ = finished
    weights = output / "encoder" / "model.safetensors"
    before = weights.stat().st_mtime_ns, (output / "results.json").read_text()
    (output / "loss.png").unlink()
    start(output)
    assert (weights.stat().st_mtime_ns, (output / "results.json").read_text()) == before
    assert (output / "loss.png").is_file()


def test_other_settings_need_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage")
    (tmp_path / "settings.json").write_text('{"steps": 400}')
    assert quickstart.main(["--output_dir", str(tmp_path), "--steps", "3"]) == 2
    assert "Name another --output_dir" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert quickstart.main(["--output_dir", str(tmp_path / "file")]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    assert quickstart.main([]) == 2
    message = capsys.readouterr().err
    assert "scikit-image, scikit-learn, matplotlib" in message
    assert "make quickstart" in message


def test_windows_are_square_seeded_and_show_something() -> None:
    rng = np.random.default_rng(0)
    picture = np.zeros((200, 300, 3), np.uint8)
    picture[:, 150:] = rng.integers(0, 255, (200, 150, 3))  # the left half is empty
    windows = photographs.random_windows(Image.fromarray(picture), 12, seed=1)
    again = photographs.random_windows(Image.fromarray(picture), 3, seed=1)
    assert {window.size for window in windows} == {(48, 48)}
    assert all(np.asarray(window).std() > 5 for window in windows)
    assert [window.tobytes() for window in windows[:3]] == [window.tobytes() for window in again]


def test_train_and_test_photographs_differ() -> None:
    train, test = (
        {(module, name) for module, names in files.items() for name in names}
        for files in (photographs.TRAIN_PHOTOGRAPHS, photographs.TEST_PHOTOGRAPHS)
    )
    assert not train & test


def test_a_failing_command_stops_the_other(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("print('a clue'); raise SystemExit(3)")
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    lanes = [Lane(name, tmp_path / name) for name in ("slow", "bad")]
    with pytest.raises(CommandError, match=r"bad.py stopped with code 3 \(bad\)(.|\n)*a clue"):
        follow(lanes, lambda lane: lane.call("working", tmp_path / f"{lane.title}.py", bar="x"))
    assert all(lane.process is None or lane.process.poll() is not None for lane in lanes)


def test_progress_is_read_off_the_bar(tmp_path: Path) -> None:
    lane = Lane("x", tmp_path)
    assert lane.progress() == "waiting"
    lane.stage, lane.bar, lane.log = "pretraining", "pretraining", tmp_path / "log"
    lane.log.write_text(
        "pretraining:  10%|#  | 4/40 [00:01<00:09]\rpretraining:  20%|#  | 8/40 [00:02<00:08]\rmore: 1/1"
    )
    assert lane.progress() == "pretraining 8/40"
    lane.finish()
    assert lane.progress() == "done"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell a process's cores")
def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 5, 7})
    assert share_cores(2) == [frozenset({1, 4}), frozenset({5, 7})]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert share_cores(2) == [frozenset(), frozenset()]


def test_denormalize_inverts_the_normalisation() -> None:
    images = torch.rand(2, 3, 4, 4)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(denormalize(normalised, mean, std), images)
    assert denormalize(torch.full((3, 2, 2), 9.0), mean, std).max() == 1


def test_loss_curves_have_a_line_per_run_that_logged_them() -> None:
    history = [{"step": 1, "loss_ssl": 2.0}, {"step": 2, "loss_ssl": 1.0, "recon": 0.5}, {"train_runtime": 3.0}]
    figure = plot_losses({"a": history[:1], "b": history}, {"loss_ssl": "loss", "recon": "error"})
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[1, 2], [2, 1]]
    with pytest.raises(ValueError, match=r"No run has logged 'loss_sll'\. Logged are: loss_ssl, recon"):
        plot_losses({"b": history}, {"loss_sll": "loss"})


def test_image_grid_shows_every_image_once(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 8)
    figure = plot_image_grid(
        {"in": {"x": images}, "out": {"y": images, "z": images}}, ["a", "b"], tmp_path / "grid.png"
    )
    assert len(figure.axes) == 6
    sizes = {tuple(np.round(axes.get_window_extent().size, 3)) for axes in figure.axes}
    assert len(sizes) == 1
    assert (tmp_path / "grid.png").is_file()
    with pytest.raises(ValueError, match="same number of images"):
        plot_image_grid({"in": {"x": images, "y": images[:1]}})
