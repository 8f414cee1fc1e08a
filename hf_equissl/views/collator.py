"""Samples to one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import default_collate

from .masks import draw_masks

if TYPE_CHECKING:
    from .pipelines import ViewPipeline


class ViewCollator:
    """What a DataLoader of views collates with: ``collate_views``, and masks where the pipeline makes them.

    Masks are drawn here and not per sample, because one kind shares its ratios out over the batch; in workers, so that
    training does not wait for them.

    Args:
        pipeline: Says whether, which and how many masks there are.
    """

    def __init__(self, pipeline: ViewPipeline) -> None:
        self.masks, self.side, self.views = pipeline.masks, pipeline.grid_side, len(pipeline.spec.views)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """As ``collate_views``; with masks the samples also bring ``mask_seed``, and the batch holds ``masks``.

        Returns:
            In addition ``masks`` bool (B, V, N) and ``mask_indices`` int64 (M,): the positions of the M masked patches
            in the masks as (V, B, N), flat, in ascending order.
        """
        begin = time.perf_counter()
        batch = collate_views(samples)
        if self.masks is not None:
            seeds = [int(sample["mask_seed"]) for sample in samples]
            masks = draw_masks(self.masks, seeds, self.views, self.side)
            batch["masks"] = torch.from_numpy(masks)
            batch["mask_indices"] = torch.from_numpy(np.flatnonzero(masks.transpose(1, 0, 2)).astype(np.int64))
        batch["seconds"] += time.perf_counter() - begin
        return batch


def collate_views(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack what the workers made.

    Args:
        samples: Each with ``global_crops`` uint8 (V, 3, S, S), ``crop_boxes`` (V, 4), ``draws`` (n,), ``index``; as the
            case may be ``local_crops`` uint8 (L, 3, s, s), ``label``, ``position``; ``skipped``, a list of records of
            bad files; ``seconds``.

    Returns:
        ``global_crops`` uint8 (B, V, 3, S, S), ``crop_boxes`` (B, V, 4), ``draws`` (B, n), ``index`` int64 (B,), as the
        case may be ``local_crops`` (B, L, 3, s, s) and ``labels`` int64 (B,); ``skipped``, one flat list;
        ``seconds``, what the samples took together; of a stream, the ``position`` of the last. Crops lie channels-last
        in memory, as in the samples; the copy to planes is left to the device.
    """
    batch: dict[str, Any] = {}
    for key in ("global_crops", "local_crops"):
        if key in samples[0]:
            # default_collate stacks straight into shared memory when it runs in a worker.
            batch[key] = default_collate([sample[key].permute(0, 2, 3, 1) for sample in samples]).permute(0, 1, 4, 2, 3)
    for key in ("crop_boxes", "draws"):
        batch[key] = default_collate([sample[key] for sample in samples])
    batch["index"] = torch.tensor([sample["index"] for sample in samples])
    if all("label" in sample for sample in samples):
        batch["labels"] = torch.tensor([sample["label"] for sample in samples])
    batch["seconds"] = sum(sample.get("seconds", 0.0) for sample in samples)
    if "position" in samples[-1]:
        batch["position"] = samples[-1]["position"]
    batch["skipped"] = [record for sample in samples for record in sample.get("skipped", ())]
    return batch
