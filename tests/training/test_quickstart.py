"""The quick start, with a handful of steps: everything is there, loads, and is found again by a second call."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

import hf_equissl  # noqa: F401  (registers the encoder with AutoModel)
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.training import pace, photographs, quickstart, side_by_side
from hf_equissl.training.side_by_side import CommandError, Lane, clock, follow
from hf_equissl.utils.devices import choose_precision, describe_cpu
from hf_equissl.utils.figures import denormalize, plot_image_grid, plot_losses
from tests import processes

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder of a short run, and what it printed."""
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    output = tmp_path_factory.mktemp("quickstart") / "output"
    return output, start(output)


def start(output: Path) -> str:
    """Run the command in this process; what it starts are forks."""
    words = ["--output_dir", str(output), "--steps", "2", "--crops_per_photograph", "12"]
    forked = SimpleNamespace(Popen=processes.popen, STDOUT=subprocess.STDOUT)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(side_by_side, "subprocess", forked)
        code = quickstart.main(words)
    assert code == 0, said.getvalue()
    return said.getvalue()


def test_everything_is_written(finished: tuple[Path, str]) -> None:
    output, text = finished
    assert f"AutoModel.from_pretrained('{output / 'encoder'}')" in text
    assert "rotation" in text
    for name in ("loss.png", "r2.png", "reconstructions.png"):
        with Image.open(output / name) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 5  # something is drawn
    report = (output / "results.md").read_text()
    assert "| lambda = 50 |" in report
    assert f"Trained for 2 steps in {choose_precision('auto', torch.device('cpu'))} on {describe_cpu()}: " in report
    assert report.split("Trained for 2 steps")[1].strip() in text
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


class Timed(Lane):
    """A lane in training, ``done`` of ``total`` steps on, so many seconds per step."""

    def __init__(self, done: int, total: int, seconds: float) -> None:
        super().__init__("x", Path())
        self.stage, self.state, self.seconds = "pretraining", (done, total), seconds

    def steps_done(self) -> tuple[int, int]:
        return self.state

    def seconds_per_step(self, after: float) -> float:
        return self.seconds


def test_speed_is_measured_from_the_bar(tmp_path: Path) -> None:
    lane = Lane("x", tmp_path)
    lane.stage, lane.bar, lane.log = "pretraining", "pretraining", tmp_path / "log"
    assert lane.seconds_per_step(after=0.0) is None  # no log yet
    lane.log.write_text("pretraining:  10%|#  | 4/40 [00:01<00:09]")
    assert lane.seconds_per_step(after=0.0) is None  # the first step is slow: the clock starts behind it
    assert lane.first_seen is not None
    lane.first_seen = (lane.first_seen[0] - 10.0, 4)
    lane.log.write_text("pretraining:  10%|#  | 9/40 [00:11<00:09]")
    assert lane.seconds_per_step(after=20.0) is None
    assert lane.seconds_per_step(after=10.0) == pytest.approx(2.0, rel=0.1)


def test_the_end_is_told_once_by_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "lanes_at_once", lambda count: count)
    told = pace.Pace(time.monotonic() - 20, may_shorten=True)
    lanes = [Timed(40, 800, 0.1), Timed(30, 800, 0.2)]
    text = told.watch(lanes)
    assert text is not None
    assert f"done in about {clock(0.2 * (800 + pace.PROBE_STEPS - 30))}" in text
    assert told.watch(lanes) is None


def test_a_slow_machine_trains_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "lanes_at_once", lambda count: count)
    lanes = [Timed(5, 800, 0.5), Timed(5, 800, 1.0)]
    with pytest.raises(pace.TooSlowError) as caught:
        pace.Pace(time.monotonic() - 30, may_shorten=True).watch(lanes)
    steps = caught.value.steps
    assert 30 + pace.RESTART + (steps + pace.PROBE_STEPS) * 1.0 <= pace.LONGEST
    assert 30 + pace.RESTART + (steps + pace.STEP_UNIT + pace.PROBE_STEPS) * 1.0 > pace.LONGEST
    # What was asked for in so many words stays; and so does what is as short as can be.
    assert pace.Pace(time.monotonic(), may_shorten=False).watch(lanes) is not None
    assert pace.Pace(time.monotonic(), may_shorten=True).watch([Timed(5, pace.FEWEST_STEPS, 9.0)]) is not None


def test_a_single_core_takes_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = [Timed(0, 800, 0.1), Lane("waits", Path())]
    monkeypatch.setattr(pace, "lanes_at_once", lambda count: 1)
    text = pace.Pace(time.monotonic(), may_shorten=True).watch(lanes)
    assert text is not None
    assert f"about {clock(2 * 0.1 * (800 + pace.PROBE_STEPS))}" in text


def test_a_shorter_run_is_found_again(tmp_path: Path) -> None:
    settings = quickstart.claim(tmp_path, None, 12)
    (tmp_path / "runs" / "encoder").mkdir(parents=True)
    shorter = quickstart.shorten(tmp_path, settings, 400)
    assert not (tmp_path / "runs").exists()
    assert quickstart.claim(tmp_path, None, 12) == shorter
    assert "400 steps are trained in place of 600" in quickstart.cost_of(shorter)
    with pytest.raises(quickstart.QuickstartError, match="Name another --output_dir"):
        quickstart.claim(tmp_path, 600, 12)


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
