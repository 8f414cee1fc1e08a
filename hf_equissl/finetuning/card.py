"""The card beside a fine-tuned model or adapter, from what is known of it: its description and its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..evaluation.results import ResultRecord
from ..hub.card.metadata import eval_result
from ..hub.privacy import is_hub_id, public_command, public_source
from .adapters import Description
from .report import comparison_table
from .settings import METHODS
from .tasks import TASKS

CARD = "README.md"
_CLASSES_SHOWN = 20
_VERBS = {"image-classification": "classify", "image-segmentation": "segment"}


def public_records(records: Sequence[ResultRecord], base: str) -> list[ResultRecord]:
    """Return records as others may read them: no path of this machine, the encoder called ``base``."""
    return [
        replace(
            record,
            dataset=public_source(record.dataset),
            encoder=base,
            command=None if record.command is None else public_command(record.command, {record.encoder: base}),
        )
        for record in records
    ]


def write_card(
    folder: Path, description: Description, records: Sequence[ResultRecord], name: str | None = None
) -> None:
    """Write ``README.md``: what the weights are, on what they were measured, how to load them.

    Args:
        folder: Where the weights are.
        description: Theirs.
        records: As ``public_records`` gives them; may be empty.
        name: Hub id under which they will be found; default: the folder's name.
    """
    base, name = public_source(description.base), name or folder.name
    is_adapter = (folder / "adapter_config.json").is_file()
    data = records[0].dataset if records else None
    head = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=TASKS[description.task].pipeline_tag,
        tags=[str(description.architecture["model_type"]), description.method],
        base_model=base if is_hub_id(description.base) else None,
        datasets=[data] if data is not None and is_hub_id(data) else None,
        model_name=name.rpartition("/")[2],
        eval_results=[eval_result(record) for record in records] or None,
    )
    lines = _text(description, records, base, name, is_adapter)
    ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n").save(folder / CARD)


def _text(
    description: Description, records: Sequence[ResultRecord], base: str, name: str, is_adapter: bool
) -> list[str]:
    task = TASKS[description.task]
    shown = description.classes[:_CLASSES_SHOWN]
    classes = ", ".join([*shown, *(["..."] if len(shown) < len(description.classes) else [])])
    method = METHODS[description.method]
    merged = " The adapters are merged into the weights." if method.adapter and not is_adapter else ""
    lines = [
        f"# {'Adapter' if is_adapter else task.result} from {base}",
        "",
        f"The encoder `{base}` (weights `{description.digest[:12]}`) fine-tuned for {task.noun}; trained was "
        f"{method.description.format(head=task.head)}.{merged} The head reads `{description.pooling}` at "
        f"{description.image_size} pixels.",
        "",
        *([f"{len(description.classes)} classes: {classes}.", ""] if classes else []),
        *_usage(description, name, is_adapter),
    ]
    if records:
        lines += ["", "## Results", "", comparison_table(records), *_measured(records[0])]
    return lines


def _usage(description: Description, name: str, is_adapter: bool) -> list[str]:
    ours = description.architecture["model_type"] == "equissl"
    tag = TASKS[description.task].pipeline_tag
    if is_adapter or tag is None:
        comment = "  # on its base; merge=True adds the adapter into the weights" if is_adapter else ""
        code = ["from hf_equissl.finetuning import load_finetuned", "", f'model = load_finetuned("{name}"){comment}']
    else:
        code = [
            *(["import hf_equissl  # registers EquiSSL encoders"] if ours else []),
            "from transformers import pipeline",
            "",
            f'{_VERBS.get(tag, "predict")} = pipeline("{tag}", model="{name}")',
        ]
    return ["```python", *code, "```"]


def _measured(record: ResultRecord) -> list[str]:
    settings = record.protocol
    chosen = " The step was chosen on these same images." if str(settings["weights"]).startswith("best") else ""
    seeds = ", ".join(map(str, record.seeds))
    lines = [
        f"Trained on {settings['train_images']} images of {record.dataset} ({settings['train_split']}), measured on "
        f"{settings['test_images']} ({record.split}), seed {seeds}, weights of the {settings['weights']}.{chosen}",
        "",
        "Settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()) + ".",
    ]
    return [*lines, "", "```bash", record.command, "```"] if record.command else lines
