"""Gather and reduce with gradient, rank and world size: the one file that knows torch.distributed.

Every function is a no-op with one process, initialised or not, and works on any backend (gloo on CPU, NCCL on GPUs).

**Gradients.** Every process evaluates the same global term, and data-parallel wrappers average gradients over the W
processes. So a backward pass here *sums* what arrives on all processes: the sum is W times the gradient of the global
term, the averaging divides by W, and the result is what one process with the whole batch would have found. Passing
back only the local share, without the sum, would make the term W times too weak.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor

__all__ = [
    "SharedFlag",
    "all_reduce_sum",
    "end_process",
    "first_message",
    "gather",
    "gather_objects",
    "is_gathered",
    "is_main_process",
    "leave_to_main",
    "local_shard",
    "lost_a_process",
    "on_any_process",
    "rank",
    "reduce_mean",
    "speaks_for_all",
    "wait_for_shards",
    "world_size",
]

T = TypeVar("T")
_LEFT_TO_MAIN = itertools.count()
_SPEAKER, _ASKED = "hf_equissl/speaker", "hf_equissl/asked"
_asked: list[str] = []


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if _initialized() else 0


def world_size() -> int:
    """Number of processes W, 1 without a process group."""
    return dist.get_world_size() if _initialized() else 1


def is_main_process() -> bool:
    """Whether this process is the one that logs and writes, rank 0."""
    return rank() == 0


def end_process(code: int) -> NoReturn:
    """Close the process group, if there is one, and end this process.

    One of several does not wait for the interpreter to be taken down: wrappers and DeepSpeed keep groups of their own,
    whose threads may ask for it meanwhile, and then the process aborts after all its work is done.
    """
    several = world_size() > 1
    if _initialized():
        dist.destroy_process_group()
    if several:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter, buffer or gradient: all of it, or its shard under FSDP2 or ZeRO-3."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)


def wait_for_shards(parameter: Tensor) -> None:
    """Behind writing to shards under ZeRO-3: DeepSpeed gathers them on a stream that waits for no other.

    Args:
        parameter: Any one of the model.
    """
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None and shard.device.type != "cpu":
        torch.accelerator.current_stream(shard.device).synchronize()


def is_gathered(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds a whole copy of ``parameter`` beside its shard at the moment."""
    return getattr(getattr(parameter, "ds_status", None), "name", None) == "AVAILABLE"


def gather(x: Tensor) -> Tensor:
    """Concatenate ``x`` of all processes along the first dimension, with gradient.

    Args:
        x: (B, ...), the same shape and dtype on every process. Shapes are not compared, which would cost one more
            exchange per call; unequal ones hang or fail inside the backend. Data loaders must drop or pad the last
            batch.

    Returns:
        (W * B, ...), ordered by rank. The backward pass sums the incoming gradients over the processes and keeps
        the own slice.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum ``x`` (any shape, the same on every process) over the processes, with gradient.

    The backward pass sums the incoming gradients over the processes.
    """
    return x if world_size() == 1 else _AllReduceSum.apply(x)


def leave_to_main(work: Callable[[], T]) -> T | None:
    """What ``work`` returns on the main process, ``None`` on the others, which wait for it, however long it takes.

    A barrier of the process group would end them after its timeout; an upload may take longer. All processes have to
    call it, in the same order.
    """
    if world_size() == 1:
        return work()
    store, key = _get_default_store(), f"hf_equissl/left_to_main/{next(_LEFT_TO_MAIN)}"
    if is_main_process():
        try:
            return work()
        finally:
            store.set(key, "over")
    while not store.check([key]):  # not store.wait, which no signal interrupts
        time.sleep(0.2)
    return None


@torch.no_grad()
def reduce_mean(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean over the processes of named scalars, in one exchange and without gradient.

    Args:
        scalars: Name -> scalar tensor; the same names on every process.

    Returns:
        The same names with fp32 means, detached.
    """
    if not scalars:
        return {}
    names = sorted(scalars)  # processes may have filled their dictionaries in another order
    values = torch.stack([scalars[name].detach().float() for name in names])
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    means = dict(zip(names, values.unbind(), strict=True))
    return {name: means[name] for name in scalars}


@torch.no_grad()
def on_any_process(flag: Tensor) -> bool:
    """Whether a scalar ``flag`` is set on at least one process; all get the same answer. Waits for the device."""
    if world_size() == 1:
        return bool(flag)
    value = flag.detach().float()
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def first_message(message: str | None) -> str | None:
    """The message of the lowest rank that has one, on all processes; ``None`` if none has. All have to call it."""
    return next((text for text in gather_objects(message) if text is not None), None)


def gather_objects(value: Any) -> list[Any]:
    """What each process gave, by rank, on all of them. For small things: they are pickled. All have to call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def lost_a_process(error: BaseException) -> bool:
    """Whether ``error`` is what torch.distributed says when another process has ended or cannot be reached."""
    text = str(error)
    spoken_by_backend = isinstance(error, dist.DistError) or "/gloo/" in text or "ProcessGroup" in text
    return isinstance(error, RuntimeError) and world_size() > 1 and spoken_by_backend


def speaks_for_all(patience: float = 5.0) -> bool:
    """Whether this process is the first that asked, and says for all what stopped them.

    True, too, where nobody can be asked: with one process, or where the one that keeps the rendezvous store is gone or
    does not answer in ``patience`` seconds.
    """
    if world_size() == 1:
        return True
    own = str(rank())
    answers: list[bool] = []

    def ask() -> None:
        with suppress(RuntimeError):
            store = _get_default_store()
            speaker = store.compare_set(_SPEAKER, "", own).decode()
            if not _asked:
                _asked.append(own)
                store.add(_ASKED, 1)
            answers.append(speaker == own)

    # The store is asked without a limit of time, and a process that was stopped never answers.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience)
    return answers[0] if answers else True


def answer_others(seconds: float) -> None:
    """On the process that may keep the store: stay until all have asked who speaks, at most ``seconds``."""
    if world_size() == 1 or rank() != 0:
        return
    end = time.monotonic() + seconds
    with suppress(RuntimeError):
        store = _get_default_store()
        while store.add(_ASKED, 0) < world_size() and time.monotonic() < end:
            time.sleep(0.05)


class SharedFlag:
    """A flag that any process may raise, and that all of them see raised at the same step.

    The flags of a step are exchanged between hosts, over gloo, while the next one computes: no device is waited for,
    and hosts wait only for the others to have come one step less far. All processes have to make the same calls.

    Args:
        timeout: Seconds after which a process that does not answer is an error.
    """

    def __init__(self, timeout: float) -> None:
        several = world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        self._pending: tuple[Any, Tensor] | None = None

    def in_step(self, raised: bool) -> bool:
        """Once per step: whether a process had raised it in the step before; with one process, whether it has."""
        if self._group is None:
            return raised
        earlier = self._wait()
        self._send(raised)
        return earlier

    def now(self, raised: bool) -> bool:
        """Whether a process has raised it by now. Waits for the other hosts."""
        if self._group is None:
            return raised
        earlier = self._wait()
        self._send(raised)
        return self._wait() or earlier

    def _send(self, raised: bool) -> None:
        value = torch.tensor([float(raised)])
        self._pending = dist.all_reduce(value, group=self._group, async_op=True), value

    def _wait(self) -> bool:
        if self._pending is None:
            return False
        work, value = self._pending
        self._pending = None
        work.wait()
        return bool(value)


class _Gather(torch.autograd.Function):
    """Forward: all-gather. Backward: sum over processes, own slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        gathered = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rows = gradient.shape[0] // world_size()
        if gradient.is_cuda:  # sends each process its own slice only
            own = gradient.new_empty((rows, *gradient.shape[1:]))
            dist.reduce_scatter_tensor(own, gradient.contiguous())
            return own
        total = gradient.clone(memory_format=torch.contiguous_format)  # the incoming gradient may be shared
        dist.all_reduce(total)
        return total[rank() * rows : (rank() + 1) * rows]


class _AllReduceSum(torch.autograd.Function):
    """Forward and backward: sum over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
