"""What a fine-tuning run says of itself: result records, a table over runs, curves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.metrics import Metric
from ..evaluation.results import FINE_TUNING, ResultRecord, load_records
from ..hub.privacy import public_source
from ..pretraining.run_record import RunRecord
from ..utils.figures import plot_losses
from ..utils.files import readable_size, write_text
from ..utils.markdown import plain, table
from .result_files import find_results
from .settings import METHODS
from .tasks import TASKS
from .weights import count_parameters

if TYPE_CHECKING:
    from .prepared import FineTuningRun

logger = logging.getLogger(__name__)
TABLE, CURVES = "results.md", "curves.png"
_TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "box_ap": "box AP",
    "box_ap50": "box AP50",
    "mask_ap": "mask AP",
    "mask_ap50": "mask AP50",
    "mce": "MCE",
    "oks_ap": "OKS AP",
    "oks_ap50": "OKS AP50",
    "pckh": "PCKh@0.5",
    "rmse": "RMSE",
    "abs_rel": "AbsRel",
}
# What a task measures under such a name is the primary metric of doing without a network, a row of its own in tables.
BASELINE = "baseline_"


def make_records(
    run: FineTuningRun, history: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], command: str | None
) -> list[ResultRecord]:
    """Make one record per metric of the task; that of the primary one says what the result cost."""
    settings, task = run.settings, run.task
    primary = f"eval_{task.primary.name}"
    declared = {metric.name: metric for metric in task.metrics}
    values = [float(entry[primary]) for entry in history if primary in entry] or [float(metrics[primary])]
    # What the Trainer adds, such as eval_runtime, is no property of the model.
    added = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    measured = {
        name[5:]: value for name, value in metrics.items() if name.startswith("eval_") and name[5:] not in added
    }
    details = {
        **{name: float(value) for name, value in measured.items() if name not in declared},
        "loss": metrics["eval_loss"],
        "best_of_all_evaluations": max(values) if task.primary.higher_is_better else min(values),
        "saved_bytes": saved_bytes(run.folder),
        "seconds": RunRecord.load(settings.output_dir).seconds,
    }
    return [
        ResultRecord(
            evaluator=FINE_TUNING,
            task=task.name,
            metric=name,
            features=run.description.pooling,
            values=(float(metrics[f"eval_{name}"]),),
            seeds=(settings.seed,),
            primary=name == task.primary.name,
            dataset=settings.data,
            split=run.splits.test_split,
            protocol=protocol(run),
            encoder=settings.encoder,
            encoder_digest=run.encoder_digest,
            details={key: [value] for key, value in details.items()} if name == task.primary.name else {},
            about=metric,
            hub_task=task.pipeline_tag or "",
            command=command,
        )
        for name, metric in declared.items()
        if f"eval_{name}" in metrics
    ]


def protocol(run: FineTuningRun) -> dict[str, Any]:
    """Return every setting that can change the number, except the seed, and how much was trained."""
    settings, args = run.settings, run.args
    trained, total = count_parameters(run.model)
    adapters = {
        "lora_rank": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": settings.target_modules or "default",
    }
    return {
        "method": settings.method,
        "epochs": settings.epochs,
        "batch": args.global_batch_size,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "layer_decay": settings.layer_decay,
        "warmup": settings.warmup,
        "drop_path": settings.drop_path,
        **(adapters if settings.is_adapter else {}),
        **run.task.protocol(),
        "weights": f"{settings.keep} step",
        "precision": "bf16" if settings.bf16 else "fp32",
        "image_size": run.description.image_size,
        **({} if settings.value_range in (None, "full") else {"value_range": settings.to_dict()["value_range"]}),
        "train_split": run.splits.train_split,
        "train_images": len(run.splits.train),
        "test_images": len(run.splits.test),
        "trained_parameters": trained,
        "parameters": total,
    }


def saved_bytes(folder: Path) -> int:
    """Return the size in bytes of the weights in a folder: of an adapter, or of a whole model."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# ---- tables ----


def comparison_table(records: Sequence[ResultRecord]) -> str:
    """Write one Markdown table per task: a row for each way to use an encoder, linear probes and kNN among them."""
    tables = []
    for task in dict.fromkeys(record.task for record in records if _metrics_of(record.task)):
        metrics = _metrics_of(task)
        chosen = [record for record in records if record.task == task and record.metric in metrics]
        tables.append(_table(chosen, metrics))
    return "\n".join(tables)


def _metrics_of(task: str) -> dict[str, Metric]:
    """Return the metrics of a task of the registry; none of what is no task, such as rotation."""
    return {metric.name: metric for metric in TASKS[task].metrics} if task in TASKS else {}


def _table(records: Sequence[ResultRecord], metrics: Mapping[str, Metric]) -> str:
    names = [f"{_TITLES.get(name, name.replace('_', ' '))} {metric.unit}".strip() for name, metric in metrics.items()]
    header = ["encoder", "method", "reads", *names, "trained weights", "saved", "epochs", "seconds"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        key = (record.encoder, _method(record), record.features, str(record.protocol), str(record.dataset))
        empty = [""] * (len(metrics) + 4)
        row = rows.setdefault(key, [public_source(record.encoder), key[1], record.features, *empty])
        row[3 + list(metrics).index(record.metric)] = metrics[record.metric].text(record.value, record.std)
        if record.primary and record.evaluator == FINE_TUNING:
            row[-4:] = _cost(record)
            for name, number in _baselines(record):
                empty = [""] * (len(metrics) + 5)
                row = rows.setdefault((name, str(record.dataset), number), [name, "no network", *empty])
                row[3 + list(metrics).index(record.metric)] = number
    return table([[*map(plain, row)] for row in (header, *rows.values())]) + "\n"


def _baselines(record: ResultRecord) -> list[tuple[str, str]]:
    """List (name, value in words) of what a record says is reached without a network."""
    return [
        (name.removeprefix(BASELINE).replace("_", " "), record.about.text(values[0]))
        for name, values in record.details.items()
        if name.startswith(BASELINE)
    ]


def _method(record: ResultRecord) -> str:
    if record.evaluator != FINE_TUNING:
        return f"{record.evaluator} (frozen features)"
    method = str(record.protocol["method"])
    return f"{method} r={record.protocol['lora_rank']}" if METHODS[method].adapter else method


def _cost(record: ResultRecord) -> list[str]:
    trained, total = record.protocol["trained_parameters"], record.protocol["parameters"]
    seconds = sum(record.details["seconds"]) / len(record.seeds)
    size = max(record.details["saved_bytes"])
    return [
        f"{trained:,} ({trained / total:.2%})",
        readable_size(size),
        f"{record.protocol['epochs']:g}",
        f"{seconds:.0f}",
    ]


def compare(folders: Sequence[str]) -> str:
    """Write the table over the ``results.json`` of several folders.

    Raises:
        ValueError: a folder has none, or there is no metric of a task among them.
    """
    records: list[ResultRecord] = []
    for folder in folders:
        records += load_records(find_results(folder))
    if not (text := comparison_table(records)):
        raise ValueError(f"--compare {' '.join(folders)}: no results of {' or '.join(TASKS)} among them.")
    return text


def write_table(records: Sequence[ResultRecord], output: Path) -> None:
    """Write ``results.md``."""
    write_text(output / TABLE, comparison_table(records))


def plot_curves(history: Sequence[Mapping[str, Any]], name: str, metric: Metric, output: Path) -> None:
    """Write ``curves.png``: training loss, test loss and the metric over steps; a log line without matplotlib."""
    title = "test accuracy" if metric.name == "top1" else f"test {_TITLES.get(metric.name, metric.name)}"
    panels = {"loss": "training loss", "eval_loss": "test loss", f"eval_{metric.name}": title}
    logged = {key for entry in history for key in entry}
    try:
        plot_losses({name: history}, {key: title for key, title in panels.items() if key in logged}, output / CURVES)
    except ImportError as error:
        logger.info("No picture: %s", error)
