"""The card beside a fine-tuned model or adapter, from what is known of it: its description and its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..evaluation.results import ResultRecord
from ..hub.card.licence import describe_licence
from ..hub.card.metadata import eval_result
from ..hub.card.writer import write
from ..hub.licences import Licence
from ..hub.privacy import is_hub_id, public_source
from ..utils.files import write_text
from .adapters import Description
from .report import comparison_table
from .settings import METHODS
from .tasks import TASKS

CARD = "README.md"
_CLASSES_SHOWN = 20
_VERBS = {"image-classification": "classify", "image-segmentation": "segment", "object-detection": "detect"}


def write_card(
    folder: Path,
    description: Description,
    records: Sequence[ResultRecord],
    name: str | None = None,
    licence: Licence | None = None,
) -> None:
    """Write ``README.md``: what the weights are, on what they were measured, how to load them.

    Args:
        folder: Folder of the weights.
        description: What they are.
        records: As ``public_record`` makes them; may be empty.
        name: Hub id under which they will be found; default: the folder's name.
        licence: That of the weights, once they are published.
    """
    base, name = public_source(description.base), name or folder.name
    is_adapter = (folder / "adapter_config.json").is_file()
    data = records[0].dataset if records else None
    terms: dict[str, Any] = {} if licence is None else licence.card_fields()
    head = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=TASKS[description.task].pipeline_tag,
        tags=[str(description.architecture["model_type"]), description.method],
        base_model=base if is_hub_id(description.base) else None,
        datasets=[data] if data is not None and is_hub_id(data) else None,
        model_name=name.rpartition("/")[2],
        eval_results=[eval_result(record) for record in records] or None,
        **terms,
    )
    context = _context(description, records, base, name, is_adapter)
    context["licence"] = "" if licence is None else describe_licence(licence)
    write_text(folder / CARD, write("finetuned.md", head, context))


def _context(
    description: Description, records: Sequence[ResultRecord], base: str, name: str, is_adapter: bool
) -> dict[str, Any]:
    task, method = TASKS[description.task], METHODS[description.method]
    return {
        "is_adapter": is_adapter,
        "base": base,
        "name": name,
        "task": task,
        "description": description,
        "trained": method.description.format(head=task.head),
        "merged": method.adapter and not is_adapter,
        "shown": description.classes[:_CLASSES_SHOWN],
        "ours": description.architecture["model_type"] == "equissl",
        "verb": _VERBS.get(task.pipeline_tag or "", "predict"),
        "results": comparison_table(records) if records else "",
        "record": records[0] if records else None,
    }
