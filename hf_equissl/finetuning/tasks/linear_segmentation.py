"""Semantic segmentation by a linear head: how much of the classes can be read off single patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, PreTrainedConfig

from ...encoders.export import image_processor
from ..settings import FineTuningSettings
from .segmentation import SegmentationTask


class Logits(NamedTuple):
    """What a model of transformers would return.

    Attributes:
        logits: (B, K, H, W).
    """

    logits: Tensor


class LinearSegmenter(nn.Module):
    """Batch normalisation and a linear map of the patches of one layer or more, resized to the image, bilinearly.

    The head of DINOv2's linear evaluation (section 7.4 of https://arxiv.org/abs/2304.07193; ``BNHead`` in
    ``dinov2/eval/segmentation/models/decode_heads`` of https://github.com/facebookresearch/dinov2).

    Args:
        config: The backbone's.
        num_classes: K.
    """

    def __init__(self, config: PreTrainedConfig, num_classes: int) -> None:
        super().__init__()
        self.backbone: Any = AutoBackbone.from_config(config)
        width = sum(self.backbone.channels)
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(cast(nn.Parameter, self.classifier.bias))

    def forward(self, pixel_values: Tensor) -> Logits:
        """Compute logits at the size of the images: (B, 3, H, W) -> (B, K, H, W)."""
        maps = torch.cat(self.backbone(pixel_values).feature_maps, dim=1)
        logits = self.classifier(self.norm(maps))
        return Logits(F.interpolate(logits, pixel_values.shape[2:], mode="bilinear", align_corners=False))


class LinearSegmentationTask(SegmentationTask):
    """A class for every pixel by a linear map of patches, as DINOv2 measures; data and metrics are those of UPerNet.

    Args:
        layers: Blocks that are concatenated; ``None``: the last one. DINOv2's "+ms" has the last four.
        **options: As in ``SegmentationTask``; ``hidden_size`` is not read.
    """

    name = "linear_segmentation"
    noun = "segmentation by a linear head"
    result = "Linear segmentation model"
    head = "a linear head on patches"
    num_layers = 1
    pipeline_tag = None
    auto_class: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        classes: tuple[str, ...] | int | None = None,
        ignore_index: int | None = None,
        reduce_labels: bool = False,
        mask_column: str | None = None,
        slide: bool = False,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(
            classes=classes,
            ignore_index=ignore_index,
            reduce_labels=reduce_labels,
            mask_column=mask_column,
            slide=slide,
            layers=layers,
        )

    def options(self) -> dict[str, Any]:
        """Return the options that were given."""
        return {name: value for name, value in super().options().items() if name != "hidden_size"}

    def complete(self, settings: FineTuningSettings) -> FineTuningSettings:
        """Fill in defaults; a batch of one image will do, because patches are normalised over all positions."""
        return self._complete(settings)

    def build(self, backbone_config: PreTrainedConfig, classes: Sequence[str]) -> nn.Module:
        """Make the head with random weights around a backbone."""
        return LinearSegmenter(backbone_config, len(classes))

    def image_processor(self) -> Any:
        """Make the processor of the encoder: there is no class of transformers to hand maps to."""
        return image_processor(self.inputs.image_size, list(self.inputs.image_mean), list(self.inputs.image_std))
