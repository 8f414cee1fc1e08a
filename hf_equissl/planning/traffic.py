"""Bytes that one device sends in a step under each engine, by formula, for rings: of a tensor of x bytes, a gather or a
scatter sends (N - 1)/N x, a reduction to all twice that. With P bytes of weights, T of them trained, all fp32:

| engine | forward | backward | after the step |
|---|---|---|---|
| DDP | | 2 T | |
| FSDP2 | root; each layer once per pass through it | student's layers once per pass; T reduced and scattered | |
| ZeRO-1, ZeRO-2 | | 2 T: buckets are reduced to all | T, the new weights |
| ZeRO-3 | P | T gathered again beyond the reuse distance, T scattered | |

Global and local crops pass the student one after the other: two passes. FSDP2's root stays gathered from the forward
to the backward pass: accelerate leaves its ``reshard_after_forward`` to PyTorch. ZeRO-3 gathers a layer for the second
pass where the student is larger than the reuse distance. Under ZeRO-1 and 2 DeepSpeed 0.19 reduces each bucket to all
processes (``use_multi_rank_bucket_allreduce``) although one needs it.

Where gradients are accumulated, DDP, FSDP2 and ZeRO-1 reduce in the last micro-batch, and weights are gathered for
each. FSDP2 then reduces a layer of two passes twice: what was accumulated, when the backward pass first leaves the
layer, and then the last micro-batch's gradients. What objectives exchange (gathered batches, centers) is counted as it
happens. Left out: scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..distributed.engines import Engine
from .memory import ZERO3_REUSE_DISTANCE, Setup, root_parameters
from .step import FP32_BYTES, Cost


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in one optimizer step.

    Attributes:
        weights: Weights that are gathered before their use or after their update.
        gradients: Gradients that are reduced.
        objectives: What losses and normalisation exchange.
        host: What goes to and from the host's memory, where something is offloaded.
    """

    weights: int
    gradients: int
    objectives: int
    host: int

    @property
    def network(self) -> int:
        """Bytes that travel between devices."""
        return self.weights + self.gradients + self.objectives


def traffic(cost: Cost, setup: Setup, accumulation: int = 1) -> Traffic:
    """Count what one device sends in a step."""
    engine, processes = setup.engine, setup.processes
    every, trained = FP32_BYTES * cost.parameters, FP32_BYTES * cost.trainable
    weights = gradients = 0
    if engine is Engine.DDP:
        gradients = 2 * trained
    elif engine is Engine.FSDP2:
        weights, gradients = (FP32_BYTES * count for count in _fsdp2(cost, processes, accumulation))
    elif engine is Engine.ZERO3:
        again = max(0, trained - FP32_BYTES * (ZERO3_REUSE_DISTANCE // 2))
        if (layers := sum(cost.trained_layers)) > ZERO3_REUSE_DISTANCE:  # gone before the next pass comes to them
            again += 2 * FP32_BYTES * (_count(cost.trained_layers, cost.trained_calls) - layers)
        weights, gradients = (every + again) * accumulation, trained * accumulation
    elif engine is not Engine.SINGLE:
        weights, gradients = trained, 2 * trained * (accumulation if engine is Engine.ZERO2 else 1)
    share = 1 - 1 / processes
    host = 0
    if setup.offload:
        # Weights up, gradients down. ZeRO-3 puts each micro-batch's gradients there, takes their sum back, and puts it
        # into the optimizer's buffer.
        down = trained * (2 * accumulation + 1) if engine is Engine.ZERO3 else trained
        host = (weights + (gradients if engine is Engine.FSDP2 else down)) // processes
    return Traffic(int(share * weights), int(share * gradients), cost.exchanged_bytes * accumulation, host)


def _fsdp2(cost: Cost, processes: int, accumulation: int) -> tuple[int, int]:
    """Count the elements that are gathered and those that are reduced in a step."""
    passed = _count(cost.frozen_layers, cost.frozen_calls) + 2 * _count(cost.trained_layers, cost.trained_calls)
    times = [min(calls, 2) if accumulation > 1 else 1 for calls in cost.trained_calls]
    reduced = root_parameters(cost, processes, trained=True) + _count(cost.trained_layers, times)
    return accumulation * (root_parameters(cost, processes) + passed), reduced


def _count(layers: Sequence[int], times: Sequence[int]) -> int:
    return sum(size * count for size, count in zip(layers, times, strict=True))
