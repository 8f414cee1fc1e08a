"""FSDP2 on CPUs, for tests: without this, accelerate quietly turns it into DDP where there is no accelerator."""

from __future__ import annotations

import functools
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType


def allow_fsdp2_on_cpu() -> None:
    """Let accelerate take its FSDP branch on gloo. Only a label changes; device and backend stay. Call it once."""
    original = state.AcceleratorState.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        shared = state.PartialState._shared_state
        if kwargs.get("fsdp_plugin") is not None and not state.AcceleratorState._shared_state:
            if not shared:
                state.PartialState(kwargs.get("cpu"))
            if shared.get("distributed_type") == DistributedType.MULTI_CPU:
                shared["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    state.AcceleratorState.__init__ = init  # type: ignore[method-assign]
