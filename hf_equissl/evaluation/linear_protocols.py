"""Linear probes as SER and DINOv2 describe theirs, beside ``LinearEvaluator``: run when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..encoders.frozen import FrozenEncoder
from ..utils.options import Option
from .data import EvaluationData
from .linear import LinearEvaluator
from .results import ResultRecord

SER_RATES = (1.0, 3.0, 10.0)
# The thirteen of facebookresearch/dinov2, dinov2/eval/linear.py.
DINOV2_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
# One and four blocks, each without and with the mean patch of the last one.
DINOV2_FEATURES = ("cls", "backbone", "cls_4", "cls_4_patches")


class PublishedLinearEvaluator(LinearEvaluator):
    """A linear protocol as a paper describes it: SGD, and settings of its own, each of which can be changed.

    Attributes:
        published: Argument of the constructor -> what it is unless another value is given.
    """

    unmeasured: ClassVar[str] = ""
    options: ClassVar[tuple[Option, ...]] = ()
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    published: ClassVar[Mapping[str, Any]]

    def __init__(
        self,
        data: EvaluationData,
        *,
        features: Sequence[str] | None = None,
        seeds: int | Sequence[int] = 1,
        epochs: int | None = None,
        iterations: int | None = None,
        batch_size: int | None = None,
        candidates: Sequence[float] | None = None,
    ) -> None:
        """Check the settings, which are those of ``LinearEvaluator``; ``None``: those of ``published``."""
        length = {"epochs": epochs, "iterations": iterations}
        given = {"features": features, "batch_size": batch_size, "candidates": candidates, **length}
        given = {name: value for name, value in given.items() if value is not None}
        kept = {name: value for name, value in self.published.items() if not (name in length and length.keys() & given)}
        super().__init__(data, seeds=seeds, solver="sgd", **(kept | given))

    @classmethod
    def applies_to(cls, data: EvaluationData) -> bool:
        """Return ``False``: one linear probe is enough unless this one is asked for."""
        return False


class SERLinearEvaluator(PublishedLinearEvaluator):
    """The linear protocol of SER (https://arxiv.org/abs/2603.06693), on features that are stored once.

    CLS of the last 4 blocks, each through the final norm, 1,536 numbers of a ViT-S; fewer blocks where CLS enters later
    (``last_cls_tokens``). SGD, momentum 0.9, no weight decay, batch 2048, learning rate 1, 3 or 10 per 256 samples,
    cosine, 50 epochs, weights from N(0, 0.01). As in theirs the rate is chosen on held-out training images.

    Theirs trains on random crops and flips; here every image has one feature vector, its base image's.
    """

    name: ClassVar[str] = "linear_ser"
    published: ClassVar[Mapping[str, Any]] = {
        "features": ("cls_4",),
        "epochs": 50,
        "batch_size": 2048,
        "candidates": SER_RATES,
    }


class DINOv2LinearEvaluator(PublishedLinearEvaluator):
    """The linear protocol of DINOv2 (https://github.com/facebookresearch/dinov2), on features that are stored once.

    Thirteen learning rates times four kinds of features: CLS of the last block or of the last four, each with and
    without the mean patch of the last one. SGD, momentum 0.9, no weight decay, batch 1024, 12,500 steps, cosine. The
    best of the 52 classifiers counts; it is chosen on held-out training images, not on the test images as in theirs,
    which therefore report slightly more. Theirs trains on random crops and flips, too.
    """

    name: ClassVar[str] = "linear_dinov2"
    # 52 classifiers of 12,500 steps take hours on one CPU core.
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {"iterations": 1250}}
    published: ClassVar[Mapping[str, Any]] = {
        "features": DINOV2_FEATURES,
        "iterations": 12_500,
        "batch_size": 1024,
        "candidates": DINOV2_RATES,
    }
    best: ClassVar[str] = "best_of_4"

    def features_of(self, encoder: FrozenEncoder) -> tuple[str, ...]:
        """Name the one result: the best kind of features is a part of the choice."""
        return (self.best,)

    def check(self, encoder: FrozenEncoder) -> None:
        """Raise ``ValueError`` where the encoder lacks one of the four kinds."""
        encoder.check_features(self.features)

    def settings(self, task: str) -> dict[str, Any]:
        """Return the settings of the solver, and the kinds of features to choose from."""
        return super().settings(task) | {"features": list(self.features)}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Fit all kinds of features, choose one per seed, and judge it on every test set."""
        probes = self.fit(encoder, self.features, seeds)
        chosen = []
        for seed in seeds:
            scores = {name: probes[name, seed].held_out for name in self.features}
            chosen.append(max(scores, key=scores.__getitem__))
        best = [probes[name, seed] for name, seed in zip(chosen, seeds, strict=True)]
        records = []
        for part in self.data.tests:
            features, labels = self.labelled_features(encoder, part, tuple(dict.fromkeys(chosen)))
            values, details = self.judge(best, [features[name] for name in chosen], labels)
            details = details | {"features": chosen, "held_out": [probe.held_out for probe in best]}
            records += self.records(encoder, task, self.best, values, seeds, details, part)
        return records
