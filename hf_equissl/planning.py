"""What a run will cost, found without weights in memory: parameters, FLOPs, memory, steps.

The model is built and run once on fake tensors, which have shapes and types but no storage. So every number follows the
code that trains, and a large model at a large batch takes seconds on any machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.initialization import no_init_weights

from .pretraining import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from .training_arguments import EquiSSLTrainingArguments
from .views.base import Views

# Where the batch dimension stands in each part of Views; parts that are absent here have it first.
_BATCH_DIMENSION = {"global_crops": 1, "local_crops": 1, "masks": 1, "crop_boxes": 1, "photometric": 1}
ADAM_STATES = 2  # first and second moment
FP32_BYTES = 4
_READS_PIXELS = "student.embeddings"  # the layer whose input needs no gradient


@dataclass(frozen=True)
class Part:
    """One part of the pretraining model.

    Attributes:
        name: e.g. "encoder: blocks".
        parameters: Number of them.
        trainable: How many of them get a gradient.
        flops: Forward and backward for one image.
    """

    name: str
    parameters: int
    trainable: int
    flops: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Cost of one training step on one device.

    Attributes:
        parts: Parameters and FLOPs by part; the FLOPs that belong to no module are in the part "loss".
        buffers: Elements in buffers.
        activation_bytes: Distinct storages that the forward pass keeps for the backward pass.
        view_bytes: The views themselves, with reconstruction targets.
        logs: Names of the logged loss parts.
    """

    parts: tuple[Part, ...]
    buffers: int
    activation_bytes: int
    view_bytes: int
    logs: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Parameters of the whole pretraining model."""
        return sum(part.parameters for part in self.parts)

    @property
    def trainable(self) -> int:
        """Those of them that get a gradient."""
        return sum(part.trainable for part in self.parts)

    @property
    def flops(self) -> float:
        """Forward and backward for one image."""
        return sum(part.flops for part in self.parts)

    def memory(self, distributed: bool) -> dict[str, int]:
        """Bytes on one device by kind. Leaves out what the allocator, kernels and the device context take."""
        return {
            "weights, fp32": FP32_BYTES * (self.parameters + self.buffers),
            "gradients": FP32_BYTES * self.trainable,
            "optimizer state (AdamW)": ADAM_STATES * FP32_BYTES * self.trainable,
            **({"gradient buckets (DDP)": FP32_BYTES * self.trainable} if distributed else {}),
            "views and targets": self.view_bytes,
            "activations": self.activation_bytes,
        }


@dataclass(frozen=True)
class Schedule:
    """Batch, learning rate and steps of a run, and the arithmetic behind them.

    Attributes:
        per_device, processes, accumulation: Their product is the global batch.
        images: Images in the data set, ``None`` where that is not known.
        steps: Optimizer steps, ``None`` where they follow from an unknown number of images.
        steps_per_epoch: Optimizer steps per pass over the images.
        epochs: Passes over the images.
        learning_rate: Peak value.
        warmup_steps: Steps of linear warm-up.
    """

    per_device: int
    processes: int
    accumulation: int
    images: int | None
    steps: int | None
    steps_per_epoch: int | None
    epochs: float | None
    learning_rate: float
    warmup_steps: int | None

    @property
    def batch(self) -> int:
        """Images per optimizer step."""
        return self.per_device * self.processes * self.accumulation


def parts_of(config: EquiSSLPreTrainingConfig) -> dict[str, str]:
    """Prefixes of parameter names -> name of the part, most specific first."""
    active = [entry["name"] for entry in config.equivariance if entry.get("weight", 1.0) > 0]
    equivariance = {}
    for index, name in enumerate(active):
        equivariance[f"equivariance.{index}.decoder"] = f"{name}: decoders"
        equivariance[f"equivariance.{index}"] = f"{name}: heads"
    return {
        "student.embeddings": "encoder: embeddings",
        "student.stem": "encoder: stem",
        "student": "encoder: blocks",
        "invariance": f"{config.invariance['name']}: heads",
        **equivariance,
        "teacher": "teacher",
        "": "loss",
    }


def without_weights(config: EquiSSLPreTrainingConfig) -> tuple[FakeTensorMode, EquiSSLForPreTraining]:
    """The pretraining model with parameters that have a shape and no memory, and the mode in which it can run."""
    mode = FakeTensorMode()
    with mode, no_init_weights():
        return mode, EquiSSLForPreTraining(config).train()


def checkpoint_bytes(config: EquiSSLPreTrainingConfig) -> int:
    """Size of one checkpoint: weights, and AdamW's two moments of the trainable ones."""
    _, model = without_weights(config)
    weights = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return FP32_BYTES * (weights + ADAM_STATES * trainable)


def measure(config: EquiSSLPreTrainingConfig, views: Views, args: EquiSSLTrainingArguments) -> Cost:
    """Run one step on fake tensors and count.

    Args:
        config: What is trained.
        views: Views of a few real images; only their shapes and types are used, at the batch size of ``args``.
        args: Batch per device, precision and activation checkpointing.
    """
    mode, model = without_weights(config)
    if args.activation_checkpointing:
        given = args.activation_checkpointing_kwargs
        kwargs = dict(given) if isinstance(given, dict) else {}
        every = kwargs.pop("every_n_layers", 1)
        kwargs.pop("offload", None)  # changes where activations lie, not how many
        model.activation_checkpointing_enable(kwargs or None, every_n_layers=every)
    size = args.per_device_train_batch_size
    forward, backward = (FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) for _ in range(2))
    with mode:
        fake = batch_of(views, size)
        kept = _KeptStorages(own=(*model.parameters(), *model.buffers(), *_tensors(fake)))
        with forward, kept, _autocast(args):
            output = model(views=fake)
        with backward:
            output.loss.backward()
    flops = _flops_by_module(model, forward.get_flop_counts(), backward.get_flop_counts())
    return Cost(
        parts=_parts(model, config, {name: value / size for name, value in flops.items()}),
        buffers=sum(buffer.numel() for buffer in model.buffers()),
        activation_bytes=kept.total,
        view_bytes=_storage_bytes(_tensors(views)) * size // views.batch_size,
        logs=tuple(output.logs),
    )


def batch_of(views: Views, size: int) -> Views:
    """Empty views with the shapes and types of ``views`` for ``size`` images, on the current default device or mode."""
    factor = Fraction(size, views.batch_size)

    def empty(tensor: Tensor, dim: int) -> Tensor:
        shape = [int(length * factor) if index == dim else length for index, length in enumerate(tensor.shape)]
        return torch.empty(shape, dtype=tensor.dtype)

    return _map_tensors(views, empty)


def schedule(args: EquiSSLTrainingArguments, processes: int, images: int | None) -> Schedule:
    """Batch, learning-rate and step arithmetic for a launch of ``processes`` processes."""
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    per_epoch = None
    if images is not None:
        batches = images // (per_device * processes)
        if not args.dataloader_drop_last:
            batches = math.ceil(images / (per_device * processes))
        per_epoch = math.ceil(batches / accumulation)
    steps = args.max_steps if args.max_steps > 0 else None
    if steps is None and per_epoch is not None:
        steps = math.ceil(args.num_train_epochs * per_epoch)
    exponent = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[args.learning_rate_scaling]
    grown = per_device * processes * accumulation / args.global_batch_size  # against the processes that args know
    known = args.base_learning_rate is not None
    return Schedule(
        per_device=per_device,
        processes=processes,
        accumulation=accumulation,
        images=images,
        steps=steps,
        steps_per_epoch=per_epoch,
        epochs=steps / per_epoch if steps and per_epoch else None,
        learning_rate=args.learning_rate * (grown**exponent if known else 1.0),
        warmup_steps=args.get_warmup_steps(steps) if steps else None,
    )


class _KeptStorages(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of distinct storages that autograd keeps, without those of ``own``."""

    def __init__(self, own: tuple[Tensor, ...]) -> None:
        self._sizes: dict[int, int] = {}
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self._sizes.values())


def _parts(model: nn.Module, config: EquiSSLPreTrainingConfig, flops: dict[str, float]) -> tuple[Part, ...]:
    prefixes = parts_of(config)
    parts = {label: Part(label, 0, 0) for label in prefixes.values()}

    def add(name: str, parameters: int = 0, trainable: int = 0, flops: float = 0.0) -> None:
        label = next(text for prefix, text in prefixes.items() if not prefix or f"{name}.".startswith(f"{prefix}."))
        old = parts[label]
        parts[label] = Part(label, old.parameters + parameters, old.trainable + trainable, old.flops + flops)

    for name, parameter in model.named_parameters():
        add(name, parameter.numel(), parameter.numel() * parameter.requires_grad)
    for name, value in flops.items():
        add(name, flops=value)
    return tuple(part for part in parts.values() if part.parameters or part.flops)


_Counts = dict[str, dict[Any, int]]


def _flops_by_module(model: nn.Module, forward: _Counts, backward: _Counts) -> dict[str, float]:
    """Forward and backward FLOPs by module name; "" has those that happen outside of layers.

    The counter knows for certain in which module a forward operation happens, but in the backward pass it follows
    tensors, and counts operations of neighbours where several modules read the same one. So the backward pass, of which
    the total is certain, is divided as the forward pass is: a layer costs twice its forward pass, or as much as that
    where its input needs no gradient.
    """
    own = _own_forward(model, forward)
    unassigned = Counter(_by_kind(forward["Global"]))
    for counts in own.values():
        unassigned.subtract(counts)
    own[""] = dict(unassigned)
    result = {name: float(sum(counts.values())) for name, counts in own.items()}
    for kind, total in _by_kind(backward.get("Global", {})).items():
        shares = {n: counts.get(kind, 0) * (1 if n.startswith(_READS_PIXELS) else 2) for n, counts in own.items()}
        whole = sum(shares.values())
        for name, share in shares.items() if whole else [("", 1)]:
            result[name] += total * share / (whole or 1)
    return result


def _own_forward(model: nn.Module, counts: _Counts) -> dict[str, dict[str, int]]:
    """FLOPs by kind of modules that own a weight matrix or kernel, and of attention in the module that calls it."""
    root = type(model).__name__

    def of(name: str) -> dict[str, int]:
        return _by_kind(counts.get(f"{root}.{name}", {}))

    calling = [name for name, _ in model.named_modules() if name and "attention" in of(name)]
    result = {}
    for name, module in model.named_modules():
        layer = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        if layer and next(module.children(), None) is None:
            result[name] = of(name)
        elif name in calling and not any(other.startswith(f"{name}.") for other in calling):
            result[name] = {"attention": of(name)["attention"]}
    return result


def _by_kind(counts: dict[Any, int]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for op, count in counts.items():
        kinds[next((kind for kind in ("attention", "convolution") if kind in str(op)), "product")] += count
    return dict(kinds)


def _attention_forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def _autocast(args: EquiSSLTrainingArguments) -> AbstractContextManager[Any]:
    if not (args.bf16 or args.fp16):
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16 if args.bf16 else torch.float16)


def _map_tensors(views: Views, function: Callable[[Tensor, int], Tensor]) -> Views:
    def convert(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(name, item) for key, item in value.items()}
        return function(value, _BATCH_DIMENSION.get(name, 0)) if isinstance(value, Tensor) else value

    return Views(**{item.name: convert(item.name, getattr(views, item.name)) for item in fields(views)})


def _storage_bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _tensors(views: Views) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(views, lambda tensor, _: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found
