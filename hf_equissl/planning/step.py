"""What a step will cost, found without weights in memory: parameters, FLOPs, memory.

The model is built and run once on fake tensors, which have shapes and types but no storage. So every number follows the
code that trains, and a large model at a large batch takes seconds on any machine.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from ..pretraining.optimizer import freeze_parameters
from ..views.base import Views
from .flop_counts import FlopCounter, flops_by_module
from .optimizer_memory import optimizer_memory
from .processes import Exchanged, as_one_of
from .storages import KeptStorages, Moment, Observer, StepMemory

KINDS = ("student", "teacher", "heads", "decoders")
FP32_BYTES = 4


@dataclass(frozen=True)
class Part:
    """One part of the pretraining model.

    Attributes:
        name: e.g. "encoder: blocks".
        parameters: Number of them.
        trainable: How many of them get a gradient.
        flops: FLOPs of forward and backward for one image.
    """

    name: str
    parameters: int
    trainable: int
    flops: float = 0.0

    @property
    def kind(self) -> str:
        """Kind of this part, one of ``KINDS``."""
        owner, _, what = self.name.rpartition(": ")
        return {"encoder": "student", "teacher": "teacher"}.get(owner, "decoders" if what == "decoders" else "heads")


@dataclass(frozen=True)
class Cost:
    """Cost of one training step on one device that holds everything: no engine, nothing sharded.

    Attributes:
        batch: Images on the device.
        parts: Parameters and FLOPs by part; the FLOPs that belong to no module are in the part "loss".
        trained_layers, frozen_layers: Parameters of each layer of student and teacher that engines wrap on its own.
        trained_calls, frozen_calls: Forward passes through each of them: further views take more than one.
        root: (rows, numbers in a row, whether it is trained) of each parameter outside of these layers.
        buffers: Elements in buffers.
        activation_bytes: Bytes of distinct storages that the forward pass keeps for the backward pass.
        moments: What is held beside weights, optimizer state and views, in the order of the step.
        exchanged_bytes: What the objectives send to other processes, per process: gathered batches, centers.
        view_bytes: Bytes of the views themselves, with reconstruction targets.
        logs: Names of the logged loss parts.
    """

    batch: int
    parts: tuple[Part, ...]
    trained_layers: tuple[int, ...]
    frozen_layers: tuple[int, ...]
    trained_calls: tuple[int, ...]
    frozen_calls: tuple[int, ...]
    root: tuple[tuple[int, int, bool], ...]
    buffers: int
    activation_bytes: int
    moments: tuple[Moment, ...]
    exchanged_bytes: int
    view_bytes: int
    logs: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole pretraining model."""
        return sum(part.parameters for part in self.parts)

    @property
    def trainable(self) -> int:
        """Number of parameters that get a gradient."""
        return sum(part.trainable for part in self.parts)

    @property
    def flops(self) -> float:
        """FLOPs of forward and backward for one image; of the teacher, those of the forward pass."""
        return sum(part.flops for part in self.parts)


def parts_of(model: EquiSSLForPreTraining) -> dict[str, str]:
    """Map prefixes of parameter names to the name of the part, most specific first."""
    parts = {
        "student.embeddings": "encoder: embeddings",
        "student.stem": "encoder: stem",
        "student": "encoder: blocks",
        "teacher": "teacher: encoder",
        **{name: "teacher: heads" for name in _followers(model) if name != "teacher"},
        "invariance": f"{model.config.invariance['name']}: heads",
    }
    for index, name in enumerate(model.equivariance_names):
        parts[f"equivariance.{index}.decoder"] = f"{name}: decoders"
        parts[f"equivariance.{index}"] = f"{name}: heads"
    return {**parts, "": "loss"}


def build_without_weights(config: EquiSSLPreTrainingConfig) -> tuple[FakeTensorMode, EquiSSLForPreTraining]:
    """Build the pretraining model with parameters that take no memory, and the mode in which it can run."""
    with torch.device("meta"), no_init_weights():
        model = EquiSSLForPreTraining(config).train()
    mode = FakeTensorMode()
    with mode:  # only now: a copy of a fake tensor, such as a teacher's, would belong to a mode of its own
        return mode, model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


def checkpoint_bytes(config: EquiSSLPreTrainingConfig, args: EquiSSLTrainingArguments) -> int:
    """Count the bytes of one checkpoint: weights, and the optimizer's state of the trainable ones."""
    _, model = build_without_weights(config)
    weights = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return FP32_BYTES * weights + optimizer_memory(args).state_bytes(FP32_BYTES * trainable)


def smallest_batch(config: EquiSSLPreTrainingConfig, processes: int, most: int) -> int:
    """Find the fewest images per device that the objectives accept on so many processes; at most ``most``."""
    _, model = build_without_weights(config)
    for images in range(1, most):
        try:
            model.check_batch(images, processes)
        except ValueError:
            continue
        return images
    return most


def batch_multiple(config: EquiSSLPreTrainingConfig) -> int:
    """Find the number of which the objectives accept multiples alone, as images per device."""
    _, model = build_without_weights(config)
    # Of those whose views are kept, too: ``check_batch`` asks them.
    return math.lcm(*(objective.batch_multiple for objective in (*model.objectives(), *model.build_kept())))


def check_step(config: EquiSSLPreTrainingConfig, views: Views, processes: int = 1) -> None:
    """Run the forward pass of one step on fake tensors, which takes a fraction of ``measure``'s time.

    Args:
        config: What is trained.
        views: Those of one batch; only their shapes and types are used.
        processes: Number of processes whose batches the objectives see.

    Raises:
        ValueError: Shapes do not fit, in the model's words.
    """
    mode, model = build_without_weights(config)
    with as_one_of(processes), mode:
        model(views=views.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)))


def measure(
    config: EquiSSLPreTrainingConfig,
    views: Views,
    args: EquiSSLTrainingArguments,
    batch: int | None = None,
    processes: int = 1,
) -> Cost:
    """Run one step on fake tensors and count what it costs.

    Args:
        config: What is trained.
        views: Those of one batch; only their shapes and types are used.
        args: Precision and activation checkpointing.
        batch: Images that ``views`` were made of; ``None``: as many as they have.
        processes: Number of processes whose batches the objectives see.
    """
    batch = batch or views.batch_size
    mode, model = build_without_weights(config)
    freeze_parameters(model, args)
    if args.activation_checkpointing:
        given = args.activation_checkpointing_kwargs
        kwargs = dict(given) if isinstance(given, dict) else {}
        every = kwargs.pop("every_n_layers", 1)
        kwargs.pop("offload", None)  # changes where activations lie, not how many
        model.activation_checkpointing_enable(kwargs or None, every_n_layers=every)
    blocks = EquiSSLForPreTraining._no_split_modules
    layers = [module for module in model.modules() if type(module).__name__ in blocks]
    trained = [layer for layer in layers if next(layer.parameters()).requires_grad]
    frozen = [layer for layer in layers if not next(layer.parameters()).requires_grad]
    wrapped = {id(parameter) for layer in layers for parameter in layer.parameters()}
    calls: Counter[nn.Module] = Counter()
    counting = [layer.register_forward_pre_hook(lambda layer, _: calls.update([layer])) for layer in layers]
    forward, backward, exchanged = FlopCounter(), FlopCounter(by_module=False), Exchanged()
    observers: list[Observer] = [exchanged, forward]
    live = StepMemory(model.parameters(), lambda parameter: id(parameter) in wrapped, observers)
    live.watch_gradients(model)
    if model.teacher is not None:
        model.teacher.register_forward_pre_hook(lambda *_: live.begin("teacher"))
        model.teacher.register_forward_hook(lambda *_: live.begin("forward"))
    with as_one_of(processes), mode:
        fake = views.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        kept = KeptStorages(own=(*model.parameters(), *model.buffers(), *_tensors(fake)))
        with forward, live, kept, _autocast(args):
            output = model(views=fake)
        for handle in counting:  # computing a layer again in the backward pass is no further use of its weights
            handle.remove()
        live.begin("backward")
        observers[1] = backward
        with backward, live:
            output.loss.backward()
        live.begin("")
    flops = flops_by_module(model, forward.get_flop_counts(), backward.get_flop_counts(), _followers(model))
    return Cost(
        batch=batch,
        parts=_parts(model, {name: value / batch for name, value in flops.items()}),
        trained_layers=_sizes(trained),
        frozen_layers=_sizes(frozen),
        trained_calls=tuple(calls[layer] for layer in trained),
        frozen_calls=tuple(calls[layer] for layer in frozen),
        root=tuple(_rows(parameter) for parameter in model.parameters() if id(parameter) not in wrapped),
        buffers=sum(buffer.numel() for buffer in model.buffers()),
        activation_bytes=kept.total,
        moments=tuple(live.moments),
        exchanged_bytes=exchanged.total,
        view_bytes=_storage_bytes(_tensors(views)),
        logs=tuple(output.logs),
    )


def _sizes(layers: list[nn.Module]) -> tuple[int, ...]:
    """Count the parameters of each layer."""
    return tuple(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)


def _rows(parameter: nn.Parameter) -> tuple[int, int, bool]:
    """Return a parameter's rows, the numbers in a row, and whether it is trained."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return rows, parameter.numel() // rows, parameter.requires_grad


def _followers(model: EquiSSLForPreTraining) -> list[str]:
    """List the names of the modules that follow others by moving average."""
    followers = {id(follower) for _, follower in model.ema_pairs()}
    return [name for name, module in model.named_modules() if id(module) in followers]


def _parts(model: EquiSSLForPreTraining, flops: dict[str, float]) -> tuple[Part, ...]:
    prefixes = parts_of(model)
    parts = {label: Part(label, 0, 0) for label in prefixes.values()}

    def add(name: str, parameters: int = 0, trainable: int = 0, flops: float = 0.0) -> None:
        label = next(text for prefix, text in prefixes.items() if not prefix or f"{name}.".startswith(f"{prefix}."))
        old = parts[label]
        parts[label] = Part(label, old.parameters + parameters, old.trainable + trainable, old.flops + flops)

    for name, parameter in model.named_parameters():
        add(name, parameter.numel(), parameter.numel() * parameter.requires_grad)
    for name, value in flops.items():
        add(name, flops=value)
    # Trained parts come first, then the teacher, then the loss.
    shown = sorted(parts.values(), key=lambda part: (part.name == "loss", part.kind == "teacher"))
    return tuple(part for part in shown if part.parameters or part.flops)


def _autocast(args: EquiSSLTrainingArguments) -> AbstractContextManager[Any]:
    if not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16 if args.bf16 else torch.float16)


def _storage_bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _tensors(views: Views) -> list[Tensor]:
    found: list[Tensor] = []
    views.map(found.append)
    return found
