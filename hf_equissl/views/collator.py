"""Put samples together into one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import default_collate

from .base import UNLABELLED
from .makers import derived_generator
from .masks import draw_masks

if TYPE_CHECKING:
    from .pipelines import ViewPipeline


class ViewCollator:
    """What a DataLoader of views collates with: puts samples together, and draws what belongs to a batch as a whole.

    That is done here and not on the device, in workers, so that training does not wait for it; and from the seed of the
    batch's first image, so that it depends on nothing but the run's seed and which batch this is.

    Args:
        pipeline: Says whether, which and how many masks there are, and which further views.
    """

    def __init__(self, pipeline: ViewPipeline) -> None:
        self.pipeline = pipeline
        self._joined = [extra.name for extra in pipeline.needs.extra if extra.joins]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate what the workers made.

        Args:
            samples: What ``ViewPipeline.crop`` returned, with ``index``; where there are any, ``skipped``,
                ``seconds`` and ``position``.

        Returns:
            What ``collate_views`` returns, of the B images of the usual views; with masks ``masks`` bool (B, V, N) and
            ``mask_indices`` int64 (M,): the positions of the M masked patches in the masks as (V, B, N), flat, in
            ascending order; with further views ``extra``, what their makers' ``collate`` returned by name.
        """
        begin = time.perf_counter()
        shares = self._divide(samples)
        base, joined = shares[""], [sample for name in self._joined for sample in shares[name]]
        batch = _stack_crops(base) | _gather_labels([*base, *joined]) | _gather_records(samples)
        pipeline = self.pipeline
        if pipeline.masks is not None:
            seeds = [sample["mask_seed"] for sample in base]
            masks = draw_masks(pipeline.masks, seeds, len(pipeline.spec.views), pipeline.grid_side)
            batch["masks"] = torch.from_numpy(masks)
            batch["mask_indices"] = torch.from_numpy(np.flatnonzero(masks.transpose(1, 0, 2)).astype(np.int64))
        if pipeline.makers:
            batch["extra"] = {
                name: maker.collate(
                    [sample["extra"][name] for sample in shares[name]],
                    shares[name],
                    derived_generator(samples[0]["seed"], name, batch=True),
                )
                for name, maker in pipeline.makers.items()
            }
        batch["seconds"] += time.perf_counter() - begin
        return batch

    def _divide(self, samples: Sequence[dict[str, Any]]) -> dict[str, Sequence[dict[str, Any]]]:
        """Give each maker its samples, by name, and the usual views theirs, by the empty name."""
        taken = {name: maker.takes_from_batch(len(samples)) for name, maker in self.pipeline.makers.items()}
        rest = len(samples) - sum(count or 0 for count in taken.values())
        if rest < 1:
            raise ValueError(
                f"A batch of {len(samples)} images is too small: further views take {len(samples) - rest} of them. "
                "Raise per_device_train_batch_size."
            )
        shares, end = {"": samples[:rest]}, rest
        for name, count in taken.items():
            shares[name] = samples[:rest] if count is None else samples[end : end + count]
            end += count or 0
        return shares


def collate_views(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack what the workers made, without masks and further views.

    Args:
        samples: Each with ``draws`` (n,) and ``index``; where there are any, ``global_crops`` uint8 (V, 3, S, S),
            ``crop_boxes`` (V, 4), ``local_crops`` uint8 (L, 3, s, s), ``parameters`` (p,), ``label``, ``position``;
            ``skipped``, a list of records of bad files; ``seconds``.

    Returns:
        Crops, boxes, draws and parameters by the same names with a batch dimension in front. Crops lie channels-last in
        memory, as in the samples; the copy to planes is left to the device. ``index`` int64 (B,); ``seconds``, what the
        samples took together; ``skipped``, one flat list; where an image has a label ``labels`` int64 (B,),
        ``UNLABELLED`` where one has none; of a stream, the ``position`` of the last.
    """
    return _stack_crops(samples) | _gather_labels(samples) | _gather_records(samples)


def _stack_crops(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for key in ("global_crops", "local_crops"):
        if key in samples[0]:
            # default_collate stacks straight into shared memory when it runs in a worker.
            batch[key] = default_collate([sample[key].permute(0, 2, 3, 1) for sample in samples]).permute(0, 1, 4, 2, 3)
    for key in ("crop_boxes", "draws", "parameters"):
        if key in samples[0]:
            batch[key] = default_collate([sample[key] for sample in samples])
    return batch


def _gather_labels(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not any("label" in sample for sample in samples):
        return {}
    return {"labels": torch.tensor([sample.get("label", UNLABELLED) for sample in samples])}


def _gather_records(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    records: dict[str, Any] = {
        "index": torch.tensor([sample["index"] for sample in samples]),
        "seconds": sum(sample.get("seconds", 0.0) for sample in samples),
        "skipped": [record for sample in samples for record in sample.get("skipped", ())],
    }
    if "position" in samples[-1]:
        records["position"] = samples[-1]["position"]
    return records
