"""The online monitor: k-nearest-neighbour accuracy and effective rank during training, so that collapse is seen early.

A recipe switches it on:

```yaml
monitor:
  every_steps: 500           # also before the first step and after the last one
  train_images: 5000         # neighbours are looked for among these; they also give effective rank and feature std
  test_images: 1000          # these are classified
  source: null               # another data set than the training data; `split`, `column`, `label_column` as in `data`
```

It looks at the encoder that would be exported, the teacher where there is one, on the same images each time: by default
a fixed random part of the training data (of a stream: its first images), resized and cropped as by the probes. Results
go to the Trainer's log (``monitor/knn_top1``, ``monitor/effective_rank``, ``monitor/feature_std``) and into the output
folder: ``monitor.jsonl`` and, where matplotlib is installed, ``monitor.png``. It changes no bit of the run's weights.

Images are decoded once and kept as uint8 (6,000 of 224 x 224 pixels: 0.9 GB); a measurement is one pass of the encoder
over them. Several processes share both. Without labels there is no accuracy.

An effective rank that has fallen below 2, or below a tenth of the best so far, gives a warning. Do not read more into
the first hundreds of steps: untrained encoders can rank high, and sound runs may lose most of that before they gain.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..data import ImageSource, load_images
from ..distributed.collectives import is_main_process
from ..encoders.frozen import FrozenEncoder
from ..evaluation.data import image_set
from ..evaluation.images import ImageSet
from ..evaluation.knn import knn_votes
from ..evaluation.metrics import topk_accuracy
from ..evaluation.resident import ResidentImages
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLForPreTraining
from ..recipes.monitor_settings import MonitorSettings
from ..recipes.recipe import Recipe
from ..recipes.sections import name_section
from ..utils.feature_statistics import effective_rank, feature_std
from ..utils.figures import plot_losses
from ..utils.files import readable_size, write_text

logger = logging.getLogger(__name__)

RECORDS_FILE = "monitor.jsonl"
PLOT_FILE = "monitor.png"
PANELS = {
    "monitor/knn_top1": "kNN top-1 accuracy",
    "monitor/effective_rank": "effective rank (RankMe)",
    "monitor/feature_std": "feature std",
}
_RANK = "monitor/effective_rank"
# An effective rank that has halved is alarming below the first number, or below the second as a share of its best.
COLLAPSED_RANK = 2.0
COLLAPSED_SHARE = 0.1
TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO's eval_knn.py
SUBSET_SEED = 0
LARGEST_BATCH = 256


def load_monitor_images(settings: MonitorSettings, training: ImageSource, data: Mapping[str, Any]) -> ImageSet:
    """Open the images of the monitor, still encoded: ``train_images`` + ``test_images``, or as many as there are.

    Args:
        settings: They say which images.
        training: The training data, opened.
        data: Arguments of ``load_images`` that opened them: of another split of the same source.

    Raises:
        ValueError: Source, split or column do not exist, no image can be read, or there are fewer than three.
    """
    own = {key: value for key in ("split", "column", "label_column") if (value := getattr(settings, key)) is not None}
    source = training
    if settings.source is not None:
        source = load_images(settings.source, **own)
    elif own and own["split"] != data.get("split", "train"):
        source = load_images(**{**data, **own})
    if source is not training:
        source.check()
    # The run itself judges how many of its images may be bad: here they are left out.
    images = image_set(
        source,
        source.name,
        "monitor",
        settings.train_images + settings.test_images,
        SUBSET_SEED,
        max_bad_share=1.0,
        progress=False,
    )
    least = 2 + bool(settings.test_images)
    if len(images) < least:
        raise ValueError(f"{source.name} has {len(images)} image(s): the monitor needs at least {least}.")
    return images


def build_monitor(recipe: Recipe, training: ImageSource) -> OnlineMonitor | None:
    """Build the monitor that ``recipe`` asks for, by default on images of the ``training`` data.

    Returns:
        ``None`` without ``monitor.every_steps``.

    Raises:
        RecipeError: Its images cannot be read.
    """
    settings = MonitorSettings(**recipe.monitor)
    if settings.every_steps is None:
        return None
    with name_section("monitor"):
        images = load_monitor_images(settings, training, recipe.source_arguments)
    return OnlineMonitor(settings, images, recipe.views.image_mean, recipe.views.image_std)


class OnlineMonitor(TrainerCallback):
    """Measures the encoder on a schedule while the Trainer trains it. The module says what, and where results go.

    Weights, training mode and random states stay as they are. With several processes each encodes its share; all have
    to call the same methods. Encoders whose weights are sharded (FSDP, ZeRO-3) are not measured: a warning says so.

    Args:
        settings: When to measure, and what.
        images: What ``load_monitor_images`` returned.
        image_mean, image_std: Normalisation of the run, three numbers each.

    Attributes:
        log: Takes the results, e.g. ``trainer.log``; set it before training.
        records: Results so far, one per step: what stands in ``monitor.jsonl``. Kept by the main process.
    """

    def __init__(
        self, settings: MonitorSettings, images: ImageSet, image_mean: Sequence[float], image_std: Sequence[float]
    ) -> None:
        self.settings, self.image_mean, self.image_std = settings, image_mean, image_std
        self.log: Callable[[dict[str, float]], None] | None = None
        self.records: list[dict[str, Any]] = []
        self._encoded: ImageSet | None = images
        self._images: ResidentImages | None = None
        self._is_query = self._choose_queries(len(images))
        self._labels = self._find_labels(images)
        self._off = False

    def _choose_queries(self, count: int) -> Tensor:
        """Choose which of the images are classified, a bool for each (count,); the others are the bank."""
        settings = self.settings
        wanted = settings.train_images + settings.test_images
        queries = settings.test_images
        if count < wanted and queries:
            queries = max(1, min(count - 2, round(count * queries / wanted)))
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[torch.randperm(count, generator=torch.Generator().manual_seed(SUBSET_SEED))[:queries]] = True
        return chosen

    def _find_labels(self, images: ImageSet) -> Tensor | None:
        labels = images.labels
        if not self.settings.test_images:
            return None
        if labels is not None and bool((labels >= 0).all()):
            return labels
        if is_main_process():
            logger.warning(
                "Online monitor: %s has no labels for all images, so that effective rank and feature std are "
                "measured, and no kNN accuracy. Labelled images of another data set will do: monitor.source.",
                images.dataset,
            )
        return None

    # ---- the Trainer's events ----

    def on_train_begin(  # type: ignore[override]
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Decode the images, find the records of a run that is resumed, measure the untrained encoder."""
        encoder, _ = _find_exported(model)
        self._off = any(hasattr(p, "to_local") or hasattr(p, "ds_shape") for p in encoder.parameters())
        if self._off:
            if is_main_process():
                logger.warning("Online monitor: weights are sharded over the processes, nothing is measured.")
            return
        # Steps behind the checkpoint will be trained and measured again.
        known = load_records(str(args.output_dir)) if is_main_process() else []
        self.records = [record for record in known if record["step"] <= state.global_step]
        self.decode(encoder.config.image_size, args.dataloader_num_workers)
        if self.settings.evaluate_at_start and state.global_step == 0:
            self._report(args, state, control, model)

    def on_step_end(  # type: ignore[override]
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure, if it is time to."""
        every = self.settings.every_steps
        if every is None or self._off:
            return
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._report(args, state, control, model)

    def _report(
        self,
        args: EquiSSLTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None,
    ) -> None:
        """Measure, log, write."""
        encoder, role = _find_exported(model)
        frozen = FrozenEncoder(
            encoder,
            image_mean=self.image_mean,
            image_std=self.image_std,
            name=role,
            precision=args.precision,
            # A step holds the activations of two views of its images: these fit, too.
            batch_size=min(LARGEST_BATCH, 2 * args.per_device_train_batch_size),
        )
        start = time.perf_counter()
        with _preserve_randomness(frozen.device):
            metrics = self.measure(frozen)
        metrics["monitor/seconds"] = round(time.perf_counter() - start, 3)
        if is_main_process():
            self._remember({"step": state.global_step, "encoder": role, **metrics}, Path(str(args.output_dir)))
        if self.log is not None:
            should_log = control.should_log
            self.log(dict(metrics))
            control.should_log = should_log  # a log entry takes back the order to log this step's losses

    # ---- measurement ----

    def decode(self, size: int, num_workers: int = 0) -> None:
        """Decode this process's share at ``size`` x ``size`` pixels, once. Called by ``on_train_begin``."""
        if self._encoded is None:
            return
        encoded = replace(self._encoded, num_workers=num_workers)
        bank, queries = int((~self._is_query).sum()), int(self._is_query.sum())
        if self._labels is None:
            encoded, queries = encoded.part((~self._is_query).nonzero().flatten()), 0
            self._is_query = self._is_query[~self._is_query]
        self._images, self._encoded = ResidentImages(encoded, size), None
        if is_main_process():
            memory = readable_size(self._images.num_bytes)
            logger.info("Online monitor: %d + %d images of %s, %s per process.", bank, queries, encoded.dataset, memory)

    @torch.no_grad()
    def measure(self, encoder: FrozenEncoder) -> dict[str, float]:
        """Measure effective rank and feature std of the bank's CLS features, and the queries' kNN accuracy.

        Returns:
            ``monitor/<name>`` -> number; NaN where features are not finite, for which the Trainer stops the run.
        """
        if self._images is None:
            raise ValueError("The monitor's images are not decoded: call decode(size) first.")
        rows, features = self._images.features(encoder)
        is_query = self._is_query[rows.cpu()].to(features.device)
        bank = features[~is_query]
        metrics = {_RANK: float(effective_rank(bank)), "monitor/feature_std": float(feature_std(bank))}
        if self._labels is None:
            return metrics
        if not bool(features.isfinite().all()):
            return {"monitor/knn_top1": math.nan, **metrics}
        labels = self._labels.to(features.device)[rows]
        scores = knn_votes(
            bank,
            labels[~is_query],
            features[is_query],
            int(self._labels.max()) + 1,
            k=min(self.settings.neighbours, len(bank)),
            temperature=TEMPERATURE,
            device=features.device,
        )
        return {"monitor/knn_top1": topk_accuracy(scores, labels[is_query].cpu(), 1), **metrics}

    # ---- results ----

    def _remember(self, record: dict[str, Any], folder: Path) -> None:
        """Add one record, warn if it shows a collapse, and write the files."""
        self.records = [known for known in self.records if known["step"] < record["step"]]
        record["collapsing"] = self._collapses(record)
        if record["collapsing"] and not (self.records and self.records[-1]["collapsing"]):
            logger.warning("%s", self._describe_collapse(record))
        self.records.append(record)
        lines = [json.dumps({key: _replace_infinite(value) for key, value in item.items()}) for item in self.records]
        try:
            write_text(folder / RECORDS_FILE, "\n".join(lines) + "\n")
            if find_spec("matplotlib") is not None:
                _plot(self.records, folder / PLOT_FILE)
        except OSError as error:  # a full disk: training weighs more
            logger.warning("The monitor's files cannot be written in %s (%s). The run goes on.", folder, error)

    def _collapses(self, record: dict[str, Any]) -> bool:
        """Whether an effective rank is far below what it was, or has been low each time it was measured in training."""
        value, trained = record[_RANK], record["step"] > 0
        best = max((item[_RANK] for item in self.records if math.isfinite(item[_RANK])), default=0.0)
        fell = value < best / 2 or (trained and best < COLLAPSED_RANK)
        return fell and value < max(COLLAPSED_RANK, COLLAPSED_SHARE * best)

    def _describe_collapse(self, record: dict[str, Any]) -> str:
        best = max(self.records, key=lambda item: item[_RANK], default=None)
        before = f", and was {best[_RANK]:.1f} at step {best['step']}" if best else ""
        return (
            f"Step {record['step']}: the representations are collapsing. The effective rank of the {record['encoder']} "
            f"is {record[_RANK]:.1f}{before}. Usual remedies: a lower "
            "learning rate or a longer warm-up; stronger terms against collapse (variance and covariance weights; "
            "centering, a lower teacher temperature, a higher teacher momentum); a larger batch."
        )


def load_records(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read what a monitor wrote into an output folder, one mapping per measurement; empty where there is nothing."""
    path = Path(folder) / RECORDS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{key: math.nan if v is None else v for key, v in json.loads(line).items()} for line in lines]


def _plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the curves of all measurements, and move the file into place when it is whole."""
    panels = {key: title for key, title in PANELS.items() if any(key in record for record in records)}
    plot_losses({records[-1]["encoder"]: records}, panels, path)


def _find_exported(model: nn.Module | None) -> tuple[Any, str]:
    """Find the encoder that would be exported now, and its role."""
    if not isinstance(model, EquiSSLForPreTraining):
        raise ValueError(f"The online monitor reads EquiSSLForPreTraining, got {type(model).__name__}.")
    return model.get_submodule(model.exported), model.exported


def _replace_infinite(value: Any) -> Any:
    """Replace a number that JSON does not have by ``None``."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _preserve_randomness(device: torch.device) -> Iterator[None]:
    """Restore the random generators of this process afterwards."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the run's own generator
    accelerator = [] if device.type == "cpu" else [device.index]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices=accelerator, device_type=kind):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
