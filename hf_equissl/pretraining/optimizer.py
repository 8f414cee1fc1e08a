"""Which parameter is trained how fast and with which decay, and the three ways to clip gradients."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer
from transformers.trainer_optimizer import is_optimizer_factory

from ..distributed.collectives import local_shard
from ..distributed.engines import plain_name
from ..utils.suggestions import check_keys
from .arguments import LARS_NAME, EquiSSLTrainingArguments
from .lars import LARS

if TYPE_CHECKING:
    from .model import EquiSSLForPreTraining

_BLOCK = re.compile(r"student\.encoder\.layer\.(\d+)\.")
_PROJECTIONS = re.compile(r"\.[qkv]_proj\.")
# What settings of a run say in an optimizer's groups, beside the learning rate. Whatever else stands there is how it
# keeps its state, or state itself (schedule-free optimizers count their steps there), which a checkpoint brings.
_OF_SETTINGS = ("betas", "eps", "weight_decay", "momentum", "trust_coefficient", "warmup_steps")
CLIP_EPSILON = 1e-6  # the value in iBOT's and in PyTorch's rule


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
        name: Its name in ``named_parameters``.
        module: The part of the model that it belongs to (``module_of``).
        shape: Shape of the whole parameter, also where it is sharded.
        group: How it is trained.
        number: The group's place in the optimizer's ``param_groups``.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    group: ParameterGroup
    number: int


def parameter_group(
    name: str, shape: tuple[int, ...], model: EquiSSLForPreTraining, args: EquiSSLTrainingArguments
) -> ParameterGroup:
    """Say how a parameter is trained, by the rules of iBOT and DINOv2.

    Weight decay spares biases and whatever else has one dimension (norms, layer scale), unless
    ``decay_one_dimensional``. Layer-wise decay d gives block
    i of n, counted from 0, the multiplier d^(n - i), the embeddings (patches, positions, CLS, registers, mask token)
    d^(n + 1), and 1 to the final norm, stem, heads and decoders.

    Args:
        name: Its name in the pretraining model.
        shape: Shape of the whole parameter.
        model: Has n blocks, and objectives that say which of their parameters are a last layer.
        args: ``decay_one_dimensional``, ``layer_decay``, ``patch_embedding_lr_multiplier`` and
            ``freeze_last_layer_epochs``.
    """
    multiplier, num_layers = 1.0, model.config.encoder_config.num_hidden_layers
    if name.startswith("student.embeddings."):
        multiplier = args.layer_decay ** (num_layers + 1)
        if ".patch_embeddings." in name:
            multiplier *= args.patch_embedding_lr_multiplier
    elif block := _BLOCK.match(name):
        multiplier = args.layer_decay ** (num_layers - int(block[1]))
    return ParameterGroup(
        lr_multiplier=multiplier,
        decayed=args.decay_one_dimensional or (len(shape) > 1 and not name.endswith(".bias")),
        last_layer=args.freeze_last_layer_epochs > 0 and is_last_layer(model, name),
    )


def is_last_layer(model: EquiSSLForPreTraining, name: str) -> bool:
    """Ask the objective that owns the parameter ``name``, if one does, whether it is a last layer that can be held."""
    if (owner := model.owner_of(plain_name(name))) is None:
        return False
    _, objective, own_name = owner
    return objective.is_last_layer(own_name)


def check_last_layer(model: EquiSSLForPreTraining, args: EquiSSLTrainingArguments) -> None:
    """Refuse to hold a last layer that no objective has.

    Raises:
        ValueError: with the remedy.
    """
    if args.freeze_last_layer_epochs > 0 and not any(
        is_last_layer(model, name) for name, _ in model.named_parameters()
    ):
        raise ValueError(
            f"freeze_last_layer_epochs is {args.freeze_last_layer_epochs:g}, and this model has no prototypes (or "
            "another last layer) to hold. Set it to 0."
        )


def freeze_parameters(model: EquiSSLForPreTraining, args: EquiSSLTrainingArguments) -> None:
    """Freeze what a run does not train: what no gradient reaches and, where asked, the patch embedding."""
    model.freeze_unused()
    if args.freeze_patch_embedding:
        model.student.embeddings.patch_embeddings.requires_grad_(False)


def choose_optimizer(model: nn.Module | None, args: EquiSSLTrainingArguments) -> tuple[Any, dict[str, Any]]:
    """Return the class (or factory) of the optimizer and its keyword arguments: of this package or of transformers.

    Args:
        model: For optimizers that choose its parameters themselves.
        args: Name the optimizer.

    Raises:
        ValueError, ImportError: ``optim_args`` are no pairs or not those of the optimizer, or its package is missing.
    """
    given = optim_arguments(args)
    if args.optim != LARS_NAME:
        return Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    check_keys(given, ("momentum", "trust_coefficient"), "optim_args of lars")
    return LARS, {"lr": args.learning_rate, **{name: float(value) for name, value in given.items()}}


def optim_arguments(args: EquiSSLTrainingArguments) -> dict[str, str]:
    """Split ``optim_args`` as transformers does.

    Raises:
        ValueError: A part is no ``name=value``, or a number is not finite.
    """
    found = {}
    for part in (args.optim_args or "").replace(" ", "").split(",") if args.optim_args else ():
        name, is_pair, value = part.partition("=")
        if not (name and is_pair and value) or "=" in value:
            raise ValueError(f"optim_args must be name=value pairs with commas between them, got {part!r}.")
        if value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            raise ValueError(f"optim_args: {name} must be finite, got {value}.")
        found[name] = value
    return found


def chooses_own_groups(kind: Any, given: dict[str, Any]) -> bool:
    """Return whether an optimizer, as ``choose_optimizer`` gives it, groups the model's parameters by itself."""
    return is_optimizer_factory(kind) or bool(given.keys() & {"params", "model", "optimizer_dict"})


def parameter_rules(model: EquiSSLForPreTraining, args: EquiSSLTrainingArguments) -> list[ParameterRule]:
    """List one row for each parameter that is trained, in the model's order; works on parameters without memory.

    Groups are numbered from the output down: number 0 has the full learning rate, which is what gets logged.
    """
    # Under ZeRO-3 a parameter is an empty placeholder that remembers its shape.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}
    groups = {name: parameter_group(plain_name(name), shape, model, args) for name, shape in shapes.items()}
    order = sorted(set(groups.values()), key=lambda g: (g.last_layer, -g.lr_multiplier, not g.decayed))
    return [
        ParameterRule(name, module_of(model, name), shape, groups[name], order.index(groups[name]))
        for name, shape in shapes.items()
    ]


def optimizer_groups(model: EquiSSLForPreTraining, args: EquiSSLTrainingArguments) -> list[dict[str, Any]]:
    """Build ``param_groups`` of the optimizer: the fields of each ``ParameterGroup`` beside PyTorch's own keys."""
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
    """Name the settings in ``args`` that act through the optimizer's groups."""
    neutral = {
        "layer_decay": 1.0,
        "patch_embedding_lr_multiplier": 1.0,
        "freeze_last_layer_epochs": 0.0,
        "weight_decay_end": None,
    }
    return [name for name, value in neutral.items() if getattr(args, name) != value]


# ---- resuming ----


def own_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Note the settings of each group of a new optimizer, before anything is loaded into it."""
    kept = (*_OF_SETTINGS, *(field.name for field in fields(ParameterGroup)))
    return [
        {"lr": float(group.get("initial_lr", group["lr"])), **{key: group[key] for key in kept if key in group}}
        for group in optimizer.param_groups
    ]


def keep_own_settings(optimizer: Optimizer, scheduler: LRScheduler, own: list[dict[str, Any]]) -> None:
    """Set a resumed optimizer and its schedule back to its ``own`` settings: its checkpoint brings those of its time.

    The same settings leave every bit as it was. Which kernel is used (``fused`` and the like) stays as it was loaded,
    since the state is laid out for it, and so does state that an optimizer keeps in its groups.
    """
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update({key: value for key, value in settings.items() if key != "lr"})
        group["initial_lr"] = settings["lr"]
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [settings["lr"] for settings in own]
        rates = [
            base * rate(scheduler.last_epoch)
            for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


# ---- clipping ----


@torch.no_grad()
def clip_gradients(parameters: Iterable[tuple[str, nn.Parameter]], max_norm: float) -> Tensor:
    """Scale gradients down to ``max_norm`` in place, without making the host wait.

    Args:
        parameters: Each parameter with the part that it is clipped in, as ``clipping_parts`` gives them; those without
            a gradient are passed over. Sharded gradients (DTensor) count as a whole.
        max_norm: Largest norm of each part.

    Returns:
        Norm of all gradients together before clipping, scalar fp32.
    """
    parts: dict[str, list[Tensor]] = {}
    for part, parameter in parameters:
        if parameter.grad is not None:
            parts.setdefault(part, []).append(parameter.grad)
    if not parts:
        return torch.zeros(())
    gradients = [gradient for part in parts.values() for gradient in part]
    squares = _squared_norms(gradients)
    sums = torch.stack([own.sum() for own in squares.split([len(members) for members in parts.values()])])
    coefficients = clipping_coefficients(sums, max_norm)
    for members, coefficient in zip(parts.values(), coefficients.unbind(), strict=True):
        torch._foreach_mul_([local_shard(gradient) for gradient in members], coefficient)
    return sums.sum().sqrt()


def clipping_coefficients(squares: Tensor, max_norm: float) -> Tensor:
    """Return what gradients are multiplied by, at most 1, for parts with these squared norms."""
    return (max_norm / (squares.sqrt() + CLIP_EPSILON)).clamp(max=1.0)


def clipping_parts(model: EquiSSLForPreTraining, rule: str) -> list[tuple[str, nn.Parameter]]:
    """Pair each parameter of ``model`` with the part that it is clipped in.

    Args:
        model: The pretraining model.
        rule: What a part is. "parameter": each tensor (iBOT, which has query, key and value in one). "module": encoder,
            stem, and each objective (DINOv2, which knows encoder and heads), or parts that the objective names.

    Raises:
        ValueError: ``rule`` is another one.
    """
    if rule not in ("parameter", "module"):
        raise ValueError(f"`rule` must be parameter or module, got {rule!r}.")
    return [
        (_PROJECTIONS.sub(".qkv_proj.", name) if rule == "parameter" else module_of(model, name), parameter)
        for name, parameter in model.named_parameters()
    ]


def module_of(model: EquiSSLForPreTraining, name: str) -> str:
    """Return the part of the model that the parameter ``name`` is clipped in by the rule "module"."""
    name = plain_name(name)
    if (owner := model.owner_of(name)) is not None:
        place, objective, own_name = owner
        part = objective.clipping_part(own_name)
        return place if part is None else f"{place}.{part}"
    return "student.stem" if name.startswith("student.stem.") else name.split(".")[0]


def _squared_norms(gradients: list[Tensor]) -> Tensor:
    """Return the squared norm of each gradient, (n,), fp32; over all shards, in one exchange per kind of sharding."""
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
