"""Evaluation of many images: features lie in memory once, and what is done in pieces gives the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_equissl.benchmarking import features as measuring
from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import (
    EffectiveRankEvaluator,
    EquivarianceEvaluator,
    EvaluationData,
    ImageSet,
    KNNEvaluator,
    LinearEvaluator,
    TransformationRegressionEvaluator,
)
from hf_equissl.evaluation.feature_store import FeatureStore
from hf_equissl.evaluation.knn import knn_votes
from hf_equissl.evaluation.probes import fit_linear_lbfgs, fit_linear_steps


def votes_of_all_at_once(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, k: int) -> torch.Tensor:
    """One product of all pairs in float64."""
    train, test = F.normalize(train.double(), dim=1), F.normalize(test.double(), dim=1)
    similarity, neighbours = (test @ train.T).topk(k, dim=1)
    votes = torch.zeros(len(test), 7, dtype=torch.float64)
    return votes.scatter_add_(1, labels[neighbours], (similarity / 0.07).exp())


@pytest.mark.parametrize(("images", "chunk", "block"), [(300, 1024, 32_768), (300, 32, 64), (300, 7, 13), (30, 1, 1)])
def test_neighbours_in_blocks_are_those_of_all(images: int, chunk: int, block: int) -> None:
    torch.manual_seed(0)
    train, test, labels = torch.randn(images, 16), torch.randn(50, 16), torch.randint(7, (images,))
    scores = knn_votes(train, labels, test, 7, k=20, temperature=0.07, chunk_size=chunk, block_size=block)
    torch.testing.assert_close(scores.double(), votes_of_all_at_once(train, labels, test, 20), rtol=1e-4, atol=0)


def test_rows_are_fitted_without_a_copy_of_them() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(90, 8), torch.randint(3, (90,))
    rows = torch.randperm(90)[:70]
    steps = {"seed": 1, "epochs": 3, "batch_size": 16}
    for chosen, of_part in (
        (
            fit_linear_steps(features, labels, 3, (0.1, 0.01), rows=rows, **steps),
            fit_linear_steps(features[rows], labels[rows], 3, (0.1, 0.01), **steps),
        ),
        (
            fit_linear_lbfgs(features, labels, 3, (0.1,), rows=rows),
            fit_linear_lbfgs(features[rows], labels[rows], 3, (0.1,)),
        ),
    ):
        assert all(torch.equal(a, b) for a, b in zip(chosen, of_part, strict=True))
        assert chosen[0].abs().max() > 0.05


def test_features_lie_side_by_side_once() -> None:
    store = FeatureStore(["cls", "patches"], rows=10)
    first, second = torch.randn(4, 3), torch.randn(2, 3)
    store.add({"cls": first, "patches": -first})
    store.add({"cls": second, "patches": -second})
    both = torch.cat([first, second])
    assert torch.equal(store.join(["cls"]), both)
    assert torch.equal(store.join(["cls", "patches"]), torch.cat([both, -both], 1))
    assert store.join(["patches", "cls"]) is None  # in another order
    assert store.join(["backbone"]) is None
    parts = [store.join(names) for names in (["cls"], ["patches"], ["cls", "patches"])]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_half_the_memory(colours: EvaluationData, pixels_8: FrozenEncoder) -> None:
    """Features in two bytes: numbers hardly change, and records of all evaluators that read them say so."""
    half = EvaluationData(*(
        ImageSet(part.images, part.labels, "d", part.split, progress=False, feature_storage="bf16")
        for part in (colours.train, colours.test)
    ))  # fmt: skip
    regression = {"families": ("color_jitter",), "seeds": 1, "epochs": 1, "num_draws": 1}
    for kind, settings, apart in (
        (KNNEvaluator, {}, 0.02),
        (LinearEvaluator, {"epochs": 5, "batch_size": 64}, 0.02),
        (EffectiveRankEvaluator, {}, 0.2),
        (TransformationRegressionEvaluator, regression, 0.1),
    ):
        full, short = (kind(data, features=("cls",), **settings)(pixels_8)[0] for data in (colours, half))
        assert abs(full.value - short.value) < apart
        assert full.value > 0.5 or not kind.needs_labels
        assert "feature_storage" not in full.protocol
        assert short.protocol["feature_storage"] == "bf16"
        assert short.comparability != full.comparability
    full, short = (EquivarianceEvaluator(data).protocol(pixels_8, "rotation") for data in (colours, half))
    assert full == short  # maps are not kept
    rows, stored = half.test.stored_features(pixels_8, ("cls",))
    assert stored["cls"].dtype is torch.bfloat16
    assert half.test.features(pixels_8, ("cls",))[1]["cls"].dtype is torch.float32
    exact = colours.test.features(pixels_8, ("cls",))[1]["cls"]
    torch.testing.assert_close(stored["cls"].float(), exact, rtol=1e-2, atol=1e-2)
    assert len(rows) == len(exact)
    with pytest.raises(ValueError, match=r"feature_storage.*Did you mean 'fp16'"):
        ImageSet(colours.test.images, feature_storage="fp61")


def test_the_measuring_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert measuring.main(["--images", "3000", "--width", "8", "--classes", "5", "--steps", "2", "--queries", "9"]) == 0
    said = capsys.readouterr().out
    assert [line.split("  ")[0] for line in said.splitlines()[1:]] == ["filled", "kNN", "linear probe"]
    assert measuring.main(["--images", "3"]) == 2
