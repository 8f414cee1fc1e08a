"""A task from outside: boxes, a different number in each image, on a plain module, judged by a metric that falls."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoBackbone

from hf_equissl.data import ImageDecodeError
from hf_equissl.evaluation import Metric
from hf_equissl.finetuning import (
    TASKS,
    DenseTask,
    FineTuningSettings,
    Samples,
    Splits,
    Step,
    load_finetuned,
    prepare,
    train,
)
from hf_equissl.finetuning.cli import main
from hf_equissl.finetuning.run import build_trainer

SIDE, PATCH = 32, 8


class _Squares(Samples):
    """Noise with bright squares of 8 pixels on the grid of patches: none, one, two or three of them."""

    def __init__(self, count: int, seed: int, bad: int | None = None) -> None:
        self.name, self.count, self.seed, self.bad = "squares", count, seed, bad

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> dict[str, Any]:
        if index == self.bad:
            raise ImageDecodeError("not an image")
        rng = np.random.default_rng([self.seed, index])
        picture = rng.integers(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
        corners = PATCH * np.stack(np.divmod(rng.permutation(16)[: index % 4], 4), axis=1)
        for top, left in corners:
            picture[top : top + PATCH, left : left + PATCH] = 220
        return {"image": Image.fromarray(picture), "boxes": np.concatenate([corners, corners + PATCH], 1)}


class _Head(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.backbone = AutoBackbone.from_config(config)
        self.score = nn.Conv2d(config.hidden_size, 1, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.score(self.backbone(pixel_values).feature_maps[-1])[:, 0]


class _BoxTask(DenseTask):
    name, noun, result = "squares", "finding squares", "Finder of squares"
    metrics = (Metric("wrong", higher_is_better=False), Metric("found"))

    def load(self, settings: FineTuningSettings) -> Splits:
        return Splits(_Squares(16, 0), _Squares(10, 1, bad=3), "train", "test")

    def blank(self) -> dict[str, Any]:
        return {"image": Image.new("RGB", (SIDE, SIDE)), "boxes": np.zeros((0, 4), int)}

    def transform(self, sample: dict[str, Any], rng: Any) -> dict[str, Any]:
        pixels, boxes = np.array(sample["image"]), sample["boxes"].copy()
        if rng is not None and rng.random() < 0.5:
            pixels, boxes[:, [1, 3]] = pixels[:, ::-1].copy(), SIDE - boxes[:, [3, 1]]
        return {"pixels": torch.from_numpy(pixels).permute(2, 0, 1), "boxes": torch.from_numpy(boxes)}

    def build(self, backbone_config: Any, classes: Sequence[str]) -> nn.Module:
        return _Head(backbone_config)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Step:
        scores = model(batch["pixel_values"]).float()
        wanted = torch.zeros_like(scores)
        for target, boxes in zip(wanted, batch["boxes"], strict=True):
            target[boxes[:, 0] // PATCH, boxes[:, 1] // PATCH] = 1
        loss = F.binary_cross_entropy_with_logits(scores, wanted)
        return Step(loss, scores, {"loss_score": loss.detach()})

    def judge(self, output: torch.Tensor, batch: dict[str, Any]) -> tuple[Any, Any]:
        found = [PATCH * (scores > 0).nonzero() for scores in output]  # as many as there are
        predictions = {"corners": pad_sequence(found, batch_first=True, padding_value=-100)}
        return predictions, pad_sequence(batch["boxes"], batch_first=True, padding_value=-100)

    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        wrong, hits, total = 0, 0, 0
        for corners, boxes in zip(predictions["corners"], targets, strict=True):
            said = {tuple(corner) for corner in corners.tolist() if corner[0] != -100}
            true = {tuple(box[:2]) for box in boxes.tolist() if box[0] != -100}
            wrong, hits, total = wrong + len(said ^ true), hits + len(said & true), total + len(true)
        return {"wrong": float(wrong), "found": hits / total, "squares": float(total)}


@pytest.fixture
def registered() -> Iterator[None]:
    TASKS.register("squares")(_BoxTask)
    yield
    del TASKS["squares"]


def test_the_command_imports_modules_of_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_tasks.py").write_text(f"from {__name__} import TASKS, _BoxTask\n\nTASKS['squares'] = _BoxTask\n")
    words = ["--encoder", "x", "--data", str(tmp_path / "nothing"), "--output_dir", "run", "--task", "squares"]
    try:
        for more, message in (
            ([], "no 'squares'"),
            (["--import", "own_task"], "there is no module 'own_task'"),
            (["--import", "own_tasks"], "no such file or folder"),  # the task is known, and the data come next
        ):
            assert main([*words, *more]) == 2
            assert message in capsys.readouterr().err
    finally:
        TASKS.pop("squares", None)
        sys.modules.pop("own_tasks", None)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_task_from_outside(registered: None, encoders: dict[str, str], tmp_path: Path, method: str) -> None:
    settings = FineTuningSettings(
        encoder=encoders["dinov2"],
        data="made up",
        output_dir=str(tmp_path / "run"),
        task="squares",
        method=method,
        batch_size=4,
        epochs=4,
        eval_steps=1,
        save_steps=1,
        learning_rate=3e-3,
        layer_decay=1.0,
        max_bad_share=0.2,
        keep="best",
    )
    run = prepare(settings)
    lengths = [[len(boxes) for boxes in batch["boxes"]] for batch in build_trainer(run).get_train_dataloader()]
    assert sorted(count for batch in lengths for count in batch) == 4 * [0] + 4 * [1] + 4 * [2] + 4 * [3]
    assert any(len(set(batch)) > 1 for batch in lengths)
    wrong, found = train(run)
    assert (wrong.metric, wrong.primary, found.metric) == ("wrong", True, "found")
    # Of ten images, one of which does not decode: 1 + 2 + 0 + 1 + 2 + 3 + 0 + 1 squares, and those of no other.
    assert wrong.details["squares"] == [sum(index % 4 for index in range(10) if index != 3)]
    history = json.loads((tmp_path / "run" / "checkpoint-16" / "trainer_state.json").read_text())["log_history"]
    measured = [entry["eval_wrong"] for entry in history if "eval_wrong" in entry]
    assert wrong.value == min(measured) < max(measured)  # the direction of the metric decides which weights are kept
    assert any("loss_score" in entry for entry in history)

    # Image by image, with what load_finetuned gives.
    model = load_finetuned(run.folder)
    errors = 0
    for index in range(10):
        if index != 3:
            sample = run.task.transform(run.splits.test.read(index), None)
            with torch.no_grad():
                scores = model(run.task.to_inputs(run.task.collate([sample]))["pixel_values"])[0]
            said = {tuple(corner) for corner in (PATCH * (scores > 0).nonzero()).tolist()}
            errors += len(said ^ {tuple(box[:2]) for box in sample["boxes"].tolist()})
    assert errors == wrong.value
    assert "load_finetuned(" in (run.folder / "README.md").read_text()
