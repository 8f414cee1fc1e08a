"""Engines on CPUs, for tests.

Without this, accelerate quietly turns FSDP2 into DDP where there is no accelerator, and DeepSpeed compiles an operation
of its own for CPUs that share memory.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType


def allow_engines_on_cpu() -> None:
    """Prepare a process that is about to train under an engine. Call it once."""
    _allow_fsdp2()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        _leave_collectives_to_gloo()


def _leave_collectives_to_gloo() -> None:
    """Let DeepSpeed reduce through torch, as on GPUs: to compile its operation takes a minute of processor time."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _allow_fsdp2() -> None:
    """Let accelerate take its FSDP branch on gloo. Only a label changes; device and backend stay."""
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
