"""What a step holds in memory and when: the storages that operations make, until the last reference to them is gone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CAST, _DEVICE = torch.ops.aten._to_copy.default, torch.ops.prim.device.default
Observer: TypeAlias = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True)
class Moment:
    """Bytes that are held at one moment of a step, beside weights, optimizer state and views.

    Attributes:
        phase: "teacher" (its encoder runs), "forward" or "backward".
        layer_gradients: Gradients of the parameters that belong to a wrapped layer.
        root_gradients: Gradients of all others.
        casts: Copies of weights in the precision of autocast, which keeps them until backward has used them.
        other: What the forward pass keeps for the backward pass, and temporary tensors.
    """

    phase: str
    layer_gradients: int
    root_gradients: int
    casts: int
    other: int


class StepMemory(TorchDispatchMode):
    """Follows storages while operations run, on fake or real tensors.

    Args:
        weights: Parameters; copies of them in another precision count as casts.
        is_in_layer: Whether a parameter belongs to a layer that is wrapped by itself.
        observers: Called as ``observer(func, result, args, kwargs)`` after each operation. One mode that asks all of
            them costs half of what a mode for each does, and on fake tensors that is most of the time.

    Attributes:
        peak: The most bytes at any time.
        moments: The fullest moment of each phase; of the backward pass the fullest one between any two gradients.
    """

    def __init__(
        self,
        weights: Iterable[Tensor] = (),
        is_in_layer: Callable[[Tensor], bool] = lambda weight: False,
        observers: Sequence[Observer] = (),
    ) -> None:
        super().__init__()
        self._observers = observers
        self.peak = self._now = 0
        self.moments: list[Moment] = []
        self._held: dict[int, str] = {}  # storage -> kind
        self._bytes = {"layer_gradients": 0, "root_gradients": 0, "casts": 0, "other": 0}
        self._weights = {id(weight.untyped_storage()) for weight in weights}
        self._is_in_layer = is_in_layer
        self._phase, self._fullest = "forward", dict(self._bytes)

    def begin(self, phase: str) -> None:
        """Close the running phase; what is held goes over into the next one."""
        if any(self._fullest.values()):
            self.moments.append(Moment(self._phase, **self._fullest))
        self._phase, self._fullest = phase, dict(self._bytes)

    def watch_gradients(self, model: nn.Module) -> None:
        """Count gradients of parameters apart from temporary tensors."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._got_gradient)

    def _got_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or self._held.get(key := id(gradient.untyped_storage())) != "other":
            return
        kind = "layer_gradients" if self._is_in_layer(parameter) else "root_gradients"
        size = gradient.untyped_storage().nbytes()
        self.begin(self._phase)
        self._held[key] = kind
        for book in (self._bytes, self._fullest):
            book["other"] -= size
            book[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:  # two of three calls: autograd asks where a tensor is, and fake ones know
            return getattr(args[0], "fake_device", None) or func(*args, **kwargs)
        if _is_composite(func):  # under inference mode these reach a mode whole
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        for observer in self._observers:
            observer(func, result, args, kwargs)
        given: set[int] | None = None
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if not isinstance(tensor, Tensor) or id(storage := tensor.untyped_storage()) in self._held:
                continue
            if given is None:
                leaves = tree_leaves((args, kwargs))
                given = {id(leaf.untyped_storage()) for leaf in leaves if isinstance(leaf, Tensor)}
            if id(storage) not in given:
                self._add(storage, "casts" if func is _CAST and given <= self._weights else "other")
        return result

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        size = storage.nbytes()
        self._held[id(storage)] = kind
        self._bytes[kind] += size
        self._now += size
        self.peak = max(self.peak, self._now)
        if self._passing(self._bytes) > self._passing(self._fullest):
            self._fullest = dict(self._bytes)
        weakref.finalize(storage, self._remove, id(storage), size)

    def _remove(self, key: int, size: int) -> None:
        self._bytes[self._held.pop(key)] -= size
        self._now -= size

    @staticmethod
    def _passing(book: dict[str, int]) -> int:
        return book["casts"] + book["other"]


@cache
def _is_composite(func: Any) -> bool:
    """Return whether an operation is nothing but a sequence of others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(func, OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


class KeptStorages(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of distinct storages that autograd keeps, without those of ``own``."""

    def __init__(self, own: Iterable[Tensor]) -> None:
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
        """Bytes of all storages that were kept."""
        return sum(self._sizes.values())
