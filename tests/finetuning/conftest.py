"""Tiny encoders of several kinds and class folders that a tiny network can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaModel,
    ViTConfig,
    ViTModel,
)

from hf_equissl.encoders.export import image_processor
from hf_equissl.finetuning import FineTuningSettings
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
STOCK = ("dinov2", "dinov2_with_registers", "vit", "ijepa")
CLASSES = ("blue", "green", "red")


def equissl(seed: int = 0, **changes: Any) -> EquiSSLModel:
    torch.manual_seed(seed)
    config = {**SMALL, "feature_size": 24, "equivariant_size": 8, "layerscale_value": 1.0, **changes}
    return EquiSSLModel(EquiSSLConfig(**config))


def stock(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**SMALL))
    if kind == "dinov2_with_registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL))
    if kind == "ijepa":
        return IJepaModel(IJepaConfig(**SMALL, intermediate_size=64))
    return ViTModel(ViTConfig(**SMALL, intermediate_size=64), add_pooling_layer=False)


def save(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    image_processor(32, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoders")
    found = {"equissl": save(equissl(), root / "equissl"), "other": save(equissl(seed=1), root / "other")}
    found["wide"] = save(equissl(hidden_size=48), root / "wide")
    return found | {kind: save(stock(kind), root / kind) for kind in STOCK}


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory) -> str:
    """train/ and test/ with a folder per class: 32-pixel images whose colour is the class, with noise."""
    root = tmp_path_factory.mktemp("flags")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                picture = rng.integers(0, 120, (32, 32, 3))
                picture[..., 2 - number] += 120
                Image.fromarray(picture.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return str(root)


@pytest.fixture
def settings(encoders: dict[str, str], flags: str, tmp_path: Path) -> Any:
    """Settings of a run of a few steps; keywords change them."""

    def make(encoder: str = "equissl", **changes: Any) -> FineTuningSettings:
        given = {"output_dir": str(tmp_path / "run"), "batch_size": 8, "epochs": 2, "learning_rate": 3e-3, **changes}
        return FineTuningSettings(encoder=encoders.get(encoder, encoder), data=flags, **given)

    return make
