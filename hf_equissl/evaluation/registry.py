"""The evaluators by name; nothing else has to name them. Needs no torch before one is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..utils.registry import Later, Registry
from ..utils.suggestions import check_known
from .options import CLASS_FEATURES, REGRESSION_OPTIONS
from .protocols import PROTOCOLS

if TYPE_CHECKING:
    from .base import Evaluator
    from .data import EvaluationData
    from .results import ResultRecord

# In the order of tables. ``@EVALUATORS.register("mine")`` adds one from anywhere.
EVALUATORS: Registry[Evaluator] = Registry(
    "evaluator",
    Later(f"{__package__}.base", "Evaluator"),
    {
        "transformation_regression": Later(
            f"{__package__}.transformation_regression", "TransformationRegressionEvaluator", options=REGRESSION_OPTIONS
        ),
        "equivariance": Later(f"{__package__}.equivariance", "EquivarianceEvaluator", options=()),
        "equivariance_by_block": Later(f"{__package__}.equivariance", "LayerwiseEquivarianceEvaluator", options=()),
        "lie_derivative": Later(f"{__package__}.lie_derivative", "LieDerivativeEvaluator", options=()),
        "linear": Later(f"{__package__}.linear", "LinearEvaluator", options=(CLASS_FEATURES,)),
        "linear_ser": Later(f"{__package__}.linear_protocols", "SERLinearEvaluator", options=()),
        "linear_dinov2": Later(f"{__package__}.linear_protocols", "DINOv2LinearEvaluator", options=()),
        "corruptions": Later(f"{__package__}.corruptions", "CorruptionsEvaluator", options=()),
        "knn": Later(f"{__package__}.knn", "KNNEvaluator", options=(CLASS_FEATURES,)),
        "effective_rank": Later(f"{__package__}.effective_rank", "EffectiveRankEvaluator", options=(CLASS_FEATURES,)),
        "label_propagation": Later(f"{__package__}.label_propagation", "LabelPropagationEvaluator", options=()),
        "rendered_class": Later(f"{__package__}.three_die_bench", "RenderedClassEvaluator", options=()),
        "rendered_pose": Later(f"{__package__}.three_die_bench", "RenderedPoseEvaluator", options=()),
        "rendered_prediction": Later(f"{__package__}.rendered_prediction", "RenderedPredictionEvaluator", options=()),
    },
)


def evaluator_of(record: ResultRecord) -> type[Evaluator]:
    """Return the class that made a record, or ``Evaluator`` itself where that is not known here."""
    from .base import Evaluator

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
    from ..utils.coercion import check_arguments

    check_known(protocol, PROTOCOLS, "protocols")
    evaluator = EVALUATORS[name]
    return evaluator(
        data, **check_arguments({**evaluator.protocols.get(protocol, {}), **settings}, evaluator, name, skip=("data",))
    )
