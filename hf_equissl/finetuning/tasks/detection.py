"""Object detection: boxes and their categories, by RT-DETR on a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, RTDetrConfig, RTDetrForObjectDetection
from transformers.image_transforms import center_to_corners_format

from ...evaluation.metrics import Metric
from ...modeling import FeaturePyramidConfig
from ..settings import FineTuningSettings
from .base import EncoderInput, Step
from .objects import ObjectTask, measure_boxes

# Strides 8, 16 and 32 at patches of 16 pixels.
LEVELS = (1, 2, 3)
# COCO counts so many per image.
MOST_FOUND = 100


class DetectionTask(ObjectTask):
    """Boxes by transformers' RT-DETR (https://arxiv.org/abs/2304.08069) on levels of a ``FeaturePyramidBackbone``.

    The paper of EquiSSL has Mask R-CNN instead, whose parts torchvision holds.

    Args:
        hidden_size: Channels in the head.
        queries: Objects that an image may have.
        decoder_layers: How often the boxes are refined.
        classes, box_format, layers: As in ``ObjectTask``.
    """

    name = "detection"
    noun = "object detection"
    result = "Object detector"
    head = "RT-DETR on a feature pyramid"
    pyramid = True
    metrics = (
        Metric("box_ap", "%", digits=2, hub_type="map", library="pycocotools"),
        Metric("box_ap50", "%", digits=2, library="pycocotools"),
    )
    pipeline_tag = "object-detection"
    auto_class = "AutoModelForObjectDetection"
    patch_size: int

    def __init__(
        self,
        *,
        hidden_size: int = 256,
        queries: int = 300,
        decoder_layers: int = 6,
        classes: tuple[str, ...] | None = None,
        box_format: str = "xywh",
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(classes=classes, box_format=box_format, layers=layers)
        if hidden_size < 8 or hidden_size % 8 or queries < 1 or decoder_layers < 1:
            raise ValueError(
                f"hidden_size, queries and decoder_layers (--set) are {hidden_size}, {queries} and {decoder_layers}: "
                "expected a multiple of 8 and two numbers of 1 or more."
            )
        self.hidden_size, self.queries, self.decoder_layers = hidden_size, queries, decoder_layers

    def options(self) -> dict[str, Any]:
        """Return what decides the head."""
        sizes = {"hidden_size": self.hidden_size, "queries": self.queries, "decoder_layers": self.decoder_layers}
        return {**super().options(), **sizes}

    def bind(self, settings: FineTuningSettings, inputs: EncoderInput) -> None:
        """Remember what samples shall be made for.

        Raises:
            ValueError: images of this size cannot be halved, or have fewer places than there are queries.
        """
        super().bind(settings, inputs)
        side = inputs.image_size // self.patch_size
        if side % 2:
            raise ValueError(
                f"--image_size {inputs.image_size}: {side} patches in a row, which cannot be halved. Give a multiple "
                f"of {2 * self.patch_size}."
            )
        places = side * side * 21 // 4
        if self.queries > places:
            raise ValueError(
                f"queries is {self.queries}, and images of {inputs.image_size} pixels have {places} places: give "
                f"--set queries={min(100, places)} or larger images."
            )

    # ---- model ----

    def build(self, backbone_config: PreTrainedConfig, classes: Sequence[str]) -> nn.Module:
        """Make RT-DETR with random weights."""
        encoder: Any = backbone_config
        self.patch_size = int(torch.as_tensor(encoder.patch_size).max())
        levels: dict[str, Any] = {"out_indices": list(LEVELS)}
        pyramid = FeaturePyramidConfig(backbone_config=backbone_config, **levels)
        width = self.hidden_size
        config = RTDetrConfig(
            backbone_config=pyramid,
            encoder_in_channels=[pyramid.hidden_size] * len(LEVELS),
            decoder_in_channels=[width] * len(LEVELS),
            encoder_hidden_dim=width,
            d_model=width,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            decoder_layers=self.decoder_layers,
            num_queries=self.queries,
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
        )
        return RTDetrForObjectDetection(config)

    def image_processor(self) -> Any:
        """Make the processor that resizes whole images to the square."""
        from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

        side = self.inputs.image_size
        return RTDetrImageProcessorPil(
            size={"height": side, "width": side},
            do_normalize=True,
            image_mean=list(self.inputs.image_mean),
            image_std=list(self.inputs.image_std),
        )

    # ---- loss and metrics ----

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Step:
        """Compute RT-DETR's loss: varifocal, L1 and generalised IoU of matched boxes, after each layer."""
        pairs = zip(batch["labels"], batch["boxes"], strict=True)
        labels = [{"class_labels": numbers, "boxes": boxes} for numbers, boxes in pairs]
        output = model(pixel_values=batch["pixel_values"], labels=labels)
        loss = output.loss.float()
        for name, parameter in model.named_parameters():
            # Read only where noised boxes are to be restored: not at evaluation, and not if there are no boxes. With a
            # gradient of zero they count as trained all the same, and no process waits for another's.
            if "denoising_class_embed" in name:
                loss = loss + 0 * parameter.sum()
        parts = {f"loss_{name}": output.loss_dict[f"loss_{name}"].detach() for name in ("vfl", "bbox", "giou")}
        return Step(loss, (output.logits.float(), output.pred_boxes.float()), parts)

    def judge(self, output: tuple[Tensor, Tensor], batch: dict[str, Any]) -> tuple[Any, Any]:
        """Return the 100 most probable boxes, (B, 100, 4) in pixels of the stored image, with scores and labels."""
        logits, boxes = output
        classes = logits.shape[2]
        scores, places = logits.sigmoid().flatten(1).topk(min(MOST_FOUND, logits[0].numel()))
        chosen = boxes.gather(1, (places // classes)[..., None].expand(-1, -1, 4))
        corners: Tensor = cast(Any, center_to_corners_format)(chosen)
        sizes = torch.stack(batch["size"]).to(corners)
        corners = corners * torch.cat([sizes, sizes], 1)[:, None]
        found = torch.cat([corners[..., :2], corners[..., 2:] - corners[..., :2]], 2)
        return {"boxes": found, "scores": scores, "labels": places % classes}, self.judge_truth(batch)

    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Compute COCO's average precision of boxes."""
        return {f"box_{name}": value for name, value in measure_boxes(predictions, targets).items()}
