"""Every dense task trains on every kind of encoder that its heads can be put on, or says in a sentence why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTMAEConfig,
    ViTMAEModel,
)

from hf_equissl.encoders import convert_encoder
from hf_equissl.finetuning import TASKS, DenseTask, FineTuningSettings
from hf_equissl.finetuning.tasks import make_task
from hf_equissl.finetuning.tasks.base import EncoderInput, UnfitEncoderError
from hf_equissl.finetuning.tasks.people import Person

from .conftest import SMALL, equissl, save, stock

pytest.importorskip("pycocotools")
pytest.importorskip("scipy")

SMALL_HEADS: dict[str, dict[str, Any]] = {
    "semantic_segmentation": {"hidden_size": 8},
    "detection": {"hidden_size": 16, "queries": 8, "decoder_layers": 1},
    "instance_segmentation": {"hidden_size": 32, "queries": 4, "decoder_layers": 1, "points": 32},
}
DENSE = [name for name, task in TASKS.items() if issubclass(task, DenseTask)]
PATCHES = ("equissl", "late_cls", "dinov2", "dinov2_with_registers", "converted_vit", "converted_mae")
NO_BACKBONE = {"vit": "Convert it", "mae": "Convert it", "ijepa": "does not convert .*: it has no CLS token"}
STAGES = ("resnet", "swin", "convnext")


def encoder_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind.startswith("converted_"):
        return convert_encoder(encoder_of(kind.removeprefix("converted_")))
    if kind in ("equissl", "late_cls"):
        return equissl(cls_insertion_layer=1 if kind == "late_cls" else 0)
    if kind == "mae":
        return ViTMAEModel(ViTMAEConfig(**SMALL, intermediate_size=64))
    if kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        return ResNetModel(ResNetConfig(**sizes))
    if kind == "swin":
        sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}
        return SwinModel(SwinConfig(**sizes, image_size=32, patch_size=4))
    if kind == "convnext":
        return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
    return stock(kind)  # type: ignore[return-value]


def sample_of(task: Any, seed: int) -> dict[str, Any]:
    """A noisy image with a label of the task's kind."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (40, 48, 3)).astype(np.uint8))
    labels = {
        "mask": rng.integers(0, 2, (40, 48)).astype(np.int32),
        "depth": rng.uniform(1, 5, (40, 48)).astype(np.float32),
        "objects": [
            {
                "label": 1,
                "bbox": [8.0, 4.0, 24.0, 30.0],
                "area": 720.0,
                "segmentation": [[8, 4, 32, 4, 32, 34, 8, 34]],
            }
        ],
    }
    wanted = {name: labels[name] for name in task.blank() if name in labels}
    if "person" in task.blank():
        points = np.column_stack([rng.uniform(12, 36, (task.num_points(), 2)), np.full(task.num_points(), 2)])
        wanted["person"] = Person(0, points, (24.0, 20.0), (20.0, 30.0))
    if "pair" in task.blank():
        image, wanted["pair"] = image.convert("L").resize((320, 240)), seed
    return {"image": image, **wanted}


def prepared(name: str) -> Any:
    task = make_task(name, SMALL_HEADS.get(name, {}))
    if name == "keypoints":
        task.names = ("nose", "left_hand", "right_hand")
    return task


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("kind", PATCHES)
def test_a_step_and_a_judgement(kind: str, name: str, tmp_path: Path) -> None:
    source = save(encoder_of(kind), tmp_path / kind)
    task = prepared(name)
    classes = [f"class {number}" for number in range(16 if name == "mpii_keypoints" else 3)]
    model = task.load_model(source, classes)
    task.bind(
        FineTuningSettings(encoder=source, data="d", output_dir="o", task=name),
        EncoderInput(32, (0.5,) * 3, (0.25,) * 3),
    )
    samples = [task.transform(sample_of(task, seed), np.random.default_rng(seed)) for seed in (0, 1)]
    optimizer = torch.optim.AdamW(model.train().parameters())
    for _ in range(2):  # the homography's head starts at 0, and lets no gradient through in the first step
        optimizer.zero_grad()
        step = task.loss(model, task.to_inputs(task.collate(samples)))
        step.loss.backward()
        assert step.loss.isfinite()
        optimizer.step()
    reached = [p.grad is not None and bool(p.grad.any()) for p in task.encoder(model).parameters()]
    assert sum(reached) > len(reached) / 2

    batch = task.collate([task.transform(sample_of(task, seed), None) for seed in (2, 3)])
    with torch.no_grad():
        judged = task.judge(task.loss(model.eval(), task.to_inputs(batch)).output, batch)
    assert all(len(part) == 2 for part in _leaves(judged))


@pytest.mark.parametrize("kind", [*NO_BACKBONE, *STAGES])
def test_what_heads_cannot_be_put_on_is_refused(kind: str, tmp_path: Path) -> None:
    source = save(encoder_of(kind), tmp_path / kind)
    for name in DENSE:
        reason = NO_BACKBONE.get(kind, "has stages of falling resolution, and .* does not convert")
        with pytest.raises(UnfitEncoderError, match=f"(?s){kind}.*{reason}"):
            prepared(name).check_encoder(source)


def test_layers_that_fit_no_pyramid(tmp_path: Path) -> None:
    source = save(equissl(), tmp_path / "two_blocks")
    for name in ("detection", "instance_segmentation"):
        task = make_task(name, {**SMALL_HEADS[name], "layers": (1, 2)})
        with pytest.raises(ValueError, match=r"layers \(--set layers\) is \(1, 2\): .* a pyramid of 4 levels"):
            task.load_model(source, ("a",))
        assert prepared(name).reads(prepared(name).load_model(source, ("a",))) == "layers 2"


def _leaves(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    return [leaf for value in (values.values() if isinstance(values, dict) else values) for leaf in _leaves(value)]
