"""k nearest neighbours on frozen features: no training, one setting, quick enough for every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.frozen import FrozenEncoder
from .classification import ClassificationEvaluator
from .data import EvaluationData
from .metrics import mean_per_class_accuracy
from .results import ResultRecord


def knn_votes(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    num_classes: int,
    *,
    k: int,
    temperature: float,
    chunk_size: int = 1024,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Score classes by the k most similar training images, each voting with exp(cosine / temperature).

    As in DINO (https://github.com/facebookresearch/dino, eval_knn.py). Memory: ``chunk_size`` x training images.

    Args:
        train: (n, D) features.
        train_labels: (n,) int64.
        test: (m, D) features.
        num_classes: Number of classes.
        k: Neighbours.
        temperature: Temperature of the votes.
        chunk_size: Test images at a time.
        device: Where to compute.

    Returns:
        (m, num_classes) scores on the CPU.
    """
    bank, labels = F.normalize(train.to(device), dim=1), train_labels.to(device)
    scores = []
    for chunk in F.normalize(test, dim=1).split(chunk_size):
        similarity, neighbours = (chunk.to(device) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=bank.device)
        votes.scatter_add_(1, labels[neighbours], (similarity / temperature).exp())
        scores.append(votes.cpu())
    return torch.cat(scores)


class KNNEvaluator(ClassificationEvaluator):
    """Top-1 accuracy (and top-5 with more than ten classes) of weighted k-nearest-neighbour votes.

    Cosine similarity, k = 20, temperature 0.07: the setting of DINO (https://github.com/facebookresearch/dino,
    eval_knn.py). Base images without augmentation. Nothing is random, so there are no seeds.
    """

    name: ClassVar[str] = "knn"
    unmeasured: ClassVar[str] = "how well neighbours in feature space share a class"

    def __init__(
        self, data: EvaluationData, *, features: Sequence[str] = ("cls",), k: int = 20, temperature: float = 0.07
    ) -> None:
        """Check the settings; ``features`` names the kinds of features, the first being the primary one."""
        super().__init__(data, features=features, seeds=1)
        if k < 1 or temperature <= 0:
            raise ValueError(f"k must be at least 1 and temperature above 0, got {k} and {temperature}.")
        self.k, self.temperature = k, temperature

    def settings(self, task: str) -> dict[str, Any]:
        """Return neighbours and temperature."""
        return {"k": self.k, "temperature": self.temperature, "similarity": "cosine"}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Vote once per kind of features and test set."""
        encoder.check_features(self.features_of(encoder))
        train, train_labels = self.labelled_features(encoder, self.data.train, self.features_of(encoder))
        classes = self.data.num_classes
        records = []
        for part in self.data.tests:
            test, labels = self.labelled_features(encoder, part, self.features_of(encoder))
            for name in self.features_of(encoder):
                scores = knn_votes(
                    train[name],
                    train_labels,
                    test[name],
                    classes,
                    k=min(self.k, len(train_labels)),
                    temperature=self.temperature,
                    device=encoder.device,
                )
                accuracies = {metric: [value] for metric, value in self.accuracies(scores, labels).items()}
                details = {"mean_per_class": [mean_per_class_accuracy(scores.argmax(1), labels)]}
                records += self.records(encoder, task, name, accuracies, seeds, details, part)
        return records
