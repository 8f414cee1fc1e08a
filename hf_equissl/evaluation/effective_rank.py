"""Effective rank of frozen features: how many directions an encoder uses. Needs no labels and no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ..encoders.frozen import FrozenEncoder
from ..utils.feature_statistics import effective_rank, feature_std
from .base import Evaluator
from .images import EvaluationData
from .results import ResultRecord


class EffectiveRankEvaluator(Evaluator):
    """RankMe of the test images' features, and the standard deviation of the normalised features.

    ``monitors.effective_rank`` (https://arxiv.org/abs/2210.02885): between 1 (collapse to a line) and the width of the
    features. The number of images bounds it, too: compare encoders on equally many.
    """

    name: ClassVar[str] = "effective_rank"
    primary_metric: ClassVar[str] = "effective_rank"

    def __init__(self, data: EvaluationData, *, features: Sequence[str] = ("cls",)) -> None:
        """Check that there are rows to compare; ``features`` names the kinds of features, the first the primary one."""
        super().__init__(data, features=features, seeds=1)
        if len(data.test) < 2:
            raise ValueError(f"An effective rank needs at least 2 test images, got {len(data.test)}.")
        self.tasks = ("representation",)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Rank and standard deviation."""
        return ("effective_rank", "feature_std")

    def settings(self, task: str) -> dict[str, Any]:
        """Nothing can be set."""
        return {}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Once per kind of features."""
        encoder.check_features(self.features)
        _, features = self.data.test.features(encoder, self.features)
        records = []
        for name in self.features:
            values = {"effective_rank": [float(effective_rank(features[name]))]}
            values["feature_std"] = [float(feature_std(features[name]))]
            records += self.records(encoder, task, name, values, seeds)
        return records
