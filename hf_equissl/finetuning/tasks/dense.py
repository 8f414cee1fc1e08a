"""Tasks whose labels say where things are (masks, boxes, key points, pairs): a head on feature maps of a backbone."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import default_collate
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from ...encoders.convert import advise_conversion
from ...encoders.weights import without_load_report
from ...utils.load_errors import explain_load_errors, read_config
from ..classifier import check_report, set_drop_path
from .base import Task, UnfitEncoderError

WEIGHTS = "model.safetensors"
# Number of blocks of an encoder -> those that a head of four maps reads, as the paper of EquiSSL does (appendix A.1.2,
# https://arxiv.org/abs/2503.18753: 3, 5, 7, 11 of ViT-S and 7, 11, 15, 23 of ViT-L, from 0), after iBOT's.
PAPER_LAYERS = {12: (4, 6, 8, 12), 24: (8, 12, 16, 24)}
# Weights that a checkpoint may lack, because no head here reads them.
_UNUSED = ("mask_token", "pooler")


class DenseTask(Task):
    """A task whose head reads feature maps; left to write are the data, ``build``, ``loss``, ``judge`` and ``measure``.

    The model may be any module around one backbone of transformers, such as its own UPerNet, DETR or Mask2Former; the
    encoder's weights are put into it. ``transform`` is given the whole sample, so that images, masks, boxes and points
    move together.

    Args:
        layers: Blocks whose feature maps the head reads, from 1; ``None``: ``num_layers`` of them, those of
            ``published_layers`` or evenly spaced.

    Attributes:
        num_layers: How many layers the head reads, unless they are named.
        pyramid: Whether the head reads a pyramid of four levels (``FeaturePyramidBackbone``), which is made of as many
            layers, or of one: the last, where the encoder has fewer.
        published_layers: Number of blocks of an encoder -> those that the task's published protocol reads.
        auto_class: Name of transformers' auto class that loads the trained model, if there is one.
        stacked: Entries of a sample that have the same shape in all samples.
    """

    num_layers: ClassVar[int] = 4
    pyramid: bool = False
    published_layers: ClassVar[Mapping[int, tuple[int, ...]]] = PAPER_LAYERS
    auto_class: ClassVar[str | None] = None
    stacked: ClassVar[tuple[str, ...]] = ("pixels",)

    def __init__(self, *, layers: tuple[int, ...] | None = None) -> None:
        self.layers = layers

    def options(self) -> dict[str, Any]:
        """Return the layers, where they were named."""
        return {"layers": list(self.layers)} if self.layers else {}

    @abstractmethod
    def build(self, backbone_config: PreTrainedConfig, classes: Sequence[str]) -> nn.Module:
        """Make the model, with random weights, around a backbone of this configuration."""

    # ---- model ----

    def check_encoder(self, source: str, **options: Any) -> Any:
        """Refuse an encoder that transformers has no backbone for, and one that is no plain ViT."""
        config = super().check_encoder(source, **options)
        if MODEL_FOR_BACKBONE_MAPPING.get(type(config), None) is None:
            raise UnfitEncoderError(
                f"{source} is a {config.model_type} model, for which transformers has no backbone, and {self.noun} "
                f"needs feature maps. {advise_conversion(config)}"
            )
        if getattr(config, "depths", None) is not None:  # the blocks of each stage, as in ResNet, Swin and ConvNeXt
            raise UnfitEncoderError(
                f"{source} is a {config.model_type} model, which has stages of falling resolution, and {self.noun} "
                f"reads blocks of a plain ViT, whose maps have one size. {advise_conversion(config)}"
            )
        return config

    def load_model(
        self, source: str, classes: Sequence[str], *, pooling: str | None = None, drop_path: float = 0.0, **options: Any
    ) -> nn.Module:
        """Load an encoder as a backbone and put what ``build`` makes on it; ``pooling`` is not looked at.

        Raises:
            ValueError: no encoder there, none that transformers has a backbone for, or no such layers.
        """
        config = self.check_encoder(source, **options)
        kind: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        set_drop_path(config, source, drop_path)
        config.out_indices = self._layers_of(config, source)
        with explain_load_errors(source, "encoder", **options), without_load_report():
            backbone, report = kind.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True, **options
            )
        check_report(source, backbone, report, new=_UNUSED)
        model = self.build(backbone.config, classes)
        self.encoder(model).load_state_dict(backbone.state_dict())
        return model

    def _layers_of(self, config: Any, source: str) -> list[int]:
        blocks = config.num_hidden_layers
        if self.layers is None:
            if self.pyramid and blocks < self.num_layers:
                return [blocks]
            evenly = sorted({math.ceil(blocks * part / self.num_layers) for part in range(1, self.num_layers + 1)})
            return list(self.published_layers.get(blocks, evenly)) if self.num_layers == 4 else evenly
        if not self.layers or min(self.layers) < 1 or max(self.layers) > blocks:
            raise ValueError(f"layers (--set layers) is {self.layers}: {source} has the blocks 1 to {blocks}.")
        chosen = sorted(set(self.layers))
        if self.pyramid and len(chosen) not in (1, self.num_layers):
            raise ValueError(
                f"layers (--set layers) is {self.layers}: {self.noun} reads a pyramid of {self.num_layers} levels. "
                f"Name {self.num_layers} blocks, one for each level, or one for all."
            )
        return chosen

    def load_trained(self, source: str, **options: Any) -> nn.Module:
        """Load a whole trained model with ``auto_class``, or build it again and read its weights.

        Raises:
            ValueError: none there, or weights are missing.
        """
        config = read_config(source, what="fine-tuned model", **options)
        with explain_load_errors(source, "fine-tuned model", **options), without_load_report():
            if self.auto_class is not None:
                model, report = getattr(transformers, self.auto_class).from_pretrained(
                    source, output_loading_info=True, **options
                )
                check_report(source, model, report, new=_UNUSED)
                return model
            # A plain module: beside its weights lies the configuration of its backbone.
            place = {name: value for name, value in options.items() if name != "trust_remote_code"}
            weights = transformers.utils.cached_file(source, WEIGHTS, **place)
        model = self.build(config, self.classes_of(source, **place))
        load_model(model, str(weights))
        return model

    def classes_of(self, source: str, **place: Any) -> list[str]:
        """Return the names of the classes that a trained model was saved with."""
        from ..adapters import read_description

        return read_description(source, **place).classes

    def encoder_name(self, model: nn.Module) -> str:
        """Return the name of the backbone in a model; of a backbone in a backbone, as in a pyramid, the inner one."""
        found = [name for name, module in model.named_modules() if isinstance(module, BackboneMixin)]
        if not found:
            raise TypeError(f"{type(model).__name__}, which {type(self).__name__}.build made, holds no backbone.")
        name = found[0]
        for other in found[1:]:
            name = other if other.startswith(f"{name}.") else name
        return name

    def reads(self, model: nn.Module) -> str:
        """Say which layers the head reads."""
        encoder: Any = self.encoder(model)
        return f"layers {', '.join(map(str, encoder.config.out_indices))}"

    # ---- data ----

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack the entries that ``stacked`` names; the others, whose shapes may differ, become lists."""
        return {
            name: default_collate([sample[name] for sample in samples])
            if name in self.stacked
            else [sample[name] for sample in samples]
            for name in samples[0]
        }

    def to_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalise ``pixels`` uint8 (B, 3, S, S) to ``pixel_values``; the other entries stay as they are."""
        pixels = batch["pixels"]
        mean, std = (
            torch.tensor(value, device=pixels.device).view(3, 1, 1)
            for value in (self.inputs.image_mean, self.inputs.image_std)
        )
        rest = {name: value for name, value in batch.items() if name != "pixels"}
        return {**rest, "pixel_values": (pixels.float() / 255 - mean) / std}


def save_plain(model: nn.Module, encoder: nn.Module, folder: Path) -> None:
    """Write a model that is no ``PreTrainedModel``: its weights, and the configuration of its backbone."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / WEIGHTS))
    encoder.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
