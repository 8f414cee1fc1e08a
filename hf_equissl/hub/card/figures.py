"""Figures of a published run, each with the sentence that says what to see."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...evaluation import EVALUATORS
from ...evaluation.encoder_report import DIFFERENCES, Comparison, plot_differences
from ...evaluation.results import ResultRecord
from ...utils.figures import plot_losses
from ...utils.markdown import code
from ..privacy import public_source
from ..run_folder import RunFolder

logger = logging.getLogger(__name__)

MONITOR_FILE = "monitor.png"


@dataclass(frozen=True)
class Figure:
    """A picture of the card: its file name, what it is, and what to see in it."""

    file: str
    title: str
    caption: str


def draw_figures(
    run: RunFolder, records: Sequence[ResultRecord], folder: str | Path, compared: Comparison | None = None
) -> list[Figure]:
    """Draw what the run and its records give into ``folder``.

    Args:
        run: Logs come from its Trainer, the monitor's picture from its folder.
        records: Results of the published encoder.
        folder: Created where there is something to draw.
        compared: Differences to another encoder.

    Returns:
        Figures in the order in which a card shows them; none for a run that has logged nothing. Without matplotlib,
        which a run may lack, a warning and none.
    """
    folder = Path(folder)
    if find_spec("matplotlib") is None:
        logger.warning("The repository gets no figures: they need matplotlib, pip install 'hf-equissl[plots]'.")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Figure] = []
    losses = [entry for entry in run.history if "loss" in entry and "loss_ssl" in entry]
    if losses:
        found.append(_losses(run, losses, folder))
    if any("effective_rank" in entry for entry in run.history):
        found.append(_features(run, folder))
    for name, evaluator in EVALUATORS.items():
        own = [record for record in records if record.evaluator == name]
        for plot in evaluator.plots if own else ():
            plot.draw(own, folder / plot.file)
            found.append(Figure(plot.file, plot.title, plot.caption(own)))
    if compared is not None:
        plot_differences(compared, folder / DIFFERENCES)
        found.append(Figure(DIFFERENCES, f"Differences to {compared.baseline}", compared.caption))
    if (run.path / MONITOR_FILE).is_file():
        shutil.copyfile(run.path / MONITOR_FILE, folder / MONITOR_FILE)
        found.append(_monitor(run))
    if not found:
        folder.rmdir()
    return found


def _losses(run: RunFolder, entries: Sequence[Mapping[str, Any]], folder: Path) -> Figure:
    panels = {"loss": "loss", "loss_ssl": f"invariance: {run.config.invariance['name']}"}
    for entry in run.objectives()["equivariance"]:
        panels[f"loss_{entry['name']}"] = f"{entry['weight']:g} x {entry['name']}"
    changes = [f"{title} from {_span(entries, key)}" for key, title in panels.items()]
    if any("learning_rate" in entry for entry in entries):
        panels["learning_rate"] = "learning rate"
    plot_losses({run.name: entries}, panels, folder / "losses.png", columns=2)
    span = f"step {entries[0]['step']} to step {entries[-1]['step']}"
    return Figure(
        "losses.png", "Training losses", f"From {span}: {', '.join(changes)}. Weighted parts add up to the loss."
    )


def _span(entries: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [entry[key] for entry in entries if key in entry]
    return f"{values[0]:.4g} to {values[-1]:.4g}"


def _features(run: RunFolder, folder: Path) -> Figure:
    entries = [entry for entry in run.history if "effective_rank" in entry and "feature_std" in entry]
    panels = {"effective_rank": "effective rank", "feature_std": "standard deviation"}
    plot_losses({run.name: entries}, panels, folder / "features.png")
    lowest = min(entries, key=lambda entry: entry["effective_rank"])
    caption = (
        "CLS features of one training batch, student network. A collapse would bring the rank to 1: it is lowest at "
        f"step {lowest['step']} with {lowest['effective_rank']:.1f} and ends at {entries[-1]['effective_rank']:.1f}."
    )
    return Figure("features.png", "Collapse monitors", caption)


def _monitor(run: RunFolder) -> Figure:
    entries = [entry for entry in run.history if "monitor/knn_top1" in entry]
    knn = f" kNN accuracy from {_span(entries, 'monitor/knn_top1')}." if entries else ""
    source = run.section("monitor").get("source")
    images = f"images of {code(public_source(source))}" if source else "training images"
    caption = f"The encoder on a fixed set of {images}, measured during training without changing it.{knn}"
    return Figure(MONITOR_FILE, "What the monitor saw", caption)
