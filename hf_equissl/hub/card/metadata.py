"""The YAML head of a model card: what the Hub indexes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ...evaluation.results import ResultRecord, merge_records
from ...objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES
from ..privacy import is_hub_id

PIPELINE_TAG = "image-feature-extraction"
TAGS = ("equissl", "self-supervised-learning", "vision-transformer")


def learns_classes(objectives: Sequence[str]) -> bool:
    """Whether one of the objectives was told the classes of the images.

    Args:
        objectives: Registry keys, that of the invariance objective first.
    """
    kinds = [INVARIANCE_OBJECTIVES[objectives[0]], *(EQUIVARIANCE_OBJECTIVES[name] for name in objectives[1:])]
    return any(kind.reads_num_classes for kind in kinds)


def card_data(
    *,
    repo_id: str,
    license: str,
    license_name: str | None = None,
    license_link: str | None = None,
    objectives: Sequence[str],
    data: str | None,
    base_model: str | None,
    records: Sequence[ResultRecord],
) -> ModelCardData:
    """Make the head of a card.

    Args:
        repo_id: Name on the Hub.
        license: Identifier of the licence.
        license_name: Name of a licence that the Hub does not list, where ``license`` is "other".
        license_link: Where that is written.
        objectives: Registry keys, as tags: the invariance objective and, if there are any, equivariance objectives.
        data: Name of the training data; listed where it is a Hub id.
        base_model: Where training started; listed where it is a Hub id.
        records: Each becomes one entry of ``model-index``, unless its metric has no name on the Hub.
    """
    tags = [tag for tag in TAGS if tag != "self-supervised-learning" or not learns_classes(objectives)]
    names = [*tags, *(["equivariance"] if len(objectives) > 1 else []), *objectives]
    return ModelCardData(
        license=license,
        license_name=license_name,
        license_link=license_link,
        # Not "hf-equissl": auto classes and pipelines of transformers load what is published, and the Hub shows how.
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=[name.replace("_", "-") for name in names],
        datasets=[data] if data is not None and is_hub_id(data) else None,
        base_model=base_model if is_hub_id(base_model) else None,
        model_name=repo_id.rpartition("/")[2],
        eval_results=eval_results(records),
    )


def eval_results(records: Sequence[ResultRecord]) -> list[EvalResult] | None:
    """Turn records into the entries of ``model-index``; ``None`` where there is none."""
    return [eval_result(record) for record in merge_records(records) if record.about.hub_type is not None] or None


def eval_result(record: ResultRecord) -> EvalResult:
    """Make one entry of ``model-index``: the mean over seeds, rounded, and how it was measured."""
    arguments: dict[str, Any] = {"evaluator": record.evaluator, "features": record.features}
    arguments["seeds"] = list(record.seeds)
    if record.std is not None:
        arguments["std"] = record.about.round(record.std)
    if record.command:
        arguments["command"] = record.command
    return EvalResult(
        task_type=record.hub_task,
        task_name=record.hub_task.replace("-", " ").capitalize(),
        dataset_type=record.dataset,
        dataset_name=record.dataset.rpartition("/")[2],
        dataset_split=record.split,
        metric_type=record.about.hub_type or record.metric,
        metric_name=metric_name(record),
        metric_value=record.about.round(record.value),
        metric_args=arguments,
    )


def metric_name(record: ResultRecord) -> str:
    """Name a number for readers, such as "linear top1 (cls)", "rotation r2 (backbone)" or "effective rank (cls)"."""
    return f"{record.name.replace('_', ' ')} ({record.features})"
