"""Floating-point operations of a step by module, by the formulas of torch's FlopCounterMode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, Self, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_Counts = dict[str, dict[Any, int]]
_READS_PIXELS = "student.embeddings"  # the layer whose input needs no gradient


class FlopCounter(FlopCounterMode):
    """Counts as torch's counter does, also the attention kernels of CPUs, from what an observer is told.

    Args:
        by_module: Whether to count by module; otherwise there is only the total, "Global", and no hook. Hooks keep the
            tensors that pass modules: in a backward pass that computes layers again, their activations would live
            until the counter ends.
    """

    def __init__(self, by_module: bool = True) -> None:
        super().__init__(display=False, custom_mapping=CPU_ATTENTION)
        if not by_module:
            self.mod_tracker = cast(Any, _NoTracker())

    def __enter__(self) -> Self:
        self.flop_counts.clear()
        self.mod_tracker.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.mod_tracker.__exit__(*exception)

    def __call__(self, func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count an operation: an observer of ``StepMemory``."""
        if (kind := getattr(func, "_overloadpacket", None)) in self.flop_registry:
            self._count_flops(kind, result, args, kwargs)


def flops_by_module(
    model: nn.Module, forward: _Counts, backward: _Counts, followers: Collection[str] = ()
) -> dict[str, float]:
    """Divide forward and backward FLOPs by module name; "" has those that happen outside of layers.

    The counter knows for certain in which module a forward operation happens, but in the backward pass it follows
    tensors, and counts operations of neighbours where several modules read the same one. So the backward pass, of which
    the total is certain, is divided as the forward pass is: a layer costs twice its forward pass, or as much as that
    where its input needs no gradient.

    Args:
        model: The model that ran.
        forward, backward: ``FlopCounterMode.get_flop_counts()`` of either pass.
        followers: Names of modules that follow others by moving average: they have no backward pass.
    """
    passive = tuple(f"{name}." for name in followers)
    own = _own_forward(model, forward)
    unassigned = Counter(_sum_by_kind(forward["Global"]))
    for counts in own.values():
        unassigned.subtract(counts)
    own[""] = dict(unassigned)
    result = {name: float(sum(counts.values())) for name, counts in own.items()}
    for kind, total in _sum_by_kind(backward.get("Global", {})).items():
        shares = {
            name: counts.get(kind, 0) * (1 if name.startswith(_READS_PIXELS) else 2)
            for name, counts in own.items()
            if not f"{name}.".startswith(passive)
        }
        whole = sum(shares.values())
        for name, share in shares.items() if whole else [("", 1)]:
            result[name] += total * share / (whole or 1)
    return result


def _own_forward(model: nn.Module, counts: _Counts) -> dict[str, dict[str, int]]:
    """Count FLOPs by kind of each module that owns a weight matrix or kernel; attention counts where it is called."""
    root = type(model).__name__

    def of(name: str) -> dict[str, int]:
        return _sum_by_kind(counts.get(f"{root}.{name}", {}))

    # A branch that drop path calls runs inside drop path, which has no parameters of its own.
    owners = [name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None]
    calling = [name for name in owners if "attention" in of(name)]
    result = {}
    for name, module in model.named_modules():
        layer = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        if layer and next(module.children(), None) is None:
            result[name] = of(name)
        elif name in calling and not any(other.startswith(f"{name}.") for other in calling):
            result[name] = {"attention": of(name)["attention"]}
    return result


def _sum_by_kind(counts: dict[Any, int]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for op, count in counts.items():
        kinds[next((kind for kind in ("attention", "convolution") if kind in str(op)), "product")] += count
    return dict(kinds)


class _NoTracker:
    """Replaces torch's tracker of modules where nothing is counted by module."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _attention_forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
