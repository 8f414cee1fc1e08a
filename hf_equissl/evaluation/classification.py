"""What evaluators of class accuracy share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..encoders.frozen import FrozenEncoder
from ..utils.options import Option
from .base import Evaluator
from .images import ImageSet
from .metrics import MEAN_PER_CLASS, TOP1, TOP5, Metric, mean_per_class_accuracy, topk_accuracy
from .options import CLASS_FEATURES

# Up to this many classes, a top-5 accuracy says little.
_FEW_CLASSES = 10


class ClassificationEvaluator(Evaluator):
    """An evaluator that predicts classes from features: one task, top-1 and top-5 accuracy, labels needed.

    Of data that are judged by it (``EvaluationData.metric``) the mean accuracy per class is the number to quote.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (TOP1, TOP5, MEAN_PER_CLASS)
    hub_task: ClassVar[str] = "image-classification"
    needs_labels: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = (CLASS_FEATURES,)
    tasks = ("classification",)

    @property
    def recorded(self) -> tuple[Metric, ...]:
        """Top-1, top-5 where that says something, and the mean per class where data are judged by it."""
        top5 = (TOP5,) if self.data.num_classes > _FEW_CLASSES else ()
        return (TOP1, *top5, *((MEAN_PER_CLASS,) if self.data.metric == MEAN_PER_CLASS.name else ()))

    @property
    def primary_metric(self) -> str:
        """Name of the metric to quote on these data."""
        return self.data.metric

    def labelled_features(
        self, encoder: FrozenEncoder, images: ImageSet, names: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the features of the images that decode, as they are kept, name -> (m, D), and their labels (m,)."""
        rows, features = images.stored_features(encoder, names)
        return features, images.require_labels(type(self).__name__)[rows]

    def accuracies(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute the accuracy by each recorded metric: scores (m, classes), labels (m,) -> name -> [0, 1]."""
        known = {
            TOP1.name: lambda: topk_accuracy(scores, labels, 1),
            TOP5.name: lambda: topk_accuracy(scores, labels, 5),
            MEAN_PER_CLASS.name: lambda: mean_per_class_accuracy(scores.argmax(1), labels),
        }
        return {metric.name: known[metric.name]() for metric in self.recorded}
