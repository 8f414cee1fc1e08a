"""Frozen-encoder evaluation: what an encoder's features say about transformations and about classes.

``EVALUATORS`` holds the evaluators and registers others, ``build_evaluator`` makes one with the settings of a protocol.
``evaluate.Metric`` classes live in ``hf_equissl.evaluation.metric_modules``. Names are imported when they are first
used, so that reading records or listing evaluators does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy_names import import_when_used

__all__ = [
    "EVALUATORS",
    "NAMED_SETS",
    "PROTOCOLS",
    "CorruptionsEvaluator",
    "DINOv2LinearEvaluator",
    "EffectiveRankEvaluator",
    "EquivarianceEvaluator",
    "EvaluationData",
    "Evaluator",
    "ImageSet",
    "KNNEvaluator",
    "LabelPropagationEvaluator",
    "LayerwiseEquivarianceEvaluator",
    "LieDerivativeEvaluator",
    "LinearEvaluator",
    "Metric",
    "NamedSet",
    "Plot",
    "RenderedClassEvaluator",
    "RenderedPoseEvaluator",
    "RenderedPredictionEvaluator",
    "ResultRecord",
    "SERLinearEvaluator",
    "TransformationRegressionEvaluator",
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

if TYPE_CHECKING:
    from .base import Evaluator, Plot
    from .corruptions import CorruptionsEvaluator
    from .data import EvaluationData, image_set, load_evaluation_data
    from .effective_rank import EffectiveRankEvaluator
    from .equivariance import EquivarianceEvaluator, LayerwiseEquivarianceEvaluator
    from .images import ImageSet
    from .knn import KNNEvaluator
    from .label_propagation import LabelPropagationEvaluator
    from .lie_derivative import LieDerivativeEvaluator
    from .linear import LinearEvaluator
    from .linear_protocols import DINOv2LinearEvaluator, SERLinearEvaluator
    from .metric import Metric
    from .named_sets import NAMED_SETS, NamedSet
    from .protocols import PROTOCOLS
    from .r2_plot import plot_r2
    from .registry import EVALUATORS, build_evaluator
    from .rendered_prediction import RenderedPredictionEvaluator
    from .report import markdown_table, plain_table
    from .results import ResultRecord, load_records, merge_records, save_records
    from .three_die_bench import RenderedClassEvaluator, RenderedPoseEvaluator
    from .transformation_regression import TransformationRegressionEvaluator

__getattr__, __dir__ = import_when_used(
    __name__,
    __all__,
    {
        "EVALUATORS": "registry",
        "NAMED_SETS": "named_sets",
        "PROTOCOLS": "protocols",
        "CorruptionsEvaluator": "corruptions",
        "DINOv2LinearEvaluator": "linear_protocols",
        "EffectiveRankEvaluator": "effective_rank",
        "EquivarianceEvaluator": "equivariance",
        "EvaluationData": "data",
        "Evaluator": "base",
        "ImageSet": "images",
        "KNNEvaluator": "knn",
        "LabelPropagationEvaluator": "label_propagation",
        "LayerwiseEquivarianceEvaluator": "equivariance",
        "LieDerivativeEvaluator": "lie_derivative",
        "LinearEvaluator": "linear",
        "Metric": "metric",
        "NamedSet": "named_sets",
        "Plot": "base",
        "RenderedClassEvaluator": "three_die_bench",
        "RenderedPoseEvaluator": "three_die_bench",
        "RenderedPredictionEvaluator": "rendered_prediction",
        "ResultRecord": "results",
        "SERLinearEvaluator": "linear_protocols",
        "TransformationRegressionEvaluator": "transformation_regression",
        "build_evaluator": "registry",
        "image_set": "data",
        "load_evaluation_data": "data",
        "load_records": "results",
        "markdown_table": "report",
        "merge_records": "results",
        "plain_table": "report",
        "plot_r2": "r2_plot",
        "save_records": "results",
    },
)
