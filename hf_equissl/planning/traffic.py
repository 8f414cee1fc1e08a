"""Bytes that one device sends in a step under each engine, by formula, for rings: of a tensor of x bytes, a gather or a
scatter sends (N - 1)/N x, a reduction to all twice that. With P bytes of weights, T of them trained, all fp32:

| engine | forward | backward | after the step |
|---|---|---|---|
| DDP | | 2 T | |
| FSDP2 | P, the teacher's too | T gathered again, T reduced and scattered | |
| ZeRO-1, ZeRO-2 | | 2 T: buckets are reduced to all | T, the new weights |
| ZeRO-3 | P | T gathered again beyond the reuse distance, T scattered | |

Under ZeRO-1 and 2 DeepSpeed 0.19 reduces each bucket to all processes (``use_multi_rank_bucket_allreduce``) although
one needs it. Where gradients are accumulated, DDP and FSDP2 reduce once in a step, and weights are gathered for each
micro-batch. What objectives exchange (gathered batches, centers) is counted as it happens. Left out: scalars.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engines import Engine
from .memory import ZERO3_REUSE_DISTANCE, Setup
from .step import FP32_BYTES, Cost


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in one optimizer step.

    Attributes:
        weights: Gathered before they are used or after they were updated.
        gradients: Reduced.
        objectives: What losses and normalisation exchange.
        host: To and from the host's memory, where something is offloaded.
    """

    weights: int
    gradients: int
    objectives: int
    host: int

    @property
    def network(self) -> int:
        """Between devices."""
        return self.weights + self.gradients + self.objectives


def traffic(cost: Cost, setup: Setup, accumulation: int = 1) -> Traffic:
    """What a step sends."""
    engine, processes = setup.engine, setup.processes
    every, trained = FP32_BYTES * cost.parameters, FP32_BYTES * cost.trainable
    weights = gradients = 0
    if engine is Engine.DDP:
        gradients = 2 * trained
    elif engine is Engine.FSDP2:
        weights, gradients = (every + trained) * accumulation, trained
    elif engine is Engine.ZERO3:
        again = max(0, trained - FP32_BYTES * (ZERO3_REUSE_DISTANCE // 2))
        weights, gradients = (every + again) * accumulation, trained * accumulation
    elif engine is not Engine.SINGLE:
        weights, gradients = trained, 2 * trained * (accumulation if engine is Engine.ZERO2 else 1)
    share = 1 - 1 / processes
    host = 0
    if setup.offload:
        gathered = (every + trained) * accumulation if engine.shards_weights else trained
        host = (gathered + trained) // processes  # weights up, gradients down
    return Traffic(int(share * weights), int(share * gradients), cost.exchanged_bytes * accumulation, host)
