"""The YAML head of a model card: what the Hub indexes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ...evaluation.results import ResultRecord, merge_records
from ..privacy import is_hub_id

PIPELINE_TAG = "image-feature-extraction"
TAGS = ("equissl", "self-supervised-learning", "equivariance", "vision-transformer")
# Names of metrics as the Hub lists them.
_METRICS = {"top1": "accuracy", "r2": "r_squared"}


def card_data(
    *,
    repo_id: str,
    license: str,
    objectives: Sequence[str],
    data: str | None,
    base_model: str | None,
    records: Sequence[ResultRecord],
) -> ModelCardData:
    """The head of a card.

    Args:
        repo_id: Name on the Hub.
        license: Identifier of the licence.
        objectives: Registry keys, as tags.
        data: Name of the training data; listed where it is a Hub id.
        base_model: Where training started; listed where it is a Hub id.
        records: Each becomes one entry of ``model-index``; R2 in SIE's form, a second view of R2, does not.
    """
    return ModelCardData(
        license=license,
        # Not "hf-equissl": its auto classes and pipelines load what is published, and the Hub knows how.
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=[*TAGS, *(name.replace("_", "-") for name in objectives)],
        datasets=[data] if data is not None and is_hub_id(data) else None,
        base_model=base_model if is_hub_id(base_model) else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=[eval_result(record) for record in merge_records(records) if record.metric != "r2_scalar"] or None,
    )


def eval_result(record: ResultRecord) -> EvalResult:
    """One record as an entry of ``model-index``: the mean over seeds, rounded, and how it was measured."""
    classification = record.task == "classification"
    arguments: dict[str, Any] = {"evaluator": record.evaluator, "features": record.features}
    arguments["seeds"] = list(record.seeds)
    if record.std is not None:
        arguments["std"] = rounded(record, record.std)
    if record.command:
        arguments["command"] = record.command
    return EvalResult(
        task_type="image-classification" if classification else PIPELINE_TAG,
        task_name="Image classification" if classification else "Image features",
        dataset_type=record.dataset,
        dataset_name=record.dataset.rpartition("/")[2],
        dataset_split=record.split,
        metric_type=_METRICS.get(record.metric, record.metric),
        metric_name=metric_name(record),
        metric_value=rounded(record, record.value),
        metric_args=arguments,
    )


def metric_name(record: ResultRecord) -> str:
    """Such as "linear top1 (cls)", "rotation r2 (backbone)" or "effective rank (cls)"."""
    return f"{record.name.replace('_', ' ')} ({record.features})"


def rounded(record: ResultRecord, value: float) -> float:
    """Four decimals of a share or an R2, two of an effective rank."""
    return round(value, 2 if record.metric == "effective_rank" else 4)
