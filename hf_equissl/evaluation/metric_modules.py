"""``evaluate.Metric`` classes over ``metrics.py``: used directly or in ``evaluate.combine``; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch

from . import metrics

_R2_CITATION = "R2 = 1 - RSS / TSS; scalar form as in https://github.com/facebookresearch/SIE"


class R2Metric(evaluate.Metric):
    """``{"r2", "r2_scalar"}`` of predictions and references, each a list of p numbers per sample.

    ``r2`` is the mean over parameters of R2 around each parameter's own mean, ``r2_scalar`` uses one mean over all
    entries. Batches may be given one after the other (``add_batch``); the result is that of the whole set.
    """

    def _info(self) -> evaluate.MetricInfo:
        # List without a length: one class serves families with different numbers of parameters.
        numbers = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Coefficient of determination of regressed transformation parameters.",
            citation=_R2_CITATION,
            inputs_description="predictions, references: one list of p floats per sample.",
            features=datasets.Features({"predictions": numbers, "references": numbers}),
        )

    def _compute(self, *, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        return {
            "r2": metrics.r2_mean(predictions, references),
            "r2_scalar": metrics.r2_scalar(predictions, references),
        }


class TopKAccuracyMetric(evaluate.Metric):
    """``{"top1", "topk", "mean_per_class"}`` of each sample's k most probable classes, the first one first.

    The key of the second is the number: ``top5`` for five classes per sample; with one it is left out. Ranked classes
    instead of logits: k numbers per sample, however many classes there are.
    """

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Share of samples whose class is the most probable one, and among the k most probable ones.",
            citation="",
            inputs_description="predictions: k class ids per sample, most probable first; references: one class id.",
            features=datasets.Features({"predictions": classes, "references": datasets.Value("int64")}),
        )

    def _compute(self, *, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        ranked, labels = torch.as_tensor(predictions), torch.as_tensor(references)
        first = ranked[:, 0]
        result = {"top1": metrics.top1_accuracy(first, labels)}
        if (k := ranked.shape[1]) > 1:
            result[f"top{k}"] = (ranked == labels[:, None]).any(1).double().mean().item()
        result["mean_per_class"] = metrics.mean_per_class_accuracy(first, labels)
        return result
