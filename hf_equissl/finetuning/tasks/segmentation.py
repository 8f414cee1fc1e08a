"""Semantic segmentation: a class for every pixel, UPerNet on the encoder's feature maps, mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, UperNetConfig, UperNetForSemanticSegmentation

from ...evaluation.metrics import Metric
from ...modeling import FeaturePyramidConfig
from ...views.cropping import Box, random_box
from ..settings import FineTuningSettings
from .base import Splits, Step
from .dense import DenseTask
from .masks import IGNORED, MASK_COLUMNS, Labels, MaskedSamples, load_masked_sources, read_classes
from .windows import cut_window, random_window, resize_shorter, slide

CROP_SCALE, CROP_RATIO = (0.25, 1.0), (3 / 4, 4 / 3)
IGNORE_INDEX = 255


class SegmentationTask(DenseTask):
    """A class for every pixel, by transformers' UPerNet (https://arxiv.org/abs/1807.10221) without auxiliary head.

    Training images are cropped at random, resized to the encoder's square and mirrored, and their masks with them (by
    nearest neighbours). Test images are resized to the square as a whole; the logits are resized, bilinearly, to the
    stored size, and judged there against the stored mask. That is what ``pipeline("image-segmentation")`` does with
    the image processor that is saved.

    With ``slide``, images keep their proportions, as in the configurations of MMSegmentation, which iBOT and DINOv2
    use: training images are shown at random scales and cut to the square (``random_window``), test images are brought
    to its side and judged by windows that overlap (``slide``). ``crop_scale`` is not read then.

    Args:
        classes: Names in the order of their numbers, or how many there are; ``None``: of the folder's ``classes.json``.
        ignore_index: Number in masks of pixels that do not count; ``None``: of ``classes.json``, else 255.
        reduce_labels: 0 means "none of the classes", which then count from 1, as in ADE20K.
        mask_column: Column of the masks; ``None``: the first of ``MASK_COLUMNS`` that exists.
        hidden_size: Channels in the head.
        pyramid: Give the head maps of strides 4, 8, 16 and 32 (at patches of 16), as the paper and iBOT do
            (``FeaturePyramidBackbone``), instead of four of the patches' stride.
        slide: See above.
        layers: As in ``DenseTask``.
    """

    name = "semantic_segmentation"
    noun = "semantic segmentation"
    result = "Segmentation model"
    head = "a UPerNet head"
    metrics = (
        Metric("miou", "%", digits=2, hub_type="mean_iou"),
        Metric("pixel_accuracy", "%", digits=2, hub_type="accuracy"),
    )
    pipeline_tag: ClassVar[str | None] = "image-segmentation"
    auto_class: ClassVar[str | None] = "AutoModelForSemanticSegmentation"

    def __init__(
        self,
        *,
        classes: tuple[str, ...] | int | None = None,
        ignore_index: int | None = None,
        reduce_labels: bool = False,
        mask_column: str | None = None,
        hidden_size: int = 512,
        pyramid: bool = False,
        slide: bool = False,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        if hidden_size < 1:
            raise ValueError(f"hidden_size (--set) is {hidden_size}: expected 1 or more.")
        self.classes = tuple(map(str, range(classes))) if isinstance(classes, int) else classes
        self.ignore_index, self.reduce_labels = ignore_index, reduce_labels
        self.mask_column, self.hidden_size, self.pyramid, self.slide = mask_column, hidden_size, pyramid, slide

    def options(self) -> dict[str, Any]:
        """Return the options that were given, but for names of classes and columns, which others say."""
        options = {**super().options(), "hidden_size": self.hidden_size, "reduce_labels": self.reduce_labels}
        options |= {name: True for name in ("pyramid", "slide") if getattr(self, name)}
        return options if self.ignore_index is None else {**options, "ignore_index": self.ignore_index}

    def protocol(self) -> dict[str, Any]:
        """Say what the head is and how images were cropped."""
        return {
            **self.options(),
            **({} if self.slide else {"crop_scale": list(self.settings.crop_scale or CROP_SCALE)}),
            "flip_probability": 0.5 if self.settings.flip else 0.0,
        }

    def complete(self, settings: FineTuningSettings) -> FineTuningSettings:
        """Refuse batches of one image: the head's batch normalisation finds no statistics in them."""
        if settings.batch_size < 2:
            raise ValueError(f"--batch_size {settings.batch_size}: UPerNet normalises over the batch; give 2 or more.")
        return self._complete(settings)

    def _complete(self, settings: FineTuningSettings) -> FineTuningSettings:
        """Refuse what sliding windows do not read."""
        if self.slide and settings.crop_scale is not None:
            raise ValueError(
                f"--crop_scale {' '.join(map(str, settings.crop_scale))}: with slide=true crops have scales of their "
                "own. Leave it out."
            )
        return super().complete(settings)

    # ---- data ----

    def load(self, settings: FineTuningSettings) -> Splits:
        """Open images and masks; see ``load_masked_sources``.

        Raises:
            ValueError: as there; nobody says what the classes are, or they are fewer than two; no mask can be used.
        """
        named, ignored = read_classes(settings.data)
        classes = self.classes or named
        if classes is None or len(classes) < 2:
            raise ValueError(
                f"{settings.data}: the classes are {classes}; segmentation needs two or more. Say what they are called "
                "with --set classes='[sky, road, ...]', how many there are with --set classes=150, or put a list of "
                "names into classes.json in the folder."
            )
        given = (self.ignore_index, ignored, IGNORE_INDEX)
        labels = Labels(classes, next(value for value in given if value is not None), self.reduce_labels)
        columns = MASK_COLUMNS if self.mask_column is None else (self.mask_column,)
        sources = load_masked_sources(settings, columns).limit(settings.train_images, settings.test_images)
        train, test = MaskedSamples(sources.train, labels), MaskedSamples(sources.test, labels)
        for samples in (train, test):
            samples.check()
        return Splits(train, test, sources.train_split, sources.test_split, classes, sources.remarks())

    def blank(self) -> dict[str, Any]:
        """Return a black image of which no pixel counts."""
        side = self.inputs.image_size
        return {"image": Image.new("RGB", (side, side)), "mask": np.full((side, side), IGNORED, np.int32)}

    def transform(self, sample: dict[str, Any], rng: Any) -> dict[str, Any]:
        """Cut the same box out of image and mask, resize and mirror both; without ``rng`` the mask keeps its size.

        Draws are those of ``random_box`` or ``random_window``, then one for the mirror.

        Returns:
            ``pixels`` uint8 (3, S, S), or (3, H, W) with ``slide`` and without ``rng``; ``mask`` int32, (S, S) in
            training.
        """
        if self.slide:
            return self._transform_window(sample, rng)
        image, mask, size = sample["image"], sample["mask"], (self.inputs.image_size,) * 2
        width, height = image.size
        box: Box = (0, 0, width, height)
        mirrored = False
        if rng is not None:
            box = random_box(width, height, self.settings.crop_scale or CROP_SCALE, CROP_RATIO, rng)
            mirrored = bool(rng.random() < 0.5) and self.settings.flip
            cut = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST, box=box)
            mask = np.asarray(cut)
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))
        return _as_tensors(pixels, mask, mirrored)

    def _transform_window(self, sample: dict[str, Any], rng: Any) -> dict[str, Any]:
        image, mask, size = sample["image"], sample["mask"], self.inputs.image_size
        if rng is None:
            return _as_tensors(np.asarray(resize_shorter(image, size)), mask, mirrored=False)
        box = random_window(mask, rng)
        mirrored = bool(rng.random() < 0.5) and self.settings.flip
        mean = tuple(round(255 * value) for value in self.inputs.image_mean)  # 0 once it is normalised
        pixels = cut_window(image, box, size, Image.Resampling.BILINEAR, fill=mean)
        cut = cut_window(Image.fromarray(mask), box, size, Image.Resampling.NEAREST, fill=IGNORED)
        return _as_tensors(pixels, cut, mirrored)

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack images of one size; others stay a list."""
        batch = super().collate([{name: value for name, value in one.items() if name != "pixels"} for one in samples])
        pixels = [one["pixels"] for one in samples]
        square = all(one.shape[1:] == (self.inputs.image_size,) * 2 for one in pixels)
        return {**batch, "pixels": torch.stack(pixels) if square else pixels}

    def to_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalise as ``DenseTask`` does; images of several sizes one by one."""
        if isinstance(batch["pixels"], Tensor):
            return super().to_inputs(batch)
        images = [super(SegmentationTask, self).to_inputs({"pixels": one[None]}) for one in batch["pixels"]]
        rest = {name: value for name, value in batch.items() if name != "pixels"}
        return {**rest, "pixel_values": [one["pixel_values"][0] for one in images]}

    # ---- model ----

    def build(self, backbone_config: PreTrainedConfig, classes: Sequence[str]) -> nn.Module:
        """Make UPerNet with random weights."""
        config = UperNetConfig(
            backbone_config=FeaturePyramidConfig(backbone_config=backbone_config) if self.pyramid else backbone_config,
            hidden_size=self.hidden_size,
            use_auxiliary_head=False,
            loss_ignore_index=IGNORED,
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
        )
        return UperNetForSemanticSegmentation(config)

    def image_processor(self) -> Any:
        """Make the processor that resizes whole images to the square."""
        from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

        side = self.inputs.image_size
        return SegformerImageProcessorPil(
            size={"height": side, "width": side},
            image_mean=list(self.inputs.image_mean),
            image_std=list(self.inputs.image_std),
            do_reduce_labels=self.reduce_labels,
        )

    # ---- loss and metrics ----

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Step:
        """Compute the cross-entropy over the pixels that count, in fp32, at the size of the input."""
        images = batch["pixel_values"]
        if not isinstance(images, Tensor):
            size = self.inputs.image_size
            logits = [slide(lambda windows: model(pixel_values=windows).logits, image, size)[None] for image in images]
            pairs = [_fit(*pair) for pair in zip(logits, batch["mask"], strict=True)]
            return Step(torch.stack([one.loss for one in pairs]).mean(), [one[0] for one in logits])
        return _fit(model(pixel_values=images).logits.float(), *batch["mask"])

    def judge(self, output: Tensor | list[Tensor], batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Count pixels at the size of the stored masks.

        Returns:
            int64 (B, 2, K): right ones and predicted ones of each of K classes; (B, K): labelled ones.
        """
        predictions, targets = [], []
        for logits, mask in zip(output, batch["mask"], strict=True):
            truth = mask.long()
            guess = F.interpolate(logits[None], truth.shape, mode="bilinear", align_corners=False)[0].argmax(0)
            counted = truth != IGNORED
            guess, truth, classes = guess[counted], truth[counted], len(logits)
            right, guessed, labelled = (
                torch.bincount(values, minlength=classes) for values in (truth[guess == truth], guess, truth)
            )
            predictions.append(torch.stack([right, guessed]))
            targets.append(labelled)
        return torch.stack(predictions), torch.stack(targets)

    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Compute mean IoU, over the classes that are labelled or predicted somewhere, and the share of right pixels.

        Intersections and unions are those of the whole split, not means over its images.
        """
        (right, guessed), labelled = np.asarray(predictions).sum(0), np.asarray(targets).sum(0)
        union = guessed + labelled - right
        seen = union > 0
        iou = right[seen] / union[seen]
        return {
            "miou": float(iou.mean()) if seen.any() else 0.0,
            "pixel_accuracy": float(right.sum() / max(1, labelled.sum())),
        }


def _as_tensors(pixels: np.ndarray, mask: np.ndarray, mirrored: bool) -> dict[str, Tensor]:
    """Turn an image (H, W, 3) and its mask into tensors."""
    if mirrored:
        pixels, mask = pixels[:, ::-1], mask[:, ::-1]
    return {
        "pixels": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        "mask": torch.from_numpy(mask.astype(np.int32)),
    }


def _fit(logits: Tensor, *masks: Tensor) -> Step:
    """Compute the cross-entropy of logits (B, K, H, W), which masks of other sizes are brought to."""
    size = logits.shape[2:]
    given = [mask[None, None].float() for mask in masks]
    fitted = [mask if mask.shape[2:] == size else F.interpolate(mask, size, mode="nearest-exact") for mask in given]
    labels = torch.cat(fitted)[:, 0].long()
    # Without a pixel that counts the mean is not a number; the sum is 0, and so is its gradient.
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return Step(total / (labels != IGNORED).sum().clamp(min=1), logits)
