"""The evaluators by name; nothing else has to name them."""

from __future__ import annotations

from typing import Any

from ..utils.coercion import check_arguments
from ..utils.registry import Registry
from ..utils.suggestions import check_known
from .base import Evaluator
from .corruptions import CorruptionsEvaluator
from .data import EvaluationData
from .effective_rank import EffectiveRankEvaluator
from .equivariance import EquivarianceEvaluator, LayerwiseEquivarianceEvaluator
from .knn import KNNEvaluator
from .lie_derivative import LieDerivativeEvaluator
from .linear import LinearEvaluator
from .linear_protocols import DINOv2LinearEvaluator, SERLinearEvaluator
from .protocols import PROTOCOLS
from .rendered_prediction import RenderedPredictionEvaluator
from .results import ResultRecord
from .three_die_bench import RenderedClassEvaluator, RenderedPoseEvaluator
from .transformation_regression import TransformationRegressionEvaluator

# In the order of tables. ``@EVALUATORS.register("mine")`` adds one from anywhere.
EVALUATORS = Registry(
    "evaluator",
    Evaluator,
    {
        "transformation_regression": TransformationRegressionEvaluator,
        "equivariance": EquivarianceEvaluator,
        "equivariance_by_block": LayerwiseEquivarianceEvaluator,
        "lie_derivative": LieDerivativeEvaluator,
        "linear": LinearEvaluator,
        "linear_ser": SERLinearEvaluator,
        "linear_dinov2": DINOv2LinearEvaluator,
        "corruptions": CorruptionsEvaluator,
        "knn": KNNEvaluator,
        "effective_rank": EffectiveRankEvaluator,
        "rendered_class": RenderedClassEvaluator,
        "rendered_pose": RenderedPoseEvaluator,
        "rendered_prediction": RenderedPredictionEvaluator,
    },
)


def evaluator_of(record: ResultRecord) -> type[Evaluator]:
    """Return the class that made a record, or ``Evaluator`` itself where that is not known here."""
    return EVALUATORS.get(record.evaluator, Evaluator)


def build_evaluator(name: str, data: EvaluationData, *, protocol: str = "full", **settings: Any) -> Evaluator:
    """Build an evaluator of the registry, with the settings of a protocol and ``settings`` on top.

    Args:
        name: Key of ``EVALUATORS``.
        data: What it is given.
        protocol: "full" (the protocol for 224-pixel images) or "small" (32 to 64 pixels, minutes on one CPU core).
        **settings: Arguments of the evaluator.

    Raises:
        ValueError: for unknown names, with the nearest known one, and for values of a wrong type.
    """
    check_known(protocol, PROTOCOLS, "protocols")
    evaluator = EVALUATORS[name]
    return evaluator(
        data, **check_arguments({**evaluator.protocols.get(protocol, {}), **settings}, evaluator, name, skip=("data",))
    )
