"""Linear probing: a linear classifier on frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.frozen import FrozenEncoder
from .classification import ClassificationEvaluator
from .data import EvaluationData
from .metrics import mean_per_class_accuracy, topk_accuracy
from .probes import feature_statistics, fit_linear_adamw, fit_linear_lbfgs, seeded_permutation
from .results import ResultRecord

# Three per decade from 1e-4 to 1e-1.
LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


class LinearEvaluator(ClassificationEvaluator):
    """Top-1 accuracy (and top-5 with more than ten classes) of a linear classifier on frozen features.

    Feature strategies of iBOT (https://github.com/bytedance/ibot) and of https://arxiv.org/abs/2503.18753: ``cls``,
    the mean of the ``patches``, and both (``backbone``). Base images without augmentation, features stored once in
    float32.

    The one setting that matters is chosen on a held-out part of the training images, never on the test images; the
    classifier is then fitted to all training images with it. (iBOT and DINOv2 report the best one on the validation
    set: expect slightly lower numbers here.)

    - ``solver="adamw"``: weights from N(0, 0.01), biases 0, batch 1024, cosine, weight decay 0, learning rate chosen.
    - ``solver="lbfgs"``: the optimum of L2-penalised logistic regression, penalty chosen; faster, on few images more
      accurate, and without other settings.
    """

    name: ClassVar[str] = "linear"
    unmeasured: ClassVar[str] = "how well a linear classifier tells classes apart"
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {"solver": "lbfgs", "standardize": True}}

    def __init__(
        self,
        data: EvaluationData,
        *,
        features: Sequence[str] = ("cls", "patches", "backbone"),
        seeds: int | Sequence[int] = 1,
        solver: Literal["adamw", "lbfgs"] = "adamw",
        epochs: int = 100,
        batch_size: int = 1024,
        candidates: Sequence[float] | None = None,
        held_out: float = 0.1,
        standardize: bool = False,
    ) -> None:
        """Check the settings.

        Args:
            data: Labelled train and test images.
            features: Kinds of features, each with a classifier of its own; the first is the primary one.
            seeds: Seeds of weights, batches and of the held-out part.
            solver: "adamw" or "lbfgs".
            epochs: Passes over the features ("adamw").
            batch_size: Samples per step ("adamw").
            candidates: Learning rates ("adamw") or L2 penalties ("lbfgs") to choose from.
            held_out: Share of the training images that chooses among them.
            standardize: Whether every dimension is standardised with the training images' mean and deviation.
        """
        super().__init__(data, features=features, seeds=seeds)
        if solver not in ("adamw", "lbfgs"):
            raise ValueError(f"solver must be 'adamw' or 'lbfgs', got {solver!r}.")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be a share between 0 and 1, got {held_out}.")
        self.solver, self.epochs, self.batch_size = solver, epochs, batch_size
        self.candidates = tuple(candidates or (LEARNING_RATES if solver == "adamw" else PENALTIES))
        self.held_out, self.standardize = held_out, standardize

    def settings(self, task: str) -> dict[str, Any]:
        """Return the settings of the solver."""
        adamw = {"epochs": self.epochs, "batch_size": self.batch_size, "schedule": "cosine", "weight_decay": 0.0}
        return {
            "solver": self.solver,
            **(adamw if self.solver == "adamw" else {}),
            "candidates": list(self.candidates),
            "chosen_on": f"{self.held_out:g} of the training images, held out",
            "standardize": self.standardize,
            "augmentation": None,
        }

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Choose and fit one classifier per kind of features and seed; judge it on every test set."""
        encoder.check_features(self.features)
        train, train_labels = self.labelled_features(encoder, self.data.train)
        tests = [(part, *self.labelled_features(encoder, part)) for part in self.data.tests]
        classes = self.data.num_classes
        records = []
        for name in self.features:
            mean, std = feature_statistics(train[name])
            fitted = (train[name] - mean) / std if self.standardize else train[name]
            fits = [self._choose_and_fit(fitted, train_labels, classes, seed, encoder.device) for seed in seeds]
            for part, test, labels in tests:
                judged = (test[name] - mean) / std if self.standardize else test[name]
                metrics: dict[str, list[float]] = {metric.name: [] for metric in self.recorded}
                details: dict[str, list[Any]] = {"chosen": [], "mean_per_class": []}
                for chosen, weight, bias in fits:
                    logits = F.linear(judged, weight, bias)
                    for metric, value in self.accuracies(logits, labels).items():
                        metrics[metric].append(value)
                    details["chosen"].append(chosen)
                    details["mean_per_class"].append(mean_per_class_accuracy(logits.argmax(1), labels))
                records += self.records(encoder, task, name, metrics, seeds, details, part)
        return records

    def _choose_and_fit(
        self, features: Tensor, labels: Tensor, classes: int, seed: int, device: torch.device
    ) -> tuple[float, Tensor, Tensor]:
        """Return the candidate that is best on the held-out part (of equals the first), and a fit to all with it."""
        count = round(self.held_out * len(features))
        start, chosen = None, self.candidates[len(self.candidates) // 2]
        if len(self.candidates) > 1 and 0 < count < len(features):
            order = seeded_permutation(len(features), seed, len(features))
            held, kept = order[:count], order[count:]
            weights, biases = self._fit(features[kept], labels[kept], classes, self.candidates, seed, device)
            scores = [
                topk_accuracy(F.linear(features[held], weight, bias), labels[held])
                for weight, bias in zip(weights, biases, strict=True)
            ]
            best = scores.index(max(scores))
            chosen, start = self.candidates[best], (weights[best], biases[best])
        weights, biases = self._fit(features, labels, classes, [chosen], seed, device, start)
        return chosen, weights[0], biases[0]

    def _fit(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int,
        candidates: Sequence[float],
        seed: int,
        device: torch.device,
        start: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.solver == "lbfgs":
            return fit_linear_lbfgs(features, labels, classes, candidates, start=start, device=device)
        return fit_linear_adamw(
            features,
            labels,
            classes,
            candidates,
            seed=seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            device=device,
        )
