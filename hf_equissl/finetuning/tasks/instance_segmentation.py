"""Instance segmentation: masks of objects with their boxes and categories, by Mask2Former on a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, PreTrainedConfig

from ...evaluation.coco import average_precision
from ...evaluation.metrics import Metric
from ...modeling import FeaturePyramidConfig
from .base import Step
from .instance_masks import encode_masks, pack_codes, unpack_codes
from .objects import ObjectTask, measure_boxes, truth_of

MOST_FOUND = 100


class InstanceSegmentationTask(ObjectTask):
    """Masks by transformers' Mask2Former (https://arxiv.org/abs/2112.01527) on a ``FeaturePyramidBackbone``.

    A mask's score is its category's probability times the mean probability of its pixels; its box is the one around it,
    as the authors measure boxes. The paper of EquiSSL has Mask R-CNN instead, whose parts torchvision holds.

    Args:
        hidden_size: Channels in the head.
        queries: Objects that an image may have.
        decoder_layers: How often the masks are refined.
        points: Pixels of a mask that the loss compares.
        classes, box_format, layers: As in ``ObjectTask``.
    """

    name = "instance_segmentation"
    noun = "instance segmentation"
    result = "Instance segmentation model"
    head = "Mask2Former on a feature pyramid"
    pyramid = True
    metrics = (
        Metric("mask_ap", "%", digits=2, hub_type="map", library="pycocotools"),
        Metric("box_ap", "%", digits=2, library="pycocotools"),
        Metric("mask_ap50", "%", digits=2, library="pycocotools"),
    )
    masks = True
    pipeline_tag = "image-segmentation"
    auto_class = "AutoModelForUniversalSegmentation"

    def __init__(
        self,
        *,
        hidden_size: int = 256,
        queries: int = 100,
        decoder_layers: int = 9,
        points: int = 12544,
        classes: tuple[str, ...] | None = None,
        box_format: str = "xywh",
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(classes=classes, box_format=box_format, layers=layers)
        if hidden_size < 32 or hidden_size % 32 or min(queries, decoder_layers, points) < 1:
            raise ValueError(
                f"hidden_size, queries, decoder_layers and points (--set) are {hidden_size}, {queries}, "
                f"{decoder_layers} and {points}: expected a multiple of 32 and three numbers of 1 or more."
            )
        self.hidden_size, self.queries = hidden_size, queries
        self.decoder_layers, self.points = decoder_layers, points

    def options(self) -> dict[str, Any]:
        """Return what decides the head and its loss."""
        return {
            **super().options(),
            "hidden_size": self.hidden_size,
            "queries": self.queries,
            "decoder_layers": self.decoder_layers,
            "points": self.points,
        }

    # ---- model ----

    def build(self, backbone_config: PreTrainedConfig, classes: Sequence[str]) -> nn.Module:
        """Make Mask2Former with random weights."""
        width = self.hidden_size
        config = Mask2FormerConfig(
            backbone_config=FeaturePyramidConfig(backbone_config=backbone_config),
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=4 * width,
            dim_feedforward=8 * width,
            decoder_layers=self.decoder_layers + 1,  # transformers counts the first guess, before any layer
            num_queries=self.queries,
            train_num_points=self.points,
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
        )
        return Mask2FormerForUniversalSegmentation(config)

    def image_processor(self) -> Any:
        """Make the processor that resizes whole images to the square."""
        from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

        side = self.inputs.image_size
        return Mask2FormerImageProcessorPil(
            size={"height": side, "width": side},
            image_mean=list(self.inputs.image_mean),
            image_std=list(self.inputs.image_std),
            ignore_index=255,
        )

    # ---- loss and metrics ----

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Step:
        """Compute Mask2Former's loss: categories, and pixels and overlap (dice) of matched masks, after each layer."""
        labels = {"mask_labels": [masks.float() for masks in batch["masks"]], "class_labels": batch["labels"]}
        # The loss draws the pixels that it compares. At evaluation they are the same each time, and no draw of training
        # follows from when evaluations were.
        with torch.random.fork_rng(enabled=not model.training):
            if not model.training:
                torch.manual_seed(0)
            output = model(pixel_values=batch["pixel_values"], **labels)
        return Step(output.loss.float().squeeze(), (output.class_queries_logits.float(), output.masks_queries_logits))

    def judge(self, output: tuple[Tensor, Tensor], batch: dict[str, Any]) -> tuple[Any, Any]:
        """Return the 100 most probable masks of each image at its stored size, as run-length codes, and their boxes."""
        logits, masks = output
        scores, places = logits.softmax(-1)[..., :-1].flatten(1).topk(min(MOST_FOUND, logits[0, :, :-1].numel()))
        queries, labels = places // (logits.shape[2] - 1), places % (logits.shape[2] - 1)
        codes, boxes, certainties = [], [], []
        for image, size in enumerate(batch["size"]):
            width, height = size.tolist()
            chosen = masks[image, queries[image].unique()].float()
            full = F.interpolate(chosen[None], (height, width), mode="bilinear", align_corners=False)[0]
            inside = full > 0
            sure = (full.sigmoid() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
            order = torch.searchsorted(queries[image].unique(), queries[image])
            made = encode_masks(inside.cpu().numpy())
            codes.append([made[place] for place in order.tolist()])
            boxes.append(boxes_around(inside)[order])
            certainties.append(sure[order])
        predictions = {
            "boxes": torch.stack(boxes).to(scores),
            "scores": scores * torch.stack(certainties),
            "labels": labels,
            **pack_codes(codes),
        }
        return predictions, {
            **self.judge_truth(batch),
            **pack_codes(batch["codes"]),
            "size": torch.stack(batch["size"]),
        }

    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Compute COCO's average precision of masks, and of the boxes around them."""
        truth, found = [], []
        names = ("codes", "lengths", "scores", "labels")
        for index, (width, height) in enumerate(targets["size"].tolist()):
            shape = {"size": [height, width]}
            objects = truth_of(targets["objects"][index])
            known = unpack_codes(targets["codes"][index], targets["lengths"][index])
            truth.append(
                [{**one, "segmentation": {**shape, "counts": code}} for one, code in zip(objects, known, strict=True)]
            )
            codes, lengths, scores, labels = (predictions[name][index] for name in names)
            several = zip(unpack_codes(codes, lengths), scores, labels, strict=True)
            found.append(
                [
                    {
                        "category_id": int(label),
                        "score": float(score),
                        "segmentation": {**shape, "counts": code},
                    }
                    for code, score, label in several
                    if score > 0
                ]
            )
        boxes = measure_boxes(predictions, targets)
        return {
            **{f"mask_{name}": value for name, value in average_precision(truth, found, "segm").items()},
            **{f"box_{name}": value for name, value in boxes.items()},
        }


def boxes_around(masks: Tensor) -> Tensor:
    """Return the boxes (n, 4), x, y, width, height in pixels, around masks (n, height, width); 0 around none."""
    found = np.zeros((len(masks), 4))
    for index, mask in enumerate(masks.cpu().numpy()):
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        if len(rows):
            found[index] = columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
    return torch.from_numpy(found)
