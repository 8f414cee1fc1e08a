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
    block_size: int = 32_768,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Score classes by the k most similar training images, each voting with exp(cosine / temperature).

    As in DINO (https://github.com/facebookresearch/dino, eval_knn.py). Memory beside the features, and their copy on
    another device: ``block_size`` x (``chunk_size`` + 2 D) numbers, 235 MB at the defaults and D = 384, however many
    training images there are.

    Args:
        train: (n, D) features.
        train_labels: (n,) int64.
        test: (m, D) features.
        num_classes: Number of classes.
        k: Neighbours.
        temperature: Temperature of the votes.
        chunk_size: Test images at a time.
        block_size: Training images at a time.
        device: Where to compute.

    Returns:
        (m, num_classes) scores on the CPU.
    """
    bank, labels = train.to(device), train_labels.to(device)
    scores = torch.empty(len(test), num_classes)
    for begin in range(0, len(test), chunk_size):
        queries = F.normalize(test[begin : begin + chunk_size].to(device).float(), dim=1)
        similarity, neighbours = _find_nearest(queries, bank, k, block_size)
        votes = torch.zeros(len(queries), num_classes, device=queries.device)
        votes.scatter_add_(1, labels[neighbours], (similarity / temperature).exp())
        scores[begin : begin + len(queries)] = votes.cpu()
    return scores


def _find_nearest(queries: Tensor, bank: Tensor, k: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` rows of ``bank`` that are most similar to each query, of unit length: cosines and rows (m, k)."""
    best: list[tuple[Tensor, Tensor]] = []
    for begin in range(0, len(bank), block_size):
        block = F.normalize(bank[begin : begin + block_size].float(), dim=1)
        similarity, rows = (queries @ block.T).topk(min(k, len(block)), dim=1)
        best.append((similarity, rows + begin))
        if len(best) > 1:  # keep the nearest of all blocks so far
            similarity, rows = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
            similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best = [(similarity, rows.gather(1, order))]
    return best[0]


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
