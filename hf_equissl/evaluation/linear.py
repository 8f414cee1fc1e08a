"""Linear probing: a linear classifier on frozen features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.frozen import FrozenEncoder
from .classification import ClassificationEvaluator
from .data import EvaluationData
from .metrics import mean_per_class_accuracy, topk_accuracy
from .probes import feature_statistics, fit_linear_lbfgs, fit_linear_steps, seeded_permutation
from .results import ResultRecord

# Three per decade from 1e-4 to 1e-1.
LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear classifier.

    Attributes:
        chosen: Its learning rate or penalty.
        held_out: Its accuracy on the images that chose; NaN where there was nothing to choose.
        weight: (classes, D).
        bias: (classes,).
        shift, scale: (D,) each, what features are standardised with; ``None``: they are not.
    """

    chosen: float
    held_out: float
    weight: Tensor
    bias: Tensor
    shift: Tensor | None = None
    scale: Tensor | None = None

    def logits(self, features: Tensor) -> Tensor:
        """Score the classes: (n, D) -> (n, classes)."""
        if self.shift is not None and self.scale is not None:
            features = (features - self.shift) / self.scale
        return F.linear(features.float(), self.weight, self.bias)


class LinearEvaluator(ClassificationEvaluator):
    """Top-1 accuracy (and top-5 with more than ten classes) of a linear classifier on frozen features.

    Feature strategies of iBOT (https://github.com/bytedance/ibot) and of https://arxiv.org/abs/2503.18753: ``cls``,
    the mean of the ``patches``, and both (``backbone``). Base images without augmentation, features stored once, in
    float32 unless ``feature_storage`` says otherwise.

    The one setting that matters is chosen on a held-out part of the training images, never on the test images; the
    classifier is then fitted to all training images with it. (iBOT and DINOv2 report the best one on the validation
    set: expect slightly lower numbers here.)

    - ``solver="adamw"``: weights from N(0, 0.01), biases 0, batch 1024, cosine, weight decay 0, learning rate chosen.
    - ``solver="sgd"``: the same with SGD, momentum 0.9; learning rates are per 256 samples of a batch.
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
        solver: Literal["adamw", "sgd", "lbfgs"] = "adamw",
        epochs: int = 100,
        batch_size: int = 1024,
        iterations: int | None = None,
        candidates: Sequence[float] | None = None,
        held_out: float = 0.1,
        standardize: bool = False,
    ) -> None:
        """Check the settings.

        Args:
            data: Labelled train and test images.
            features: Kinds of features, each with a classifier of its own; the first is the primary one.
            seeds: Seeds of weights, batches and of the held-out part.
            solver: "adamw", "sgd" or "lbfgs".
            epochs: Passes over the features ("adamw", "sgd").
            batch_size: Samples per step ("adamw", "sgd").
            iterations: Steps in place of epochs ("adamw", "sgd").
            candidates: Learning rates ("adamw", "sgd") or L2 penalties ("lbfgs") to choose from.
            held_out: Share of the training images that chooses among them.
            standardize: Whether every dimension is standardised with the training images' mean and deviation.
        """
        super().__init__(data, features=features, seeds=seeds)
        if solver not in ("adamw", "sgd", "lbfgs"):
            raise ValueError(f"solver must be 'adamw', 'sgd' or 'lbfgs', got {solver!r}.")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be a share between 0 and 1, got {held_out}.")
        self.solver, self.epochs, self.batch_size = solver, epochs, batch_size
        self.iterations = iterations
        self.candidates = tuple(candidates or (PENALTIES if solver == "lbfgs" else LEARNING_RATES))
        self.held_out, self.standardize = held_out, standardize

    def settings(self, task: str) -> dict[str, Any]:
        """Return the settings of the solver."""
        length = {"epochs": self.epochs} if self.iterations is None else {"iterations": self.iterations}
        steps = {**length, "batch_size": self.batch_size, "schedule": "cosine", "weight_decay": 0.0}
        return {
            "solver": self.solver,
            **({} if self.solver == "lbfgs" else steps),
            "candidates": list(self.candidates),
            "chosen_on": f"{self.held_out:g} of the training images, held out",
            "standardize": self.standardize,
            "augmentation": None,
        }

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Choose and fit one classifier per kind of features and seed; judge it on every test set."""
        kinds = self.features_of(encoder)
        probes = self.fit(encoder, kinds, seeds)
        records = []
        for part in self.data.tests:
            features, labels = self.labelled_features(encoder, part, kinds)
            for name in kinds:
                own = [probes[name, seed] for seed in seeds]
                values, details = self.judge(own, [features[name]] * len(own), labels)
                records += self.records(encoder, task, name, values, seeds, details, part)
        return records

    def judge(
        self, probes: Sequence[LinearProbe], features: Sequence[Tensor], labels: Tensor
    ) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
        """Compute each probe's metrics on its features (n, D) of the same images, and details of the record."""
        metrics: dict[str, list[float]] = {metric.name: [] for metric in self.recorded}
        details: dict[str, list[Any]] = {"chosen": [], "mean_per_class": []}
        for probe, inputs in zip(probes, features, strict=True):
            logits = probe.logits(inputs)
            for metric, value in self.accuracies(logits, labels).items():
                metrics[metric].append(value)
            details["chosen"].append(probe.chosen)
            details["mean_per_class"].append(mean_per_class_accuracy(logits.argmax(1), labels))
        return metrics, details

    def fit(
        self, encoder: FrozenEncoder, kinds: Sequence[str], seeds: Sequence[int]
    ) -> dict[tuple[str, int], LinearProbe]:
        """Choose and fit one classifier per kind of features and seed on the training images."""
        encoder.check_features(kinds)
        train, labels = self.labelled_features(encoder, self.data.train, kinds)
        found = {}
        for name in kinds:
            statistics: tuple[Tensor, ...] = ()
            inputs = train[name]
            if self.standardize:
                statistics = feature_statistics(inputs.float())
                inputs = (inputs - statistics[0]) / statistics[1]
            for seed in seeds:
                fitted = self._choose_and_fit(inputs, labels, self.data.num_classes, seed, encoder.device)
                found[name, seed] = LinearProbe(*fitted, *statistics)
        return found

    def _choose_and_fit(
        self, features: Tensor, labels: Tensor, classes: int, seed: int, device: torch.device
    ) -> tuple[float, float, Tensor, Tensor]:
        """Return the candidate that is best on the held-out part (of equals the first), how good, and a fit to all."""
        count = round(self.held_out * len(features))
        start, chosen, score = None, self.candidates[len(self.candidates) // 2], math.nan
        if len(self.candidates) > 1 and 0 < count < len(features):
            order = seeded_permutation(len(features), seed, len(features))
            held, kept = order[:count], order[count:]
            weights, biases = self._fit(features, labels, classes, self.candidates, seed, device, rows=kept)
            scores = [
                topk_accuracy(F.linear(features[held].float(), weight, bias), labels[held])
                for weight, bias in zip(weights, biases, strict=True)
            ]
            best = scores.index(max(scores))
            chosen, score, start = self.candidates[best], scores[best], (weights[best], biases[best])
        weights, biases = self._fit(features, labels, classes, [chosen], seed, device, start)
        return chosen, score, weights[0], biases[0]

    def _fit(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int,
        candidates: Sequence[float],
        seed: int,
        device: torch.device,
        start: tuple[Tensor, Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.solver == "lbfgs":
            return fit_linear_lbfgs(features, labels, classes, candidates, start=start, rows=rows, device=device)
        scale = min(self.batch_size, len(features if rows is None else rows)) / 256 if self.solver == "sgd" else 1.0
        return fit_linear_steps(
            features,
            labels,
            classes,
            [scale * rate for rate in candidates],
            seed=seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.solver,
            iterations=self.iterations,
            rows=rows,
            device=device,
        )
