from __future__ import annotations

import sys

import pytest
import torch
from torchmetrics import R2Score
from torchmetrics.classification import MulticlassAccuracy

from hf_equissl.evaluation import metrics
from tests import processes


def test_two_forms_of_r2_by_hand() -> None:
    targets = torch.tensor([[0.0, 10.0], [2.0, 10.5], [4.0, 9.5]])
    predictions = torch.tensor([[1.0, 10.0], [2.0, 10.0], [3.0, 10.0]])
    # Column 1: RSS 1 + 0 + 1, TSS 4 + 0 + 4. Column 2: RSS = TSS = 0.5, as the prediction is its mean.
    assert metrics.r2_per_parameter(predictions, targets).tolist() == pytest.approx([0.75, 0.0])
    # One mean, 6, over all entries: TSS = 36 + 16 + 4 + 16 + 20.25 + 12.25 = 104.5, RSS = 2.5.
    assert metrics.r2_scalar(predictions, targets) == pytest.approx(1 - 2.5 / 104.5)


def test_r2_equals_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(501, 3, generator=generator, dtype=torch.float64) * 2 - 1
    predictions = targets + torch.randn(501, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 0.5, 2])
    reference = R2Score(multioutput="raw_values")
    reference.update(predictions, targets)
    assert torch.allclose(metrics.r2_per_parameter(predictions, targets), reference.compute().double(), atol=1e-6)


def test_one_parameter_makes_both_forms_equal() -> None:
    targets = torch.linspace(-1, 1, 20)
    predictions = 0.7 * targets + 0.1
    assert metrics.r2_per_parameter(predictions, targets).item() == pytest.approx(
        metrics.r2_scalar(predictions, targets)
    )


def test_r2_of_what_does_not_vary_is_an_error() -> None:
    with pytest.raises(ValueError, match="undefined"):
        metrics.r2_per_parameter(torch.zeros(5), torch.full((5,), 0.3))
    with pytest.raises(ValueError, match="one shape"):
        metrics.r2_per_parameter(torch.zeros(5), torch.zeros(6))


def test_accuracies_equal_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(300, 12, generator=generator), torch.randint(0, 12, (300,), generator=generator)
    for k in (1, 5):
        reference = MulticlassAccuracy(num_classes=12, top_k=k, average="micro")(logits, labels)
        assert metrics.topk_accuracy(logits, labels, k) == pytest.approx(reference.item())
    predicted = logits.argmax(1)
    reference = MulticlassAccuracy(num_classes=12, average="macro")(predicted, labels)
    assert metrics.mean_per_class_accuracy(predicted, labels) == pytest.approx(reference.item())
    assert metrics.top1_accuracy(predicted, labels) == pytest.approx(metrics.topk_accuracy(logits, labels, 1))
    with pytest.raises(ValueError, match="number of classes"):
        metrics.topk_accuracy(logits, labels, 13)


def test_evaluate_metrics_work_without_network() -> None:
    code = """
import socket
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = refuse
import evaluate
from hf_equissl.evaluation.metric_modules import R2Metric, TopKAccuracyMetric
t = [[0.0, 10.0], [2.0, 10.5], [4.0, 9.5]]; p = [[1.0, 10.0], [2.0, 10.0], [3.0, 10.0]]
r = R2Metric().compute(predictions=p, references=t)
assert abs(r["r2"] - 0.375) < 1e-9 and abs(r["r2_scalar"] - (1 - 2.5 / 104.5)) < 1e-9, r
metric = R2Metric()
metric.add_batch(predictions=p[:2], references=t[:2]); metric.add_batch(predictions=p[2:], references=t[2:])
assert metric.compute() == r
a = TopKAccuracyMetric().compute(predictions=[[0], [1], [1], [2]], references=[0, 1, 2, 2])
assert a == {"top1": 0.75, "mean_per_class": (1 + 1 + 0.5) / 3}, a
both = evaluate.combine([TopKAccuracyMetric(), TopKAccuracyMetric()])
assert any(value == 0.75 for value in both.compute(predictions=[[0], [1], [1], [2]], references=[0, 1, 2, 2]).values())
"""
    done = processes.run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_a_metric_shows_its_numbers() -> None:
    assert metrics.TOP1.text(0.71254, 0.0031) == "71.25 +- 0.31"
    assert metrics.Metric("mean_error", "px", digits=1, higher_is_better=False).text(3.14159) == "3.1 px"
    assert metrics.TOP1.round(0.712549) == 0.7125
