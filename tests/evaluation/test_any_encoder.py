"""Every evaluator of images runs on every kind of encoder that AutoModel loads, or says in a sentence why not."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel, ResNetConfig, ResNetModel

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import EVALUATORS, EvaluationData, ImageSet, build_evaluator
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from tests.encoders.test_frozen import TINY, tiny

from .conftest import coloured

QUICK = {
    "transformation_regression": {
        "families": ["flip"],
        "epochs": 1,
        "num_draws": 1,
        "hidden_width": 16,
        "progress": False,
    },
    "linear": {"epochs": 1, "candidates": [1e-3]},
    "linear_ser": {"epochs": 1},
    "linear_dinov2": {"iterations": 2, "candidates": [1e-3, 1e-2]},
    "knn": {"k": 3},
}
# What a convolutional network lacks.
OF_TRANSFORMERS = {"linear_ser": "has no features", "linear_dinov2": "has no features"}


@pytest.fixture(scope="module")
def data() -> EvaluationData:
    return EvaluationData(*(ImageSet(*coloured(40, seed, 3, size=16), progress=False) for seed in (0, 1)))


def encoder_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "equissl":
        return EquiSSLModel(EquiSSLConfig(**TINY))
    if kind == "late_cls":
        return EquiSSLModel(EquiSSLConfig(**TINY, cls_insertion_layer=1))
    if kind == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
        return ResNetModel(ResNetConfig(**sizes, image_size=16))
    return tiny(kind)


@pytest.mark.parametrize("kind", ["equissl", "late_cls", "dinov2", "registers", "vit", "ijepa", "mae", "resnet"])
def test_every_evaluator_on_every_encoder(kind: str, data: EvaluationData) -> None:
    encoder = FrozenEncoder(encoder_of(kind), image_size=16, image_mean=[0.5] * 3, image_std=[0.2] * 3)
    names = [name for name, each in EVALUATORS.items() if each.data_type is EvaluationData and name != "corruptions"]
    for name in names:
        evaluator = build_evaluator(name, data, **QUICK.get(name, {}))
        if kind == "resnet" and name in OF_TRANSFORMERS:
            with pytest.raises(ValueError, match=OF_TRANSFORMERS[name]):
                evaluator.check(encoder)
            continue
        evaluator.check(encoder)
        records = evaluator(encoder)
        assert records, name
        assert all(math.isfinite(record.value) for record in records), name
        assert not evaluator.missing_seeds(encoder, evaluator.tasks[0], records), name
