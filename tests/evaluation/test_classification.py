from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import EvaluationData, ImageSet, KNNEvaluator, LinearEvaluator, build_evaluator
from hf_equissl.evaluation.knn import knn_votes
from hf_equissl.evaluation.probes import fit_linear_lbfgs, fit_linear_steps

from .conftest import PixelEncoder, coloured


@pytest.mark.parametrize("solver", ["adamw", "lbfgs"])
def test_linear_probe_finds_what_is_there(colours: EvaluationData, pixels_8: FrozenEncoder, solver: str) -> None:
    evaluator = LinearEvaluator(colours, solver=solver, epochs=15, batch_size=64, features=("cls",))
    records = evaluator(pixels_8)
    assert [record.metric for record in records] == ["top1", "top5"]
    assert records[0].value > 0.95
    assert records[1].value >= records[0].value
    assert records[0].details["chosen"][0] in evaluator.candidates
    assert records[0].details["mean_per_class"][0] > 0.9


@pytest.mark.parametrize("solver", ["adamw", "lbfgs"])
def test_random_labels_score_chance(shuffled_colours: EvaluationData, pixels_8: FrozenEncoder, solver: str) -> None:
    record = LinearEvaluator(shuffled_colours, solver=solver, epochs=3, features=("cls",))(pixels_8)[0]
    assert abs(record.value - 1 / 12) < 0.09
    assert abs(KNNEvaluator(shuffled_colours)(pixels_8)[0].value - 1 / 12) < 0.09


def test_knn(colours: EvaluationData, pixels_8: FrozenEncoder) -> None:
    evaluator = KNNEvaluator(colours, features=("cls", "backbone"), k=5)
    records = evaluator(pixels_8)
    assert [(record.metric, record.features) for record in records if record.primary] == [("top1", "cls")]
    assert records[0].value > 0.95
    assert records[0].to_dict()["values"] == evaluator(pixels_8)[0].to_dict()["values"]


@pytest.fixture
def tokens_8() -> FrozenEncoder:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4
    )
    return FrozenEncoder(Dinov2Model(config), image_size=8)


def test_linear_protocols_of_ser_and_dinov2(colours: EvaluationData, tokens_8: FrozenEncoder) -> None:
    ser = build_evaluator("linear_ser", colours, epochs=20, batch_size=64)
    ser.check(tokens_8)
    record = ser(tokens_8)[0]
    assert (record.features, record.metric, record.protocol["solver"]) == ("cls_4", "top1", "sgd")
    assert record.value > 0.3  # of twelve classes
    assert record.details["chosen"][0] in (1.0, 3.0, 10.0)
    assert build_evaluator("linear_ser", colours, iterations=7).settings("")["iterations"] == 7
    assert build_evaluator("linear_dinov2", colours, epochs=3).settings("")["epochs"] == 3
    assert build_evaluator("linear_dinov2", colours).settings("")["iterations"] == 12_500
    dinov2 = build_evaluator("linear_dinov2", colours, iterations=40, batch_size=128, seeds=2)
    dinov2.check(tokens_8)
    records = dinov2(tokens_8)
    best = records[0]
    assert [(record.features, record.metric) for record in records] == [("best_of_4", "top1"), ("best_of_4", "top5")]
    assert set(best.details["features"]) <= set(dinov2.features)
    # The choice is that of the held-out images: no kind alone did better on them.
    alone = dinov2.fit(tokens_8, dinov2.features, (0, 1))
    for position, seed in enumerate((0, 1)):
        assert best.details["held_out"][position] == max(alone[name, seed].held_out for name in dinov2.features)
        chosen = alone[best.details["features"][position], seed]
        assert best.details["chosen"][position] == chosen.chosen
    assert not dinov2.missing_seeds(tokens_8, "classification", records)
    with pytest.raises(ValueError, match="has no features"):
        build_evaluator("linear_ser", colours).check(FrozenEncoder(PixelEncoder(), image_size=8))


def test_sgd_equals_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 5, generator=generator), torch.randint(0, 4, (40,), generator=generator)
    settings = {"seed": 7, "epochs": 9, "batch_size": 40, "optimizer": "sgd", "iterations": 4}
    weight, _ = fit_linear_steps(features, labels, 4, (0.5,), **settings)
    layer = torch.nn.Linear(5, 4)
    start = torch.randn(4, 5, generator=torch.Generator().manual_seed(7)) * 0.01
    layer.load_state_dict({"weight": start, "bias": torch.zeros(4)})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(layer(features), labels).backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(weight[0], layer.weight, atol=1e-5)


def test_knn_votes_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 3.0]])
    labels = torch.tensor([0, 1, 2, 1])
    votes = knn_votes(bank, labels, torch.tensor([[5.0, 0.0]]), 3, k=2, temperature=0.5, chunk_size=1)
    # Nearest: (1, 0) with cosine 1, then (3, 3) with cosine sqrt(1/2).
    expected = torch.tensor([[torch.e**2, torch.e ** (2 * 0.5**0.5), 0.0]])
    assert torch.allclose(votes, expected, rtol=1e-5)


def test_same_seed_same_number(colours: EvaluationData, pixels_8: FrozenEncoder) -> None:
    settings = {"epochs": 2, "features": ("cls",), "candidates": (1e-3, 1e-2)}
    pair = LinearEvaluator(colours, seeds=(0, 1), **settings)(pixels_8)[0]
    alone = LinearEvaluator(colours, seeds=(1,), **settings)(pixels_8)[0]
    assert pair.values[1] == alone.values[0]
    assert pair.details["chosen"][1] == alone.details["chosen"][0]


def test_choice_never_sees_the_test_images(colours: EvaluationData, pixels_8: FrozenEncoder) -> None:
    chosen = LinearEvaluator(colours, epochs=2, features=("cls",))(pixels_8)[0].details["chosen"]
    images, labels = coloured(120, 1, 12)
    broken = EvaluationData(colours.train, ImageSet(images, (labels + 1) % 12, "colours", "test", progress=False))
    assert LinearEvaluator(broken, epochs=2, features=("cls",))(pixels_8)[0].details["chosen"] == chosen


def test_lbfgs_reaches_the_optimum_that_sklearn_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 6, generator=generator), torch.randint(0, 3, (200,), generator=generator)
    penalties = (1e-3, 1e-1)
    weights, biases = fit_linear_lbfgs(features, labels, 3, penalties, max_iterations=500)
    for penalty, weight, bias in zip(penalties, weights, biases, strict=True):
        # sklearn: C * sum CE + 1/2 ||W||^2, so C = 1 / (n * penalty)
        reference = LogisticRegression(C=1 / (200 * penalty), tol=1e-8, max_iter=1000).fit(features, labels)
        expected = torch.from_numpy(reference.coef_).float()
        assert torch.allclose(weight, expected, atol=5e-3)
        shift = bias - torch.from_numpy(reference.intercept_).float()
        assert torch.allclose(shift, shift.mean().expand(3), atol=5e-3)


def test_side_by_side_equals_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(90, 5, generator=generator), torch.randint(0, 4, (90,), generator=generator)
    settings = {"seed": 3, "epochs": 3, "batch_size": 30}
    weights, biases = fit_linear_steps(features, labels, 4, (1e-3, 1e-1), **settings)
    assert not torch.allclose(weights[0], weights[1])
    for position, rate in enumerate((1e-3, 1e-1)):
        weight, bias = fit_linear_steps(features, labels, 4, (rate,), **settings)
        assert torch.allclose(weight[0], weights[position], atol=1e-5)
        assert torch.allclose(bias[0], biases[position], atol=1e-5)


def test_adamw_equals_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 5, generator=generator), torch.randint(0, 4, (40,), generator=generator)
    weight, bias = fit_linear_steps(features, labels, 4, (1e-2,), seed=7, epochs=4, batch_size=40)
    layer = torch.nn.Linear(5, 4)
    start = torch.randn(4, 5, generator=torch.Generator().manual_seed(7)) * 0.01
    layer.load_state_dict({"weight": start, "bias": torch.zeros(4)})
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for _ in range(4):  # whole batches: their order is all that differs
        optimizer.zero_grad()
        F.cross_entropy(layer(features), labels).backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(weight[0], layer.weight, atol=1e-5)
    assert torch.allclose(bias[0], layer.bias, atol=1e-5)


@pytest.mark.parametrize("evaluator", [LinearEvaluator, KNNEvaluator])
def test_labels_are_required(evaluator: type, ramps: EvaluationData, colours: EvaluationData) -> None:
    with pytest.raises(ValueError, match=r"needs labels.*--label_column"):
        evaluator(ramps)
    colours.test.labels[3] = -1
    with pytest.raises(ValueError, match=r"1 of 120 images.*unlabelled"):
        evaluator(colours)


def test_registry_names_the_nearest(colours: EvaluationData) -> None:
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        build_evaluator("liner", colours)
    with pytest.raises(ValueError, match="Did you mean 'epochs'"):
        build_evaluator("linear", colours, epoch=3)
    assert build_evaluator("linear", colours, protocol="small").solver == "lbfgs"
