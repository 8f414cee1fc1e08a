"""Image classification: one label per image, a linear head, top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from ...encoders.base_image import base_image, resized_side
from ...evaluation.metric_modules import TopKAccuracyMetric
from ...evaluation.metrics import TOP1, TOP5
from ...views.base import Item
from ...views.collator import ViewCollator
from ...views.needs import Needs
from ...views.pipelines import ViewPipeline
from ...views.view_specs import PipelineSpec, ViewSpec
from ..classifier import load_classifier, load_trained_classifier, pooling_of, why_unclassified
from ..settings import METHODS, FineTuningSettings
from .base import EncoderInput, Splits, Step, Task, UnfitEncoderError
from .labelled_images import load_labelled_images

# The label of an image that does not decode: the loss passes over it.
NO_LABEL = -100
TOP_K = 5
# Up to this side random crops keep more of the image: of 8 % of a 32-pixel picture nobody could tell the class.
SMALL_IMAGES = 64


class ClassificationTask(Task):
    """One of several classes for an image.

    Training images are cropped in workers and flipped on the device, by a ``ViewPipeline`` of one view as in
    pretraining; test images are the base images of the probes. The loss is cross-entropy, smoothed in training only.
    """

    name = "classification"
    noun = "image classification"
    result = "Image classifier"
    head = "a linear head"
    methods = ("full", "linear", "lora", "dora")
    metrics = (TOP1, TOP5)
    unread = ()
    pipeline_tag = "image-classification"
    pipeline: ViewPipeline

    def complete(self, settings: FineTuningSettings) -> FineTuningSettings:
        """Return the settings with the method's label smoothing, unless another was given."""
        settings = super().complete(settings)
        if settings.label_smoothing is not None:
            return settings
        return replace(settings, label_smoothing=METHODS[settings.method].label_smoothing)

    def bind(self, settings: FineTuningSettings, inputs: EncoderInput) -> None:
        """Build the pipeline of training views."""
        super().bind(settings, inputs)
        self.pipeline = view_pipeline(settings, inputs)

    def protocol(self) -> dict[str, Any]:
        """Say how labels were smoothed and images cropped."""
        view = self.pipeline.spec.views[0]
        side, size = resized_side(self.inputs.image_size), self.inputs.image_size
        return {
            "label_smoothing": self.settings.label_smoothing,
            "crop_scale": list(view.crop_scale or ()),
            "flip_probability": view.flip_probability,
            **({} if side == size else {"resized_side": side}),
        }

    # ---- data ----

    def load(self, settings: FineTuningSettings) -> Splits:
        """Open both splits; see ``load_labelled_images``."""
        return load_labelled_images(settings)

    def blank(self) -> dict[str, Any]:
        """Return a black image without a label."""
        return {"image": Image.new("RGB", (self.inputs.image_size,) * 2), "label": NO_LABEL}

    def transform(self, sample: dict[str, Any], rng: Any) -> dict[str, Any]:
        """Crop a training image; resize a test image, uint8 (3, S, S)."""
        if rng is None:
            return {"pixels": base_image(sample["image"], self.inputs.image_size), "labels": sample["label"]}
        return self.pipeline.crop(Item((sample["image"],), label=sample["label"]), rng)

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack images and labels."""
        if "pixels" in samples[0]:
            return default_collate([{name: sample[name] for name in ("pixels", "labels")} for sample in samples])
        return ViewCollator(self.pipeline)(samples)

    def to_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Augment and normalise: ``pixel_values`` (B, 3, S, S) and ``labels`` (B,)."""
        if "pixels" in batch:
            pixels = self.pipeline.normalize(batch["pixels"].float() / 255)
        else:
            pixels = self.pipeline(batch).global_crops[0]
        return {"pixel_values": pixels, "labels": batch["labels"]}

    # ---- model ----

    def check_encoder(self, source: str, **options: Any) -> Any:
        """Refuse an encoder that transformers has no class with a head for."""
        config = super().check_encoder(source, **options)
        if reason := why_unclassified(config, source):
            raise UnfitEncoderError(reason)
        return config

    def load_model(self, source: str, classes: Sequence[str], **options: Any) -> nn.Module:
        """Load an encoder with a new classification head; see ``load_classifier``."""
        return load_classifier(source, classes, **options)

    def load_trained(self, source: str, **options: Any) -> nn.Module:
        """Load a whole classifier; see ``load_trained_classifier``."""
        return load_trained_classifier(source, **options)

    def encoder_name(self, model: Any) -> str:
        """Return the prefix that transformers gives the encoder."""
        return model.base_model_prefix

    def reads(self, model: Any) -> str:
        """Say which tokens the head reads."""
        return pooling_of(model.config)

    # ---- loss and metrics ----

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Step:
        """Compute the cross-entropy in fp32."""
        logits = model(pixel_values=batch["pixel_values"]).logits.float()
        smoothing = self.settings.label_smoothing or 0.0 if model.training else 0.0
        loss = F.cross_entropy(logits, batch["labels"], ignore_index=NO_LABEL, label_smoothing=smoothing)
        return Step(loss, logits)

    def judge(self, output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the most probable classes (B, k), k = 5 where there are more, else 1; and the labels (B,)."""
        k = TOP_K if output.shape[1] > TOP_K else 1
        return output.topk(k, dim=1).indices, batch["labels"]

    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Compute top-1 and, of more than five classes, top-5 accuracy; and the mean over classes of the former."""
        # In memory: metric files of several processes would have one name.
        metric = TopKAccuracyMetric(keep_in_memory=True)
        return metric.compute(predictions=torch.as_tensor(predictions).tolist(), references=list(map(int, targets)))


def view_pipeline(settings: FineTuningSettings, inputs: EncoderInput) -> ViewPipeline:
    """Build a pipeline of one view: random resized crop, flip, normalisation."""
    scale = settings.crop_scale or ((0.35, 1.0) if inputs.image_size <= SMALL_IMAGES else (0.08, 1.0))
    view = ViewSpec(
        crop_scale=scale,
        flip_probability=0.5 if settings.flip else 0.0,
        jitter_probability=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
    )
    return ViewPipeline(
        PipelineSpec(views=(view,)),
        image_size=inputs.image_size,
        transformation=None,
        needs=Needs(),
        image_mean=inputs.image_mean,
        image_std=inputs.image_std,
        name="fine-tuning",
    )
