"""What a fine-tuning run says of itself: result records, a table over runs, curves."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..encoders.base_image import resized_side
from ..evaluation.results import FINE_TUNING, ResultRecord, load_records
from ..hub.privacy import public_source
from ..pretraining.run_record import RunRecord
from ..utils.figures import plot_losses
from ..utils.files import write_text
from .classifier import count_parameters
from .settings import METHODS

if TYPE_CHECKING:
    from .prepared import FineTuningRun

logger = logging.getLogger(__name__)
RESULTS, TABLE, CURVES = "results.json", "results.md", "curves.png"
_METRICS = ("top1", "top5")


def make_records(
    run: FineTuningRun, history: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], command: str | None
) -> list[ResultRecord]:
    """One record per accuracy, with what it cost."""
    settings = run.settings
    accuracies = [float(entry["eval_top1"]) for entry in history if "eval_top1" in entry]
    record = RunRecord.load(settings.output_dir)
    details = {
        "mean_per_class": metrics["eval_mean_per_class"],
        "loss": metrics["eval_loss"],
        "best_of_all_evaluations": max(accuracies, default=metrics["eval_top1"]),
        "saved_bytes": saved_bytes(run.folder),
        "seconds": record.seconds,
    }
    return [
        ResultRecord(
            evaluator=FINE_TUNING,
            task="classification",
            metric=name,
            features=run.description.pooling,
            values=(float(metrics[f"eval_{name}"]),),
            seeds=(settings.seed,),
            primary=name == "top1",
            dataset=settings.data,
            split=run.images.test_split,
            protocol=protocol(run),
            encoder=settings.encoder,
            encoder_digest=run.encoder_digest,
            details={key: [value] for key, value in details.items()} if name == "top1" else {},
            command=command,
        )
        for name in _METRICS
        if f"eval_{name}" in metrics
    ]


def protocol(run: FineTuningRun) -> dict[str, Any]:
    """Every setting that can change the number, except the seed, and how much was trained."""
    settings, args = run.settings, run.args
    trained, total = count_parameters(run.model)
    side, size = resized_side(run.description.image_size), run.description.image_size
    adapters = {
        "lora_rank": settings.lora_rank,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": settings.target_modules or "default",
    }
    view = run.pipeline.spec.views[0]
    return {
        "method": settings.method,
        "epochs": settings.epochs,
        "batch": args.global_batch_size,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "layer_decay": settings.layer_decay,
        "warmup": settings.warmup,
        "label_smoothing": settings.label_smoothing,
        "drop_path": settings.drop_path,
        **(adapters if settings.is_adapter else {}),
        "crop_scale": list(view.crop_scale or ()),
        "flip_probability": view.flip_probability,
        "weights": f"{settings.keep} step",
        "precision": "bf16" if settings.bf16 else "fp32",
        "image_size": size,
        **({} if side == size else {"resized_side": side}),
        "train_split": run.images.train_split,
        "train_images": len(run.images.train),
        "test_images": len(run.images.test),
        "trained_parameters": trained,
        "parameters": total,
    }


def saved_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder: of an adapter, or of a whole model."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# ---- tables ----


def comparison_table(records: Sequence[ResultRecord]) -> str:
    """One Markdown row per way to use an encoder: fine-tuned ones and, where they are given, linear probes and kNN."""
    header = ["encoder", "method", "reads", "top-1 %", "top-5 %", "trained weights", "saved", "epochs", "seconds"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        if record.task != "classification" or record.metric not in _METRICS:
            continue
        key = (record.encoder, _method(record), record.features, str(record.protocol), str(record.dataset))
        row = rows.setdefault(key, [public_source(record.encoder), key[1], record.features, *[""] * 6])
        row[3 + _METRICS.index(record.metric)] = _percent(record)
        if record.metric == "top1" and record.evaluator == FINE_TUNING:
            row[5:] = _cost(record)
    lines = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows.values()]]
    return "\n".join(lines) + "\n"


def _method(record: ResultRecord) -> str:
    if record.evaluator != FINE_TUNING:
        return f"{record.evaluator} (frozen features)"
    method = str(record.protocol["method"])
    return f"{method} r={record.protocol['lora_rank']}" if METHODS[method].adapter else method


def _percent(record: ResultRecord) -> str:
    spread = "" if record.std is None else f" +- {100 * record.std:.2f}"
    return f"{100 * record.value:.2f}{spread}"


def _cost(record: ResultRecord) -> list[str]:
    trained, total = record.protocol["trained_parameters"], record.protocol["parameters"]
    seconds = sum(record.details["seconds"]) / len(record.seeds)
    size = max(record.details["saved_bytes"])
    return [f"{trained:,} ({trained / total:.2%})", _size(size), f"{record.protocol['epochs']:g}", f"{seconds:.0f}"]


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def compare(folders: Sequence[str]) -> str:
    """The table over the ``results.json`` of several folders.

    Raises:
        ValueError: a folder has none, or there is no accuracy among them.
    """
    records: list[ResultRecord] = []
    for folder in folders:
        path = Path(folder) if folder.endswith(".json") else Path(folder) / RESULTS
        if not path.is_file():
            raise ValueError(
                f"--compare {folder}: there is no {RESULTS}. Give folders of finished runs or of probe.py."
            )
        records += load_records(path)
    if not any(record.task == "classification" and record.metric in _METRICS for record in records):
        raise ValueError(f"--compare {' '.join(folders)}: no accuracy among the results.")
    return comparison_table(records)


def write_table(records: Sequence[ResultRecord], output: Path) -> None:
    """Write ``results.md``."""
    write_text(output / TABLE, comparison_table(records))


def plot_curves(history: Sequence[Mapping[str, Any]], name: str, output: Path) -> None:
    """Write ``curves.png``: training loss, test loss and accuracy over steps; a log line without matplotlib."""
    panels = {"loss": "training loss", "eval_loss": "test loss", "eval_top1": "test accuracy"}
    logged = {key for entry in history for key in entry}
    try:
        plot_losses({name: history}, {key: title for key, title in panels.items() if key in logged}, output / CURVES)
    except ImportError as error:
        logger.info("No picture: %s", error)
