"""Two tiny encoders with their probes, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_equissl.demo import Analyst, fit_angle_probe
from hf_equissl.demo.angle_probe import PROBE_FILE
from hf_equissl.encoders import FrozenEncoder, save_encoder
from hf_equissl.evaluation import EvaluationData
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
DECODERS = {"decoder_type": "conv", "num_intermediate_images": 2, "decoder_widths": [4, 4, 4]}


def tiny_encoder(folder: Path, seed: int, **fields: object) -> Path:
    torch.manual_seed(seed)
    config = EquiSSLConfig(**SIZES, feature_size=16, equivariant_size=8, **fields)  # type: ignore[arg-type]
    return save_encoder(EquiSSLModel(config), folder, [0.5, 0.45, 0.4], [0.25, 0.2, 0.3])


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> dict[str, Path]:
    """A base and an encoder with decoders, the latter with a probe."""
    folder = tmp_path_factory.mktemp("encoders")
    found = {"base": tiny_encoder(folder / "base", 0), "painter": tiny_encoder(folder / "painter", 1, **DECODERS)}
    data = EvaluationData.load(str(photo_folder), train_images=24, test_images=8, progress=False)
    fit_angle_probe(FrozenEncoder(found["painter"]), data).save(found["painter"] / PROBE_FILE)
    return found


@pytest.fixture(scope="session")
def analyst(encoders: dict[str, Path], photo_folder: Path) -> Analyst:
    return Analyst(encoders, photo_folder)
