"""Frozen-encoder evaluation: what an encoder's features say about transformations and about classes.

``EVALUATORS`` names the evaluators, ``build_evaluator`` makes one, ``PROTOCOLS`` holds their settings for full-size and
for small images. ``evaluate.Metric`` classes live in ``hf_equissl.evaluation.metric_modules``.
"""

from __future__ import annotations

import inspect
from typing import Any

from ..utils.suggestions import check_keys, check_known
from .base import Evaluator
from .data import image_set, load_evaluation_data
from .effective_rank import EffectiveRankEvaluator
from .images import EvaluationData, ImageSet
from .knn import KNNEvaluator
from .linear import LinearEvaluator
from .metrics import Metric
from .protocols import PROTOCOLS
from .report import markdown_table, plain_table, plot_r2
from .results import ResultRecord, as_logs, load_records, merge_records, save_records
from .transformation_regression import TransformationRegressionEvaluator

EVALUATORS: dict[str, type[Evaluator]] = {
    "effective_rank": EffectiveRankEvaluator,
    "knn": KNNEvaluator,
    "linear": LinearEvaluator,
    "transformation_regression": TransformationRegressionEvaluator,
}


def build_evaluator(name: str, data: EvaluationData, *, protocol: str = "full", **settings: Any) -> Evaluator:
    """An evaluator of the registry, with the settings of a protocol and ``settings`` on top.

    Args:
        name: Key of ``EVALUATORS``.
        data: What it is given.
        protocol: "full" (the protocol for 224-pixel images) or "small" (32 to 64 pixels, minutes on one CPU core).
        **settings: Arguments of the evaluator.

    Raises:
        ValueError: for unknown names, with the nearest known one.
    """
    check_known(name, EVALUATORS, "evaluator")
    check_known(protocol, PROTOCOLS, "protocol")
    evaluator = EVALUATORS[name]
    merged = {**PROTOCOLS[protocol].get(name, {}), **settings}
    check_keys(merged, [key for key in inspect.signature(evaluator).parameters if key != "data"], f"evaluator {name!r}")
    return evaluator(data, **merged)


__all__ = [
    "EVALUATORS",
    "PROTOCOLS",
    "EffectiveRankEvaluator",
    "EvaluationData",
    "Evaluator",
    "ImageSet",
    "KNNEvaluator",
    "LinearEvaluator",
    "Metric",
    "ResultRecord",
    "TransformationRegressionEvaluator",
    "as_logs",
    "build_evaluator",
    "image_set",
    "load_evaluation_data",
    "load_records",
    "markdown_table",
    "merge_records",
    "plain_table",
    "plot_r2",
    "save_records",
]
