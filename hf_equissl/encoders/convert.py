"""Encoders of transformers, and of the authors' own checkpoints, as EquiSSL encoders with equal outputs."""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTMAEModel,
    ViTModel,
    ViTMSNModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..modeling import EquiSSLConfig, EquiSSLModel
from ..utils.files import move_into_place, write_text
from ..utils.hostile import check_image_settings
from ..utils.load_errors import explain_load_errors, read_config
from .export import image_processor, save_encoder
from .loading import read_image_settings
from .native import save_native
from .places import BASE_FILE, is_upstream_file
from .programs import save_program
from .targets import PROGRAM_FILES, check_target
from .upstream import convert_upstream
from .weights import SAME_NAME, build_encoder, count_groups, join_names, without_load_report

logger = logging.getLogger(__name__)

_MASK_TOKEN = "embeddings.mask_token"


@dataclass(frozen=True)
class Converter:
    """How one model type of transformers becomes an EquiSSL encoder.

    Attributes:
        model_class: The stock encoder that reads the weights.
        fields: Makes the fields of ``EquiSSLConfig`` from its configuration; raises ``ValueError`` with the reason if
            the architecture is another.
        renamings: Pairs of a pattern and its replacement, from the stock names to ours.
        dropped: First parts of the names that do not belong to an encoder: heads, poolers, decoders.
        load_options: Keywords for ``model_class.from_pretrained``.
    """

    model_class: type[PreTrainedModel]
    fields: Callable[[Any], dict[str, Any]]
    renamings: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ("classifier", "decoder", "head", "pooler")
    load_options: Mapping[str, Any] = field(default_factory=dict)


def convert_encoder(
    source: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    subfolder: str = "",
    weights_of: str = "teacher",
    num_attention_heads: int | None = None,
    **hub_options: Any,
) -> EquiSSLModel:
    """Convert an existing encoder to an EquiSSL encoder with equal tokens, in float32 and eval mode.

    It has no stem and no decoder, unless the source is an EquiSSL encoder, which is returned as it is. Heads, poolers
    and decoders in the checkpoint are left out, and a log line names them. Of ViT-MAE the encoder sees every patch, in
    order, and its fixed positions become trainable ones.

    Args:
        source: One of

            - a folder or Hub id with an EquiSSL encoder or a stock model of ``CONVERTERS``, with or without a head;
            - such a model itself, whose weights are copied;
            - a ``.pth`` or ``.pt`` file of iBOT, DINO or DINOv2 (see ``convert_upstream``).
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder within the repository.
        weights_of: "teacher" or "student", where an upstream file holds both.
        num_attention_heads: Heads of an upstream file, which does not store their number; default: width / 64.
        **hub_options: ``cache_dir``, ``token``, ``local_files_only`` as in ``from_pretrained``.

    Raises:
        ValueError: There is nothing that can be read, the architecture is another (with the reason), or weights are
            missing or left over (with their names).
    """
    if isinstance(source, PreTrainedModel):
        return _convert_model(source)
    if not isinstance(source, (str, Path)):
        raise ValueError(f"{type(source).__name__} does not convert: expected a folder, a Hub id or a stock model.")
    if is_upstream_file(source):
        if revision or subfolder:
            raise ValueError(
                f"{str(source)!r} is one file: revision ({revision}) and subfolder ({subfolder!r}) belong to a "
                "repository. Leave them out."
            )
        return convert_upstream(source, weights_of=weights_of, num_attention_heads=num_attention_heads)
    if num_attention_heads is not None:
        raise ValueError(
            f"num_attention_heads (--num_attention_heads) is {num_attention_heads}: {str(source)!r} says it itself. It "
            "belongs to .pth files."
        )
    if hub_options.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code=True: conversion reads stock model types and runs no code of a repository.")
    options = {"revision": revision, "subfolder": subfolder, **hub_options}
    config = read_config(source, **options)
    converter = _converter(config, str(source))
    fields = converter.fields(config)
    with explain_load_errors(source, **options), without_load_report():
        loaded: Any = converter.model_class.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, **options, **converter.load_options
        )
    model, report = loaded
    without_mask_token = _check_report(report, converter, str(source))
    if isinstance(model, EquiSSLModel):
        if "EquiSSLForImageClassification" in (config.architectures or ()):  # transformers passes over it in silence
            logger.info("Left out of %s: classifier (2).", source)
        return model.eval()
    state = dict(model.state_dict())
    if without_mask_token:
        state.pop(_MASK_TOKEN, None)
    return _build(converter, fields, state, str(source))


def read_normalisation(
    source: str | Path | PreTrainedModel, **hub_options: Any
) -> tuple[list[float], list[float]] | None:
    """Read mean and standard deviation per channel that an encoder's images are normalised with.

    They are those of the image processor beside it, and of an upstream file ImageNet's, which iBOT, DINO and DINOv2
    train with; ``None`` where nothing says them.
    """
    if isinstance(source, PreTrainedModel):
        return None
    if is_upstream_file(source):
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    settings = read_image_settings(source, **hub_options)
    return (settings["image_mean"], settings["image_std"]) if settings else None


def convert_to_folder(
    source: str | Path,
    directory: str | Path,
    *,
    to: str = "equissl",
    tokens_only: bool = False,
    int8: bool = False,
    images: Callable[[BitImageProcessorPil], Tensor] | None = None,
    image_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    weights_of: str = "teacher",
    num_attention_heads: int | None = None,
    **hub_options: Any,
) -> EquiSSLModel:
    """Convert, and save the encoder with its image processor; the folder appears when it is whole.

    Args:
        source: As in ``convert_encoder``.
        directory: Folder to write, absent or empty.
        to: One of ``TARGETS``: "equissl" and "native" (``to_native``) load with ``AutoModel``; "onnx" and
            "torch_export" are programs (``save_program``).
        tokens_only: As in ``save_program``.
        int8: As in ``save_program``.
        images: Gives normalised images (B, C, H, W) to measure the loss of ``int8`` on, made by the processor that it
            is handed; default: some that are made up.
        image_size: Side in pixels that the image processor crops; default: that of the source's processor, else the
            size of the stored positions.
        image_mean: Mean of each channel; default: as ``read_normalisation`` finds it.
        image_std: Standard deviation of each channel; default: the same.
        weights_of: As in ``convert_encoder``.
        num_attention_heads: As in ``convert_encoder``.
        **hub_options: ``revision``, ``subfolder``, ... likewise.

    Returns:
        The encoder.

    Raises:
        ValueError: As ``check_target`` and ``convert_encoder``; the folder holds files; nothing says how images are
            normalised; the image size is no multiple of the patch size; a program computes something else.
    """
    check_target(to, tokens_only=tokens_only, int8=int8)
    directory = Path(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(f"{str(directory)!r} holds files already: give a new folder.")
    check_image_settings({"image_size": image_size, "image_mean": image_mean, "image_std": image_std}, "The options")
    encoder = convert_encoder(source, weights_of=weights_of, num_attention_heads=num_attention_heads, **hub_options)
    saved = {} if is_upstream_file(source) else read_image_settings(source, **hub_options)
    found = read_normalisation(source, **hub_options) or (None, None)
    mean, std = image_mean or found[0], image_std or found[1]
    if mean is None or std is None:
        raise ValueError(
            f"No image processor beside {str(source)!r}: give image_mean and image_std (--image_mean, --image_std)."
        )
    if {len(mean), len(std)} != {encoder.config.num_channels} or min(std) <= 0:
        raise ValueError(
            f"image_mean={list(mean)}, image_std={list(std)} (--image_mean, --image_std): expected "
            f"{encoder.config.num_channels} values each, one per channel, and deviations above 0."
        )
    patch, (rows, _) = encoder.config.patch_side, encoder.config.grid_size
    size = image_size or saved.get("image_size") or rows * patch
    if size % patch:
        raise ValueError(
            f"image_size={size} is no multiple of the patches' {patch} pixels: give another (--image_size)."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".converting-") as scratch:
        staging, processor = Path(scratch, "encoder"), image_processor(size, mean, std)
        if to in PROGRAM_FILES:
            staging.mkdir()
            given = images(processor) if images is not None and int8 else None
            save_program(encoder, staging, to, size, tokens_only=tokens_only, int8=int8, images=given)
        else:
            (save_native if to == "native" else save_encoder)(encoder, staging, mean, std)
        processor.save_pretrained(staging)
        write_text(staging / BASE_FILE, f"{source}\n")
        move_into_place(staging, directory)
    return encoder


def _convert_model(model: PreTrainedModel) -> EquiSSLModel:
    """Convert the encoder of a model in memory, whatever head it has."""
    name, prefix = type(model).__name__, f"{model.base_model_prefix}."
    converter = _converter(model.config, name)
    encoder = getattr(model, model.base_model_prefix, model)
    head = [key for key in model.state_dict() if encoder is not model and not key.startswith(prefix)]
    if head:
        logger.info("Left out of %s: %s.", name, count_groups(head))
    if isinstance(encoder, EquiSSLModel):
        return encoder
    if converter.model_class is EquiSSLModel:
        raise ValueError(f"{name} holds no EquiSSLModel: give the folder or Hub id that it was loaded from.")
    return _build(converter, converter.fields(model.config), dict(encoder.state_dict()), name)


def advise_conversion(config: PreTrainedConfig) -> str:
    """Say what to do with an encoder of a kind that something else cannot use: convert it, or why that fails, too."""
    if config.model_type in CONVERTERS:
        return (
            "Convert it into an EquiSSL encoder (hf_equissl.encoders.convert_encoder), or give another, such as DINOv2."
        )
    return f"It does not convert into an EquiSSL encoder: {_obstacle(config)}. Give another encoder, such as DINOv2."


def _obstacle(config: PreTrainedConfig) -> str:
    return NOT_CONVERTIBLE.get(config.model_type, "its architecture is not that of a plain ViT")


def _converter(config: PreTrainedConfig, source: str) -> Converter:
    """Find the converter for a configuration; raise ``ValueError`` with the reason where there is none."""
    found = CONVERTERS.get(config.model_type)
    if found is None:
        raise ValueError(
            f"{source!r} has model type {config.model_type!r}, which does not convert: {_obstacle(config)}. "
            f"Convertible types: {', '.join(CONVERTERS)}."
        )
    return found


def _check_report(report: Mapping[str, Any], converter: Converter, source: str) -> bool:
    """Refuse checkpoints of another encoder; returns whether the checkpoint lacks a mask token."""
    optional = {_MASK_TOKEN} if "use_mask_token" in converter.load_options else set()
    missing = set(report["missing_keys"]) - optional
    unexpected = set(report["unexpected_keys"])
    unknown = {name for name in unexpected if name.split(".")[0] not in converter.dropped}
    if missing or unknown:
        found = [
            f"{len(names)} {what}: {join_names(names)}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ValueError(
            f"The weights at {source!r} are not those of its {converter.model_class.__name__} ({'; '.join(found)}). "
            "Give the complete checkpoint that config.json belongs to."
        )
    if unexpected:
        logger.info("Left out of %s: %s.", source, count_groups(unexpected))
    return _MASK_TOKEN in report["missing_keys"]


def _build(converter: Converter, fields: dict[str, Any], state: dict[str, Tensor], source: str) -> EquiSSLModel:
    """Build the encoder from renamed weights, without those that are not its own."""
    dropped = [name for name in state if name.split(".")[0] in converter.dropped]
    if dropped:
        logger.info("Left out of %s: %s.", source, count_groups(dropped))
    renamed: dict[str, Tensor] = {}
    for name in state.keys() - set(dropped):
        ours = name
        for pattern, replacement in converter.renamings:
            ours = re.sub(pattern, replacement, ours)
        renamed[ours] = state[name]
    if _MASK_TOKEN in renamed:
        renamed[_MASK_TOKEN] = renamed[_MASK_TOKEN].reshape(1, -1)  # ViT stores (1, 1, D)
    return build_encoder({**fields, "use_mask_token": _MASK_TOKEN in renamed}, renamed, source)


def _common_fields(config: Any) -> dict[str, Any]:
    patch = _side(config.patch_size, "patch_size")
    size = config.image_size
    sides = [size, size] if isinstance(size, int) else list(size)
    filled = [side // patch * patch for side in sides]  # what remains of an image beyond whole patches is not seen
    image_size = filled[0] if filled[0] == filled[1] else filled
    if getattr(config, "hidden_dropout_prob", 0):
        logger.info("hidden_dropout_prob=%s is not carried: our blocks have none.", config.hidden_dropout_prob)
    return {**{name: getattr(config, name) for name in SAME_NAME}, "patch_size": patch, "image_size": image_size}


def _side(value: Any, name: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"{name}={value}: expected squares, which EquiSSL encoders have.")
    return int(sides.pop())


def _vit_fields(config: Any) -> dict[str, Any]:
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) != config.intermediate_size:
        ratio = math.nextafter(ratio, math.inf)  # the quotient was rounded down
    return {**_common_fields(config), "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio}


def _dinov2_fields(config: Any) -> dict[str, Any]:
    if config.use_swiglu_ffn:
        raise ValueError(
            "use_swiglu_ffn=True (DINOv2's giant): the feed-forward is a SwiGLU, and EquiSSL blocks have two linear "
            "layers. Take a small, base or large model."
        )
    fields = _common_fields(config)
    if not isinstance(fields["image_size"], int):
        raise ValueError(f"image_size={config.image_size}: {config.model_type} reads its positions as a square grid.")
    fields |= {"mlp_ratio": config.mlp_ratio, "layerscale_value": config.layerscale_value}
    # The stock blocks all have one rate.
    return {**fields, "drop_path_rate": config.drop_path_rate, "drop_path_mode": "uniform"}


def _registers_fields(config: Any) -> dict[str, Any]:
    if config.num_register_tokens < 1:
        raise ValueError("num_register_tokens=0: positions are interpolated otherwise than ours; save it as `dinov2`.")
    return {**_dinov2_fields(config), "num_register_tokens": config.num_register_tokens}


def _own_fields(config: EquiSSLConfig) -> dict[str, Any]:
    return {}  # an EquiSSL encoder is loaded as it is


_VIT_NAMES = (
    (r"^layers\.", "encoder.layer."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
# With a mask token, or one in a checkpoint of masked image modelling would be lost.
_VIT_OPTIONS = {"add_pooling_layer": False, "use_mask_token": True}

CONVERTERS: dict[str, Converter] = {
    "equissl": Converter(EquiSSLModel, _own_fields),
    "dinov2": Converter(Dinov2Model, _dinov2_fields),
    "dinov2_with_registers": Converter(Dinov2WithRegistersModel, _registers_fields),
    "vit": Converter(ViTModel, _vit_fields, _VIT_NAMES, load_options=_VIT_OPTIONS),
    "vit_mae": Converter(ViTMAEModel, _vit_fields, _VIT_NAMES),
    "vit_msn": Converter(ViTMSNModel, _vit_fields, _VIT_NAMES, load_options={"use_mask_token": True}),
}

NOT_CONVERTIBLE: dict[str, str] = {
    "beit": "it adds relative position biases inside attention",
    "clip": "it normalises the tokens before its first block",
    "clip_vision_model": "it normalises the tokens before its first block",
    "data2vec-vision": "it adds relative position biases inside attention",
    "deit": "it has a distillation token beside CLS",
    "dinov3_vit": "it turns queries and keys by position (RoPE) instead of storing position embeddings",
    "equissl_pretraining": "it is a whole pretraining state; load it with EquiSSLForPreTraining, or give the folder of "
    "its encoder",
    "ijepa": "it has no CLS token",
    "siglip": "it has no CLS token",
    "siglip_vision_model": "it has no CLS token",
    "swin": "it has windows and stages instead of one sequence of tokens",
}
