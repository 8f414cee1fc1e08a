"""Accuracy of ranked classes: against the accuracy of the logits that they were ranked by."""

from __future__ import annotations

import evaluate
import pytest
import torch

from hf_equissl.evaluation.metric_modules import TopKAccuracyMetric
from hf_equissl.evaluation.metrics import mean_per_class_accuracy, topk_accuracy


def test_ranked_classes_give_the_accuracy_of_their_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 12, generator=generator)
    labels = torch.randint(12, (200,), generator=generator)
    ranked = logits.topk(5, dim=1).indices
    metric = TopKAccuracyMetric(keep_in_memory=True)
    for rows in torch.arange(200).split(64):
        metric.add_batch(predictions=ranked[rows].tolist(), references=labels[rows].tolist())
    result = metric.compute()
    assert result["top1"] == pytest.approx(topk_accuracy(logits, labels, 1))
    assert result["top5"] == pytest.approx(topk_accuracy(logits, labels, 5))
    assert 0 < result["top1"] < result["top5"] < 1
    assert result["mean_per_class"] == pytest.approx(mean_per_class_accuracy(logits.argmax(1), labels))


def test_one_class_per_sample_is_top_1_alone() -> None:
    both = evaluate.combine([TopKAccuracyMetric(keep_in_memory=True)])
    assert both.compute(predictions=[[1], [0], [2]], references=[1, 1, 2]) == {
        "top1": pytest.approx(2 / 3),
        "mean_per_class": pytest.approx(0.75),
    }
