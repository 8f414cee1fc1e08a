from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import EvaluationData, build_evaluator
from hf_equissl.evaluation.effective_rank import EffectiveRankEvaluator

from .conftest import ConstantEncoder


def test_rank_is_that_of_numpy(colours: EvaluationData, pixels_8: FrozenEncoder) -> None:
    rank, std = EffectiveRankEvaluator(colours, features=("cls",))(pixels_8)
    rows = colours.test.features(pixels_8, ("cls",))[1]["cls"].double().numpy()
    shares = np.linalg.svd(rows, compute_uv=False)
    shares = shares / shares.sum()
    assert rank.value == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert std.value == pytest.approx(unit.std(axis=0, ddof=1).mean(), rel=1e-5)
    assert (rank.primary, std.primary) == (True, False)


def test_a_constant_encoder_has_rank_one(colours: EvaluationData) -> None:
    encoder = FrozenEncoder(ConstantEncoder(), image_size=8, name="constant")
    rank, std = build_evaluator("effective_rank", colours)(encoder)
    assert rank.value == pytest.approx(1, abs=0.01)
    assert std.value == pytest.approx(0, abs=1e-6)


def test_one_image_has_no_rank(colours: EvaluationData) -> None:
    alone = EvaluationData(colours.train, colours.test.part(torch.tensor([3])))
    with pytest.raises(ValueError, match="at least 2 test images, got 1"):
        EffectiveRankEvaluator(alone)
