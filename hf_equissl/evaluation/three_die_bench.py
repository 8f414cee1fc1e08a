"""3DIEBench: classes of objects from each part of the features, and pose and colour from two renders of one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..encoders.frozen import FrozenEncoder
from ..utils.options import Option
from .base import Evaluator
from .data import EvaluationData
from .images import ImageSet
from .linear import LinearEvaluator
from .metrics import R2, R2_SCALAR, Metric, r2_mean, r2_scalar
from .probes import RegressionProbe, feature_statistics
from .rendered_objects import RenderedData
from .results import ResultRecord
from .retrieval import quaternions, relative_rotation

# Features that are probed of an encoder with a stem; of another one it is the backbone.
PARTS = ("stem", "invariant", "equivariant")
_ANGLES, _HUES = slice(0, 3), [3, 6]
# The targets are a quaternion, and two differences of hues.
_NUM_TARGETS = {"rotation": 4, "color": 2}


def parts_of(encoder: FrozenEncoder, features: Sequence[str]) -> tuple[str, ...]:
    """Return ``features``, or the backbone of an encoder without a stem where they are the parts of one."""
    return tuple(features) if tuple(features) != PARTS or "stem" in encoder.feature_names else ("backbone",)


class RenderedClassEvaluator(LinearEvaluator):
    """Class of the object by the linear probe, on the whole stem, its invariant and its equivariant part.

    SIE's (https://arxiv.org/abs/2302.10283) probe is Adam with learning rate 1e-3 and batch 256 for 300 epochs of one
    random render per object; here it sees ``RenderedData.train_renders`` renders per object and epoch, 30 epochs, and
    the rate falls along a cosine. It is judged on all renders of the test objects.
    """

    name: ClassVar[str] = "rendered_class"
    unmeasured: ClassVar[str] = ""
    data_type: ClassVar[type[EvaluationData]] = RenderedData
    options: ClassVar[tuple[Option, ...]] = ()
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(
        self,
        data: EvaluationData,
        *,
        features: Sequence[str] = PARTS,
        seeds: int | Sequence[int] = 1,
        epochs: int = 30,
        batch_size: int = 256,
        candidates: Sequence[float] = (1e-3,),
    ) -> None:
        """Check the settings, which are those of ``LinearEvaluator``."""
        super().__init__(
            data, features=features, seeds=seeds, epochs=epochs, batch_size=batch_size, candidates=candidates
        )

    def features_of(self, encoder: FrozenEncoder) -> tuple[str, ...]:
        """Name the parts of the stem, or the backbone of an encoder without one."""
        return parts_of(encoder, self.features)


class RenderedPoseEvaluator(Evaluator):
    """R2 of the relative rotation and of the change of colours, regressed from the features of two renders.

    The probes of SIE (https://arxiv.org/abs/2302.10283): an MLP with hidden layers 1024, 1024 on [f(a) ; f(b)], MSE,
    Adam, learning rate 1e-3, batch 256, 300 epochs of one pair per object; each epoch draws pairs among
    ``RenderedData.train_renders`` renders. Ours falls along a cosine, and standardises features.

    - rotation: inverse(R_a) R_b as a unit quaternion, 4 numbers.
    - color: differences of the floor's and of the light's hue, 2 numbers.

    ``r2_scalar`` has one mean over all entries, as published figures of SIE; ``r2`` is the mean over parameters.
    """

    name: ClassVar[str] = "rendered_pose"
    metrics: ClassVar[tuple[Metric, ...]] = (R2, R2_SCALAR)
    reading: ClassVar[str] = "R2: 1 is perfect, 0 knows nothing."
    has_related_tasks: ClassVar[bool] = True
    data_type: ClassVar[type[EvaluationData]] = RenderedData
    tasks = tuple(_NUM_TARGETS)

    def __init__(
        self,
        data: RenderedData,
        *,
        features: Sequence[str] = PARTS,
        seeds: int | Sequence[int] = 1,
        epochs: int = 300,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        hidden_width: int = 1024,
        progress: bool = True,
    ) -> None:
        """Check the settings.

        Args:
            data: Renders with latents.
            features: Kinds of features, each with a probe of its own; the first is the primary one.
            seeds: Seeds of the probe's weights and of the pairs.
            epochs: Passes of one pair per object.
            batch_size: Pairs per step.
            learning_rate: Adam's, at the start.
            hidden_width: Width of both hidden layers.
            progress: Whether to show a bar.
        """
        super().__init__(data, features=features, seeds=seeds)
        self.latents = data.latents
        self.epochs, self.batch_size, self.learning_rate = epochs, batch_size, learning_rate
        self.hidden_width, self.progress = hidden_width, progress

    def features_of(self, encoder: FrozenEncoder) -> tuple[str, ...]:
        """Name the parts of the stem, or the backbone of an encoder without one."""
        return parts_of(encoder, self.features)

    def settings(self, task: str) -> dict[str, Any]:
        """Return the settings of the probe."""
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "schedule": "cosine",
            "optimizer": "adam",
            "hidden_width": self.hidden_width,
            "standardize": True,
        }

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Fit the probes of one task, and judge them on one fixed pair of each test object."""
        kinds = self.features_of(encoder)
        train, test = (self._group_by_object(encoder, part, kinds) for part in (self.data.train, self.data.test))
        records = []
        for name in kinds:
            mean, std = feature_statistics(train[name].flatten(0, 1))
            fitted, judged = ((values[name] - mean) / std for values in (train, test))
            rows = draw_pairs(*judged.shape[:2], -1, 0)
            true = pair_targets(self.latents[self.data.test.split], rows, task)
            guesses = [self._fit(encoder, task, fitted, seed).predict(*pick(judged, rows)) for seed in seeds]
            values = {
                R2.name: [r2_mean(guess, true) for guess in guesses],
                R2_SCALAR.name: [r2_scalar(guess, true) for guess in guesses],
            }
            records += self.records(encoder, task, name, values, seeds)
        return records

    def _group_by_object(self, encoder: FrozenEncoder, part: ImageSet, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Compute the features of all renders, name -> (objects, renders, D)."""
        _, features = part.features(encoder, kinds)
        objects, renders = self.latents[part.split].shape[:2]
        return {name: value.unflatten(0, (objects, renders)) for name, value in features.items()}

    def _fit(self, encoder: FrozenEncoder, task: str, train: Tensor, seed: int) -> RegressionProbe:
        probe = RegressionProbe(
            2 * train.shape[2],
            _NUM_TARGETS[task],
            seed=seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            hidden_width=self.hidden_width,
            device=encoder.device,
        )
        for epoch in tqdm(range(self.epochs), desc=task, leave=False, disable=not self.progress):
            rows = draw_pairs(*train.shape[:2], seed, epoch)
            probe.fit_epoch(*pick(train, rows), pair_targets(self.latents[self.data.train.split], rows, task))
        return probe


def draw_pairs(objects: int, renders: int, *key: int) -> Tensor:
    """Draw two different renders of each object, (objects, 2): a function of ``key`` alone."""
    state = 0
    for number in key:
        state = (state * 1_000_003 + number + 2) % (1 << 62)
    return torch.rand(objects, renders, generator=torch.Generator().manual_seed(state)).topk(2, dim=1).indices


def pick(values: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Pick both renders of each object: (objects, renders, D), (objects, 2) -> twice (objects, D)."""
    rows = torch.arange(len(values))
    return values[rows, pairs[:, 0]], values[rows, pairs[:, 1]]


def pair_targets(latents: Tensor, pairs: Tensor, task: str) -> Tensor:
    """Compute what leads from the first render of each pair to the second, (objects, 4) or (objects, 2) float32."""
    first, second = pick(latents, pairs)
    if task == "color":
        return (second - first)[:, _HUES].float()
    return relative_rotation(quaternions(first[:, _ANGLES]), quaternions(second[:, _ANGLES])).float()
