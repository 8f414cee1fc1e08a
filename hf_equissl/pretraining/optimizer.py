"""Which parameter is trained how fast and with which decay, and the three ways to clip gradients."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..distributed.collectives import local_shard
from .arguments import EquiSSLTrainingArguments

if TYPE_CHECKING:
    from .model import EquiSSLForPreTraining

_BLOCK = re.compile(r"student\.encoder\.layer\.(\d+)\.")
_PROJECTIONS = re.compile(r"\.[qkv]_proj\.")
_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
CLIP_EPSILON = 1e-6  # of iBOT's and of PyTorch's rule


@dataclass(frozen=True)
class ParameterGroup:
    """What parameters of one optimizer group have in common.

    Attributes:
        lr_multiplier: Times the learning rate.
        decayed: Whether weight decay applies.
        last_layer: Whether it is held for the first ``freeze_last_layer_epochs``.
    """

    lr_multiplier: float
    decayed: bool
    last_layer: bool


@dataclass(frozen=True)
class ParameterRule:
    """One trained parameter and its group.

    Attributes:
        name: In ``named_parameters``.
        shape: Of the whole parameter, also where it is sharded.
        group: How it is trained.
        number: The group's place in the optimizer's ``param_groups``.
    """

    name: str
    shape: tuple[int, ...]
    group: ParameterGroup
    number: int


def parameter_group(
    name: str, shape: tuple[int, ...], num_layers: int, args: EquiSSLTrainingArguments
) -> ParameterGroup:
    """The rules of iBOT and DINOv2.

    Weight decay spares biases and whatever else has one dimension (norms, layer scale). Layer-wise decay d gives block
    i of n, counted from 0, the multiplier d^(n - i), the embeddings (patches, positions, CLS, registers, mask token)
    d^(n + 1), and 1 to the final norm, stem, heads and decoders.

    Args:
        name: In the pretraining model.
        shape: Of the whole parameter.
        num_layers: n.
        args: ``layer_decay``, ``patch_embedding_lr_multiplier``, ``freeze_last_layer_epochs``.
    """
    multiplier = 1.0
    if name.startswith("student.embeddings."):
        multiplier = args.layer_decay ** (num_layers + 1)
        if ".patch_embeddings." in name:
            multiplier *= args.patch_embedding_lr_multiplier
    elif block := _BLOCK.match(name):
        multiplier = args.layer_decay ** (num_layers - int(block[1]))
    return ParameterGroup(
        lr_multiplier=multiplier,
        decayed=len(shape) > 1 and not name.endswith(".bias"),
        last_layer=args.freeze_last_layer_epochs > 0 and is_last_layer(name),
    )


def is_last_layer(name: str) -> bool:
    """Whether a parameter belongs to prototypes, the last layer of a DINO head."""
    return any(word.endswith("prototypes") for word in name.split("."))


def parameter_rules(model: EquiSSLForPreTraining, args: EquiSSLTrainingArguments) -> list[ParameterRule]:
    """One row for each parameter that is trained, in the model's order; works on parameters without memory.

    Groups are numbered from the output down: number 0 has the full learning rate, which is what gets logged.
    """
    layers = model.config.encoder_config.num_hidden_layers
    # Under ZeRO-3 a parameter is an empty placeholder that remembers its shape.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}
    groups = {name: parameter_group(_WRAPPERS.sub("", name), shape, layers, args) for name, shape in shapes.items()}
    order = sorted(set(groups.values()), key=lambda g: (g.last_layer, -g.lr_multiplier, not g.decayed))
    return [ParameterRule(name, shape, groups[name], order.index(groups[name])) for name, shape in shapes.items()]


def optimizer_groups(model: EquiSSLForPreTraining, args: EquiSSLTrainingArguments) -> list[dict[str, Any]]:
    """``param_groups`` of the optimizer, each with the fields of its ``ParameterGroup`` beside PyTorch's own keys."""
    parameters = dict(model.named_parameters())
    members: dict[tuple[int, Any], dict[str, Any]] = {}
    for rule in sorted(parameter_rules(model, args), key=lambda rule: rule.number):
        parameter = parameters[rule.name]
        # One fused kernel cannot span several device meshes.
        key = (rule.number, getattr(parameter, "device_mesh", None))
        if key not in members:
            members[key] = {
                "params": [],
                "lr": args.learning_rate * rule.group.lr_multiplier,
                "weight_decay": args.weight_decay if rule.group.decayed else 0.0,
                **vars(rule.group),
            }
        members[key]["params"].append(parameter)
    return list(members.values())


def need_own_groups(args: EquiSSLTrainingArguments) -> list[str]:
    """Names of the settings in ``args`` that act through the optimizer's groups."""
    neutral = {
        "layer_decay": 1.0,
        "patch_embedding_lr_multiplier": 1.0,
        "freeze_last_layer_epochs": 0.0,
        "weight_decay_end": None,
    }
    return [name for name, value in neutral.items() if getattr(args, name) != value]


# ---- clipping ----


@torch.no_grad()
def clip_gradients(parameters: Iterable[tuple[str, nn.Parameter]], max_norm: float, rule: str) -> Tensor:
    """Scale gradients down to ``max_norm`` in place, without making the host wait.

    Args:
        parameters: Names and parameters of the pretraining model; those without a gradient are passed over. Sharded
            gradients (DTensor) count as a whole.
        max_norm: Largest norm of each part.
        rule: What a part is. "parameter": each tensor (iBOT, which has query, key and value in one). "module": encoder,
            invariance objective (a head for patches apart), stem, and each equivariance objective (DINOv2, which knows
            encoder and heads).

    Returns:
        Norm of all gradients together before clipping, scalar fp32.

    Raises:
        ValueError: ``rule`` is another one.
    """
    if rule not in ("parameter", "module"):
        raise ValueError(f"`rule` must be parameter or module, got {rule!r}.")
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in parameters:
        if parameter.grad is not None:
            parts.setdefault(part_of(name, rule), []).append(parameter.grad)
    if not parts:
        return torch.zeros(())
    gradients = [gradient for part in parts.values() for gradient in part]
    squares = _squared_norms(gradients)
    sums = torch.stack([part.sum() for part in squares.split([len(part) for part in parts.values()])])
    coefficients = clipping_coefficients(sums, max_norm)
    for part, coefficient in zip(parts.values(), coefficients.unbind(), strict=True):
        torch._foreach_mul_([local_shard(gradient) for gradient in part], coefficient)
    return sums.sum().sqrt()


def clipping_coefficients(squares: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by, at most 1, for parts with these squared norms."""
    return (max_norm / (squares.sqrt() + CLIP_EPSILON)).clamp(max=1.0)


def part_of(name: str, rule: str) -> str:
    """The part that a parameter is clipped with under ``rule``, "parameter" or "module"."""
    return tensor_of(name) if rule == "parameter" else module_of(name)


def tensor_of(name: str) -> str:
    """The tensor that a parameter is clipped with under the rule "parameter": its own, or iBOT's fused projection."""
    return _PROJECTIONS.sub(".qkv_proj.", name)


def module_of(name: str) -> str:
    """The part of the model that a parameter is clipped with under the rule "module"."""
    words = _WRAPPERS.sub("", name).split(".")
    if words[:2] == ["student", "stem"] or words[0] == "equivariance":
        return ".".join(words[:2])
    if words[0] == "invariance" and words[2:3] in (["patch_mlp"], ["patch_prototypes"]):
        return "invariance.patches"  # DINOv2's second head
    return words[0]


def _squared_norms(gradients: list[Tensor]) -> Tensor:
    """Squared norm of each gradient, (n,), fp32; over all shards, in one exchange per kind of sharding."""
    norms = torch._foreach_norm([local_shard(gradient) for gradient in gradients], 2, dtype=torch.float32)
    kinds: dict[Any, list[int]] = {}
    for index, gradient in enumerate(gradients):
        kind = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        kinds.setdefault(kind, []).append(index)
    squares = list(norms)
    for kind, indices in kinds.items():
        # Put together and taken apart one by one: an index would have to be copied to the device, and waited for.
        whole = torch.stack([norms[index] for index in indices]).square()
        for dimension, placement in enumerate(kind[1] if kind else ()):
            if placement.is_shard():
                dist.all_reduce(whole, group=kind[0].get_group(dimension))
        for index, square in zip(indices, whole.unbind(), strict=True):
            squares[index] = square
    return torch.stack(squares)
