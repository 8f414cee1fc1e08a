"""Gather and reduce with gradient, rank and world size: what losses and the Trainer exchange.

With one process, initialised or not, nothing is exchanged. All of it works on any backend (gloo on CPU, NCCL on GPUs).

**Gradients.** Every process evaluates the same global term, and data-parallel wrappers average gradients over the W
processes. So a backward pass here *sums* what arrives on all processes: the sum is W times the gradient of the global
term, the averaging divides by W, and the result is what one process with the whole batch would have found. Passing
back only the local share, without the sum, would make the term W times too weak.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = [
    "all_reduce_sum",
    "gather",
    "gather_rows",
    "is_gathered",
    "is_main_process",
    "local_shard",
    "on_any_process",
    "rank",
    "reduce_mean",
    "wait_for_shards",
    "world_size",
]

T = TypeVar("T")


def _is_initialized() -> bool:
    """Return whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the index of this process, 0 without a process group."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Return the number of processes W, 1 without a process group."""
    return dist.get_world_size() if _is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this process is the one that logs and writes, rank 0."""
    return rank() == 0


def local_shard(tensor: Tensor) -> Tensor:
    """Return what this process holds of a parameter, buffer or gradient: all of it, or its shard (FSDP2, ZeRO-3)."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)


def wait_for_shards(parameter: Tensor) -> None:
    """Wait until shards that were written under ZeRO-3 can be read: DeepSpeed gathers them on a stream of its own.

    Args:
        parameter: Any parameter of the model.
    """
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None and shard.device.type != "cpu":
        torch.accelerator.current_stream(shard.device).synchronize()


def is_gathered(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 holds a whole copy of ``parameter`` beside its shard at the moment."""
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


def gather_rows(x: Tensor, most_rows: int) -> tuple[Tensor, Tensor]:
    """Concatenate ``x`` of all processes along the first dimension where they have different numbers of rows.

    Rows are filled up with zeros before the exchange: all processes know the shape without telling each other lengths,
    which would make the host wait for the device.

    Args:
        x: (n, ...), n <= ``most_rows``; the other dimensions and the dtype are the same on every process.
        most_rows: The largest n that a process may have, the same on every process.

    Returns:
        (M, ...), ordered by rank, with gradient as in ``gather``, and (M,) bool, whether a row is one of some process.
        M = W * ``most_rows``; with one process there is nothing to fill up, and M = n.

    Raises:
        ValueError: ``x`` has more rows than that.
    """
    if len(x) > most_rows:
        raise ValueError(f"gather_rows was told of at most {most_rows} rows per process, got {len(x)}.")
    if world_size() == 1:
        return x, torch.ones(len(x), dtype=torch.bool, device=x.device)
    rows = x.flatten(1) if x.ndim > 1 else x[:, None]
    rows = torch.cat([rows, rows.new_ones(len(x), 1)], dim=1)  # the last column tells rows from filling
    rows = torch.cat([rows, rows.new_zeros(most_rows - len(x), rows.shape[1])])
    gathered = gather(rows)
    return gathered[:, :-1].unflatten(1, x.shape[1:]) if x.ndim > 1 else gathered[:, 0], gathered[:, -1].detach() > 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum ``x`` (any shape, the same on every process) over the processes, with gradient.

    The backward pass sums the incoming gradients over the processes.
    """
    return x if world_size() == 1 else _AllReduceSum.apply(x)


@torch.no_grad()
def reduce_mean(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average named scalars over the processes, in one exchange and without gradient.

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
    """Return whether a scalar ``flag`` is set on any process; all get the same answer. Waits for the device."""
    if world_size() == 1:
        return bool(flag)
    value = flag.detach().float()
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
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
