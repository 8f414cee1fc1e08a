"""Whether SIE's predictor finds the right render of an object: MRR, hits and prediction retrieval error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..data.renders import RenderedPairs
from ..encoders.frozen import FrozenEncoder
from .base import Evaluator
from .data import EvaluationData
from .metrics import Metric
from .rendered_objects import RenderedData
from .results import ResultRecord
from .retrieval import (
    hit_rate,
    mean_reciprocal_rank,
    prediction_retrieval_error,
    quaternions,
    relative_rotation,
    target_ranks,
)

MRR = Metric("mrr", hub_type="mrr")
HIT_1 = Metric("hit_at_1", "%", digits=2, hub_type="hits_at_1")
HIT_5 = Metric("hit_at_5", "%", digits=2, hub_type="hits_at_5")
PRE = Metric("prediction_retrieval_error", higher_is_better=False)


class RenderPredictor(Protocol):
    """What predicts an embedding from another one and what leads from one render to the other.

    Attributes:
        features: Kind of features that embeddings are made of.
    """

    features: str

    def embed(self, features: Tensor) -> Tensor:
        """Turn features (n, D) into embeddings (n, d)."""

    def predict(self, embeddings: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Predict embeddings (n, d) from others (n, d) and the parameters (n,) each, by name."""


class RenderedPredictionEvaluator(Evaluator):
    """MRR, H@1, H@5 and PRE of an encoder with the predictor of SIE (https://arxiv.org/abs/2302.10283).

    From the first render of each test object the embeddings of all its renders are predicted, from the parameters that
    lead there. ``mrr`` is the mean of 1 / rank of the right render by cosine among those of its object, ``hit_at_k``
    the share of ranks up to k; ``prediction_retrieval_error`` is the mean of 1 - <q, q'>^2, with q' the rotation of the
    nearest render of any test object. As in eval_MRR_Hk.py and eval_prediction_errors.py (val-val) of
    facebookresearch/SIE.
    """

    name: ClassVar[str] = "rendered_prediction"
    metrics: ClassVar[tuple[Metric, ...]] = (MRR, HIT_1, HIT_5, PRE)
    reading: ClassVar[str] = (
        "Retrieval among the renders of an object: 1 finds each; PRE: 0 is always the right rotation."
    )
    data_type: ClassVar[type[EvaluationData]] = RenderedData
    tasks = ("prediction",)

    def __init__(self, data: RenderedData) -> None:
        """Keep the renders, of which the test objects are used."""
        super().__init__(data, features=("equivariant_cls",), seeds=1)
        self.latents = data.latents

    def features_of(self, encoder: FrozenEncoder) -> tuple[str, ...]:
        """Name the features that the predictor reads."""
        return self.features if encoder.predictor is None else (encoder.predictor.features,)

    def check(self, encoder: FrozenEncoder) -> None:
        """Raise ``ValueError`` where there is no predictor, or not the features that it reads."""
        if encoder.predictor is None:
            raise ValueError(
                f"{encoder.name} comes without the predictor of SIE. Give the pretraining state that holds it, a "
                "checkpoint of the run or the published pretraining/: --predictor PATH."
            )
        super().check(encoder)

    def settings(self, task: str) -> dict[str, Any]:
        """Return what the numbers depend on beside the data: the render that is the start, and the similarity."""
        return {"from": "the first render of each object", "similarity": "cosine"}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Predict every render of every test object from its first one."""
        predictor: RenderPredictor = encoder.predictor
        part, latents = self.data.test, self.latents[self.data.test.split]
        objects, renders = latents.shape[:2]
        kind = self.features_of(encoder)[0]
        _, features = part.features(encoder, (kind,))
        embedded = predictor.embed(features[kind]).unflatten(0, (objects, renders))
        start, end = latents[:, :1].expand_as(latents).flatten(0, 1), latents.flatten(0, 1)
        source = embedded[:, :1].expand_as(embedded).flatten(0, 1)
        predicted = predictor.predict(source, parameters_between(start, end))
        views = embedded.repeat_interleave(renders, dim=0)
        ranks = target_ranks(predicted, views, torch.arange(renders).repeat(objects))
        rotations = quaternions(end[:, :3])
        error = prediction_retrieval_error(predicted, rotations, embedded.flatten(0, 1), rotations)
        values = {
            MRR.name: [mean_reciprocal_rank(ranks)],
            HIT_1.name: [hit_rate(ranks, 1)],
            HIT_5.name: [hit_rate(ranks, 5)],
            PRE.name: [error],
        }
        return self.records(encoder, task, kind, values, seeds)


def parameters_between(start: Tensor, end: Tensor) -> dict[str, Tensor]:
    """Name what leads from one latent (n, 7) to another, as ``RenderedPairs`` does for training: name -> (n,)."""
    rotation = relative_rotation(quaternions(start[:, :3]), quaternions(end[:, :3]))
    numbers = torch.cat([rotation, (end - start)[:, 3:].double()], 1).float()
    return dict(zip(RenderedPairs(2).parameter_names, numbers.unbind(1), strict=True))
