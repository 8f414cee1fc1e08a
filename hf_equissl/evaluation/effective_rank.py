"""Effective rank of frozen features: how many directions an encoder uses. Needs no labels and no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ..encoders.frozen import FrozenEncoder
from ..utils.feature_statistics import effective_rank, feature_std
from ..utils.options import Option
from .base import Evaluator
from .data import EvaluationData
from .metrics import EFFECTIVE_RANK, FEATURE_STD, Metric
from .options import CLASS_FEATURES
from .results import ResultRecord


class EffectiveRankEvaluator(Evaluator):
    """RankMe of the test images' features, and the standard deviation of the normalised features.

    RankMe (https://arxiv.org/abs/2210.02885) lies between 1, where all features are on a line, and their width. The
    number of images bounds it, too: compare encoders on equally many.
    """

    name: ClassVar[str] = "effective_rank"
    metrics: ClassVar[tuple[Metric, ...]] = (EFFECTIVE_RANK, FEATURE_STD)
    unmeasured: ClassVar[str] = "how many directions the features use"
    options: ClassVar[tuple[Option, ...]] = (CLASS_FEATURES,)
    tasks = ("representation",)

    def __init__(self, data: EvaluationData, *, features: Sequence[str] = ("cls",)) -> None:
        """Check that there are rows to compare; ``features`` names the kinds of features, the first the primary one."""
        super().__init__(data, features=features, seeds=1)
        for part in data.tests:
            if len(part) < 2:
                raise ValueError(f"An effective rank needs at least 2 test images, got {len(part)}.")

    @classmethod
    def applies_to(cls, data: EvaluationData) -> bool:
        """Return whether there are rows to compare."""
        return super().applies_to(data) and all(len(part) > 1 for part in data.tests)

    def settings(self, task: str) -> dict[str, Any]:
        """Return nothing: nothing can be set."""
        return {}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Measure once per kind of features and test set."""
        encoder.check_features(self.features_of(encoder))
        records = []
        for part in self.data.tests:
            _, features = part.features(encoder, self.features_of(encoder))
            for name in self.features_of(encoder):
                values = {
                    EFFECTIVE_RANK.name: [float(effective_rank(features[name]))],
                    FEATURE_STD.name: [float(feature_std(features[name]))],
                }
                records += self.records(encoder, task, name, values, seeds, test=part)
        return records
