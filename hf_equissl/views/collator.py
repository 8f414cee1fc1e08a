"""Samples to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate


def collate_views(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack what the workers made.

    Args:
        samples: Each with ``global_crops`` uint8 (V, 3, S, S), ``crop_boxes`` (V, 4), ``draws`` (n,), ``index``; as the
            case may be ``local_crops`` uint8 (L, 3, s, s), ``label``; ``skipped``, a list of records of bad files.

    Returns:
        ``global_crops`` uint8 (B, V, 3, S, S), ``crop_boxes`` (B, V, 4), ``draws`` (B, n), ``index`` int64 (B,), as the
        case may be ``local_crops`` (B, L, 3, s, s) and ``labels`` int64 (B,); ``skipped``, one flat list. Crops lie
        channels-last in memory, as in the samples; the copy to planes is left to the device.
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
    batch["skipped"] = [record for sample in samples for record in sample.get("skipped", ())]
    return batch
