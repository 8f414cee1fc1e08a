"""Checkpoints of the authors' own code: iBOT, DINO and DINOv2 as ``.pth`` files."""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..modeling import EquiSSLModel
from .places import check_source
from .weights import build_encoder, count_groups, join_names

logger = logging.getLogger(__name__)

_HEAD_SIZE = 64  # width of a head in every ViT that the three projects release, from ViT-Ti to ViT-g
_HEADS = ("head", "dino_head", "ibot_head")
# iBOT (https://github.com/bytedance/ibot), DINO and DINOv2 (https://github.com/facebookresearch/dinov2) -> ours.
_NAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^(masked_embed|mask_token)$", "embeddings.mask_token"),
    (r"^register_tokens$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(?:\d+\.)?(\d+)\.", r"encoder.layer.\1."),  # DINOv2's FSDP runs save blocks.<chunk>.<block>
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.(?:ls(\d)\.gamma|gamma_(\d))$", r".layer_scale\1\2.lambda1"),
)
_QKV = ".attention.qkv."


def convert_upstream(
    path: str | Path, *, weights_of: str = "teacher", num_attention_heads: int | None = None
) -> EquiSSLModel:
    """Convert the ViT in a checkpoint of iBOT, DINO or DINOv2 to an EquiSSL encoder, in float32 and eval mode.

    Reads what these projects publish and what their training leaves: a bare state dict, ``{"state_dict": ...}``, or
    ``{"student": ..., "teacher": ...}`` with the encoder below ``backbone.``. Heads, optimizer and the other network
    are left out, and a log line names them. Sizes follow from shapes; epsilon is 1e-6 as in all three.

    At the size of the stored positions the outputs are equal. At other sizes upstream's DINO, iBOT and DINOv2 without
    registers add 0.1 patches to the size that they interpolate positions to; transformers and this package do not, and
    tokens differ slightly, as they do in the DINOv2 checkpoints that transformers publishes.

    Args:
        path: The file. It is read with ``weights_only=True``: no code in it runs.
        weights_of: "teacher" or "student", where the file holds both.
        num_attention_heads: Number of heads, which such a file does not store; default: width / 64.

    Raises:
        ValueError: The file cannot be read or needs code, its network is not a plain ViT (Swin, SwiGLU, rotary
            positions), or weights are missing or left over, which the message lists.
    """
    if weights_of not in ("teacher", "student"):
        raise ValueError(f"weights_of={weights_of!r}: expected 'teacher' or 'student'.")
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file: expected a checkpoint of iBOT, DINO or DINOv2.")
    if num_attention_heads is not None and num_attention_heads < 1:
        raise ValueError(f"num_attention_heads is {num_attention_heads}: expected 1 or more.")
    checkpoint = _read(path)
    try:
        return _convert(checkpoint, path, weights_of, num_attention_heads)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no ViT of iBOT, DINO or DINOv2 ({type(error).__name__}: {error})."
        ) from error


def _convert(
    checkpoint: Mapping[str, Any], path: Path, weights_of: str, num_attention_heads: int | None
) -> EquiSSLModel:
    state = _encoder_weights(_network(checkpoint, weights_of, path), path)
    _refuse_other_architectures(state, path)
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = name
        for pattern, replacement in _NAMES:
            ours = re.sub(pattern, replacement, ours)
        if _QKV in ours:
            for part, rows in zip("qkv", value.tensor_split(3), strict=True):
                renamed[ours.replace(_QKV, f".attention.{part}_proj.")] = rows
        else:
            renamed[ours] = value
    return build_encoder(_fields(renamed, num_attention_heads, path), renamed, str(path))


def _read(path: Path) -> Mapping[str, Any]:
    check_source(path)
    try:
        # Both iBOT and DINO save their arguments, a plain bag of values, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"WeightsUnpickler error: (.*?)(?:\. |\n|$)", str(error))
        if reason is None or "Unsupported" not in reason[1]:
            raise ValueError(_unreadable(path, error)) from error
        raise ValueError(
            f"{str(path)!r} holds more than weights, which could run code, and is not opened ({reason[1]}). "
            "If you trust whoever made it, save the weights alone, once: "
            "torch.save(torch.load(path, weights_only=False)['teacher'], 'teacher.pth'), then convert that file."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # the reader may raise anything on bytes that are no checkpoint
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(checkpoint).__name__}: expected a state dict.")
    return checkpoint


def _unreadable(path: Path, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {error}".split(". ")[0].splitlines()[0].removesuffix(": ")
    return f"{str(path)!r} cannot be read ({reason}): cut short, or no checkpoint. Download it again."


def _network(checkpoint: Mapping[str, Any], weights_of: str, path: Path) -> Mapping[str, Any]:
    """Find the state dict of one network in a file."""
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return checkpoint
    key = weights_of if weights_of in checkpoint else "state_dict"
    network = checkpoint.get(key)
    if not isinstance(network, Mapping) or not network:
        raise ValueError(
            f"{str(path)!r} has no {weights_of!r} and no 'state_dict': it holds {join_names(map(str, checkpoint))}. "
            "Choose the other network with weights_of, or save the state dict alone."
        )
    others = sorted(str(name) for name in checkpoint if name != key)
    logger.info("Taking %r of %s%s.", key, path, f"; left out: {', '.join(others)}" if others else "")
    return network


def _encoder_weights(network: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Take the encoder's entries without the prefixes of wrappers, and leave those of heads out."""
    entries = {str(name).removeprefix("module."): value for name, value in network.items()}
    wrapped = any(name.startswith("backbone.") for name in entries)
    heads = {name for name in entries if name.split(".")[0] in _HEADS}
    state = {name.removeprefix("backbone."): value for name, value in entries.items() if name not in heads}
    stray = [name for name in entries if wrapped and name not in heads and not name.startswith("backbone.")]
    stray += [name for name, value in state.items() if not isinstance(value, Tensor)]
    if stray:
        raise ValueError(
            f"{str(path)!r}: {len(stray)} entries are neither of an encoder nor a head: {join_names(stray)}."
        )
    if heads:
        logger.info("Left out of %s: %s.", path, count_groups(heads))
    return state


def _refuse_other_architectures(state: Mapping[str, Tensor], path: Path) -> None:
    reasons = {
        r"^layers\.\d+\.": "a Swin: windows and stages instead of one sequence of tokens",
        r"\.mlp\.w(1|12|3)\.": "a ViT with SwiGLU (DINOv2's giant): EquiSSL blocks have two linear layers",
        r"^rope_embed\.": "a ViT with rotary positions (DINOv3): EquiSSL stores position embeddings",
        r"relative_position_bias": "a ViT with relative position biases: EquiSSL stores position embeddings",
        r"^fc_norm\.": "a ViT that norms the mean patch instead of the tokens",
    }
    for pattern, reason in reasons.items():
        if any(re.search(pattern, name) for name in state):
            raise ValueError(f"{str(path)!r} does not convert: it is {reason}.")


def _fields(state: Mapping[str, Tensor], num_attention_heads: int | None, path: Path) -> dict[str, Any]:
    """Derive the fields of ``EquiSSLConfig`` from names and shapes."""
    first = "encoder.layer.0."
    needed = {
        "positions": "embeddings.position_embeddings",
        "patches": "embeddings.patch_embeddings.projection.weight",
        "mlp": first + "mlp.fc1.weight",
    }
    dimensions = {"positions": 3, "patches": 4, "mlp": 2}
    absent = [name for key, name in needed.items() if name not in state or state[name].ndim != dimensions[key]]
    if absent:
        raise ValueError(
            f"{str(path)!r} is not a ViT of iBOT, DINO or DINOv2: without {join_names(absent)} (our names). "
            f"It holds {join_names(state)}."
        )
    hidden_size, num_channels, patch_size, _ = state[needed["patches"]].shape
    side = math.isqrt(state[needed["positions"]].shape[1] - 1)
    if side**2 + 1 != state[needed["positions"]].shape[1]:
        raise ValueError(
            f"{str(path)!r} stores {state[needed['positions']].shape[1]} positions: expected CLS and square patches."
        )
    if num_attention_heads is None and hidden_size % _HEAD_SIZE:
        raise ValueError(
            f"{str(path)!r} has width {hidden_size}, no multiple of {_HEAD_SIZE}: give num_attention_heads."
        )
    layers = {int(name.split(".")[2]) for name in state if name.startswith("encoder.layer.")}
    registers = state.get("embeddings.register_tokens")
    ratio = state[needed["mlp"]].shape[0] / hidden_size
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": num_attention_heads or hidden_size // _HEAD_SIZE,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "qkv_bias": first + "attention.q_proj.bias" in state,
        "layerscale_value": 1e-5 if first + "layer_scale1.lambda1" in state else None,  # DINOv2 begins with it
        "num_register_tokens": 0 if registers is None else registers.shape[1],
        "use_mask_token": "embeddings.mask_token" in state,
    }
