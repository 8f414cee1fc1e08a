"""Pictures beside the losses: of the step itself, on their schedule, in trackers, and nothing of the run changes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from hf_equissl.pretraining.pictures import PICTURES_FILE, ROWS
from hf_equissl.utils.figures import GAP, HEADING, SMALLEST_CELL, denormalize

from .test_trainer import assert_same, make_trainer, weights

TITLES = ["view 1", "view 2", "target 1/3 g", "target 2/3 g", "painted 1/3 g", "painted 2/3 g"]


class Watch(TrainerCallback):
    """Notes at which steps there is a new picture."""

    def __init__(self, path: Path) -> None:
        self.path, self.steps, self.last = path, list[int](), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path.is_file() and (now := self.path.stat().st_mtime_ns) != self.last:
            self.steps.append(state.global_step)
            self.last = now


@pytest.mark.parametrize("base", ["vicreg", "ibot"])
def test_they_change_no_bit_and_come_on_schedule(base: str, photo_folder: Path, tmp_path: Path) -> None:
    """With a teacher, masks and micro-batches, too; the last step always has one."""
    options: dict[str, Any] = {"base": base, "max_steps": 5, "save_strategy": "no", "gradient_accumulation_steps": 2}
    plain = make_trainer(photo_folder, tmp_path / "plain", picture_steps=0, **options)
    plain.train()
    shown = make_trainer(photo_folder, tmp_path / "shown", picture_steps=2, **options)
    watch = Watch(tmp_path / "shown" / PICTURES_FILE)
    shown.add_callback(watch)
    shown.train()
    assert watch.steps == [2, 4, 5]
    assert not (tmp_path / "plain" / PICTURES_FILE).exists()
    assert_same(weights(plain), weights(shown))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, shown)]
    assert losses[0] == losses[1]
    assert not any(module._forward_hooks for module in shown.model.modules())


def test_they_show_the_step(photo_folder: Path, tmp_path: Path) -> None:
    """Views and targets are those that the loss saw; what is painted has the logged error."""
    trainer = make_trainer(photo_folder, tmp_path, picture_steps=1, max_steps=1, save_strategy="no")
    objective = trainer.model.equivariance[0]
    seen: dict[str, Tensor] = {}

    def spy(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        crops, targets = inputs[2].global_crops, inputs[2].intermediate_images
        images = [crops[0], crops[-1], *targets.unbind(1), *objective.reconstruct(inputs[0], inputs[2]).unbind(1)]
        seen.update({title: image.detach().clone() for title, image in zip(TITLES, images, strict=True)})

    objective.register_forward_hook(spy)
    trainer.train()
    sheet = np.asarray(Image.open(tmp_path / PICTURES_FILE))
    assert sheet.shape == (HEADING + ROWS * (SMALLEST_CELL + GAP), len(TITLES) * (SMALLEST_CELL + GAP), 3)
    for column, title in enumerate(TITLES):
        pixels = denormalize(seen[title], [0.5] * 3, [0.25] * 3)
        for row in range(ROWS):
            top, left = HEADING + row * (SMALLEST_CELL + GAP), column * (SMALLEST_CELL + GAP)
            cell = sheet[top : top + SMALLEST_CELL : 3, left : left + SMALLEST_CELL : 3]  # 32 px, three times
            expected = pixels[row].mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(cell, expected, err_msg=f"{title}, row {row}")
    entry = next(entry for entry in trainer.state.log_history if "reconstruction/mse_1" in entry)
    error = torch.nn.functional.mse_loss(seen["painted 1/3 g"], seen["target 1/3 g"])
    assert float(error) == pytest.approx(entry["reconstruction/mse_1"], rel=1e-4)


def test_tensorboard_shows_them(photo_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra tracking)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(photo_folder, tmp_path, picture_steps=1, max_steps=2, report_to=["tensorboard"])
    trainer.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    found = events.Images("reconstructions")
    sheet = Image.open(tmp_path / PICTURES_FILE)
    assert [(image.step, image.width, image.height) for image in found] == [(step, *sheet.size) for step in (1, 2)]


def test_a_tracker_that_fails_costs_nothing_but_its_pictures(
    photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first tracker refuses pictures, as one without network does; the second has all of them."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra tracking)")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_equissl"), "propagate", True)

    class Refuses:
        def add_image(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionError("no network")

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    trainer = make_trainer(photo_folder, tmp_path, picture_steps=1, max_steps=2, report_to=["tensorboard"])
    own = next(each for each in trainer.callback_handler.callbacks if isinstance(each, TensorBoardCallback))
    failing = TensorBoardCallback(Refuses())
    trainer.callback_handler.callbacks.insert(0, failing)
    written: list[int] = []
    monkeypatch.setattr(
        "torch.utils.tensorboard.SummaryWriter.add_image", lambda *args, **kwargs: written.append(args[3])
    )
    with caplog.at_level("WARNING"):
        trainer.train()
    assert own.tb_writer is None  # closed at the end, as usual
    assert written == [1, 2]
    assert trainer.state.global_step == 2
    assert caplog.text.count("TensorBoard does not take reconstructions.png (no network). The run goes on.") == 2


def test_trackio_shows_them(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "trackio" in sys.modules:
        pytest.skip("trackio was imported before, and has chosen its folder")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed (extra tracking)")
    trainer = make_trainer(photo_folder, tmp_path / "run", picture_steps=1, max_steps=2, report_to=["trackio"])
    trainer.train()
    sheet = Image.open(tmp_path / "run" / PICTURES_FILE)
    shown = [Image.open(path).convert("RGB") for path in (tmp_path / "trackio").rglob("*.png")]
    assert len(shown) == 2
    assert any(np.array_equal(np.asarray(picture), np.asarray(sheet)) for picture in shown)
