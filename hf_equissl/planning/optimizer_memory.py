"""What an optimizer takes beside weights and gradients, found by one step of it on a small matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.lars import LARS
from ..pretraining.optimizer import choose_optimizer

SIDE = 256  # side of the matrix: Adafactor's statistics of rows and columns are next to nothing


@dataclass(frozen=True)
class OptimizerMemory:
    """What an optimizer takes; the defaults are those of AdamW, fused.

    Attributes:
        name: Name of its class.
        states: Bytes that it keeps for each byte of trained fp32 weights: AdamW's two moments, LARS's momentum.
        fused: Whether its step makes no temporary tensors as large as all gradients.
    """

    name: str = "AdamW"
    states: float = 2.0
    fused: bool = True

    def state_bytes(self, weights: int) -> int:
        """Count the bytes that it keeps for so many bytes of trained weights."""
        return round(self.states * weights)


ADAMW = OptimizerMemory()


def optimizer_memory(args: EquiSSLTrainingArguments) -> OptimizerMemory:
    """Find what the optimizer of a run takes. One that cannot run here is taken to keep as much as AdamW."""
    name = str(getattr(args.optim, "value", args.optim))
    weight = nn.Parameter(torch.ones(SIDE, SIDE))
    weight.grad = torch.ones_like(weight)
    try:
        kind, given = choose_optimizer(None, args)
        optimizer = kind([weight], **given)
        optimizer.step()
    except (ImportError, RuntimeError, TypeError, ValueError):  # another device's, or not installed: training says so
        return OptimizerMemory(name, fused="fused" in name)
    kept = [leaf for leaf in tree_leaves(optimizer.state[weight]) if isinstance(leaf, Tensor) and leaf.ndim]
    # LARS goes from tensor to tensor; others that are not fused do each operation for all of them at once.
    fused = "fused" in name or isinstance(optimizer, LARS)
    return OptimizerMemory(type(optimizer).__name__, sum(leaf.nbytes for leaf in kept) / weight.nbytes, fused)
