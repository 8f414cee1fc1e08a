"""Run a step as one of N processes without the others: collectives do nothing, and their bytes are counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves


@contextmanager
def as_one_of(processes: int) -> Iterator[None]:
    """Make ``world_size()`` return ``processes``, with PyTorch's own fake process group.

    Where this process is one of several already, all of them have to call it, and their number stays.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        with _without_exchange():
            yield
    elif processes == 1:
        yield
    else:
        dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _without_exchange() -> Iterator[None]:
    """Let a group that exchanges nothing stand in for the real one: tensors without memory cannot be sent."""
    real = dist.group.WORLD
    dist.distributed_c10d._update_default_pg(dist.new_group(backend="fake"))
    try:
        yield
    finally:
        dist.distributed_c10d._update_default_pg(real)


class Exchanged:
    """Counts the bytes that collectives make a process send over a ring: (N - 1)/N of a gathered or scattered tensor,
    twice that of a reduced one.

    Attributes:
        total: Bytes so far.
    """

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at an operation: an observer of ``StepMemory``."""
        if func.namespace == "c10d" and dist.get_world_size() > 1:
            largest = max((t.untyped_storage().nbytes() for t in tree_leaves(args) if isinstance(t, Tensor)), default=0)
            share = 1 - 1 / dist.get_world_size()
            self.total += int(largest * share * (2 if "allreduce" in func.name() else 1))
