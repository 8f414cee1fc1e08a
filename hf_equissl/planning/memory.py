"""Memory of one device under each engine, by formula: what lies there all the time, and the fullest moment of a step.

Weights, gradients and optimizer state are fp32 under every engine, S bytes of state for each byte of trained weights (2
for AdamW's moments, 1 for LARS's momentum); with bf16 or fp16, autocast adds copies of the
student's weights from their first use in the forward pass to their last in the backward pass. With N processes, P bytes
of weights, T of them trained:

| engine | weights | state | gradients | for the exchange |
|---|---|---|---|---|
| single | P | ST | T | |
| DDP | P | ST | T | T, buckets that stay |
| FSDP2 | P/N | ST/N | T/N, those of the root whole until the end | root, two layers, a layer's gradients twice |
| ZeRO-1, ZeRO-2 | P + T/N | ST/N | T/N | two buckets and a copy of one, while the backward pass runs |
| ZeRO-3 | P/N + T/N, small ones whole | ST/N | T/N, stay | a bucket that stays, gathered layers |

The root is what lies in no wrapped layer: embeddings, final norm, stem, heads, decoders, of the teacher too. Each of
its parameters is gathered with as many rows as N divides. ZeRO-1 and 2 clone the own share of the weights even where
they are fp32 already (``single_partition_of_fp32_groups`` in DeepSpeed 0.19), and flatten the gradients of the own
share once more before the optimizer's step. Their second bucket is filled while the first is on its way
(``overlap_comm``); ZeRO-3 has one. From one micro-batch to the next, DDP, FSDP2 and ZeRO-1 keep gradients whole (T),
the others shards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..distributed.engines import Engine
from .optimizer_memory import ADAMW, OptimizerMemory
from .step import FP32_BYTES, Cost
from .storages import Moment

# Elements: what the package sets, then DeepSpeed's defaults.
ZERO_BUCKET = 50_000_000  # reduce_bucket_size
ZERO3_REUSE_DISTANCE = 1_000_000_000  # stage3_max_reuse_distance
ZERO3_PREFETCH = 50_000_000  # stage3_prefetch_bucket_size


@dataclass(frozen=True)
class Setup:
    """How a step is spread over devices.

    Attributes:
        engine: What shares out weights, gradients and optimizer state.
        processes: N, one device each.
        offload: Whether the optimizer's state is on the host; under FSDP2 and ZeRO-3 the shards of the weights too.
        accumulating: Whether gradients stay from one micro-batch to the next.
        optimizer: What the optimizer takes.
        on_cpu: Whether devices are CPUs, where of a large empty buffer only what is written counts.
    """

    engine: Engine
    processes: int = 1
    offload: bool = False
    accumulating: bool = False
    optimizer: OptimizerMemory = ADAMW
    on_cpu: bool = False

    def buckets(self, gradients: int) -> int:
        """Count the bytes of DeepSpeed's buffers for gradients under way, of which ``gradients`` bytes are filled."""
        size = FP32_BYTES * ZERO_BUCKET * (1 if self.engine is Engine.ZERO3 else 2)
        return min(size, gradients) if self.on_cpu else size

    def in_flight(self, gradients: int) -> int:
        """Count the bytes of the copy that a bucket of ``gradients`` bytes is sent from; gloo makes another one."""
        copies = 2 if self.on_cpu and self.engine is Engine.ZERO3 else 1
        return copies * min(FP32_BYTES * ZERO_BUCKET, gradients)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one device at one moment.

    Attributes:
        phase: Phase of the step: "teacher", "forward", "backward", "reduction" (the end of the backward pass where
            gradients are sharded), "optimizer".
        weights: Weights that stay, or their shards.
        moments: What the optimizer keeps: AdamW's two moments, LARS's momentum.
        gradients: Gradients so far.
        exchange: Gathered layers and buckets.
        casts: Copies of weights for autocast.
        buffers: Centers and statistics.
        views: The batch.
        activations: Kept for the backward pass, and what passes.
    """

    phase: str
    weights: int = 0
    moments: int = 0
    gradients: int = 0
    exchange: int = 0
    casts: int = 0
    buffers: int = 0
    views: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Name of a part -> its bytes."""
        return {name: value for name, value in vars(self).items() if name != "phase"}


def peak(cost: Cost, setup: Setup) -> MemoryUse:
    """Find the fullest moment of a step."""
    return max(moments_of_step(cost, setup), key=lambda held: held.total)


def peaks_by_phase(cost: Cost, setup: Setup) -> dict[str, MemoryUse]:
    """Find the fullest moment of each phase, in the order of the step."""
    found: dict[str, MemoryUse] = {}
    for held in moments_of_step(cost, setup):
        if held.phase not in found or held.total > found[held.phase].total:
            found[held.phase] = held
    return found


def moments_of_step(cost: Cost, setup: Setup) -> list[MemoryUse]:
    """List every moment that can be the fullest."""
    resident = _resident(cost, setup)
    trained = FP32_BYTES * cost.trainable
    share = trained // setup.processes
    held = []
    for moment in cost.moments:
        gradients, exchange = _measure_exchange(moment, cost, setup)
        held.append(
            replace(
                resident,
                phase=moment.phase,
                gradients=resident.gradients + gradients,
                exchange=resident.exchange + exchange,
                casts=moment.casts,
                activations=moment.other,
            )
        )
    if setup.engine is Engine.FSDP2:
        # The root's gradients, copied once more to be scattered; its gathered weights are gone by then.
        root = FP32_BYTES * root_parameters(cost, setup.processes, trained=True)
        shards = 0 if setup.offload else share
        held.append(
            replace(resident, phase="reduction", gradients=max(resident.gradients, root + shards), exchange=root)
        )
    if setup.engine.is_deepspeed:
        buckets = max(resident.exchange, setup.buckets(trained)) + setup.in_flight(trained)
        shards = 0 if setup.offload else share
        gradients = max(resident.gradients, shards)
        held.append(replace(resident, phase="reduction", gradients=gradients, exchange=buckets))
    if setup.offload:
        return held  # the optimizer's step is the host's
    sharded = setup.engine not in (Engine.SINGLE, Engine.DDP)
    owned = share if sharded else trained
    copied = owned if setup.engine.is_deepspeed else 0
    temporary = 0 if setup.optimizer.fused else owned
    return [*held, replace(resident, phase="optimizer", gradients=owned + copied, activations=temporary)]


def host_bytes(cost: Cost, setup: Setup) -> int:
    """Count the bytes of the host's memory for one device's offloaded share; 0 without offload."""
    if not setup.offload:
        return 0
    trained, every = (FP32_BYTES * count // setup.processes for count in (cost.trainable, cost.parameters))
    state = setup.optimizer.state_bytes(trained) + trained  # the last term is gradients
    if setup.engine is Engine.FSDP2:
        return every + state
    # The optimizer's own weights, and a buffer of gradients as large; ZeRO-3 has the shards of all weights beside them.
    return 2 * trained + state + (every if setup.engine is Engine.ZERO3 else 0)


def root_parameters(cost: Cost, processes: int = 1, trained: bool = False) -> int:
    """Count elements outside of wrapped layers, all or trained ones, with the rows that FSDP2 adds to share them."""
    counted = [(rows, width) for rows, width, learns in cost.root if learns or not trained]
    return sum(-(-rows // processes) * processes * width for rows, width in counted)


def _resident(cost: Cost, setup: Setup) -> MemoryUse:
    """Find what stays on the device in every phase of a step."""
    engine, processes = setup.engine, setup.processes
    weights, trained = FP32_BYTES * cost.parameters, FP32_BYTES * cost.trainable
    share = trained // processes
    held = MemoryUse("", buffers=FP32_BYTES * cost.buffers, views=cost.view_bytes)
    accumulated = trained if setup.accumulating else 0
    if engine is Engine.SINGLE:
        return replace(held, weights=weights, moments=setup.optimizer.state_bytes(trained), gradients=accumulated)
    if engine is Engine.DDP:
        moments = setup.optimizer.state_bytes(trained)
        return replace(held, weights=weights, moments=moments, gradients=accumulated, exchange=trained)
    moments = 0 if setup.offload else setup.optimizer.state_bytes(share)
    if engine is Engine.FSDP2:
        shards = 0 if setup.offload else weights // processes
        return replace(held, weights=shards, moments=moments, gradients=accumulated)
    if engine is Engine.ZERO3:
        # The optimizer steps on a copy of the trained shards, also where those are fp32 already.
        shards = 0 if setup.offload else (weights + trained) // processes
        bucket = setup.buckets(trained)
        return replace(held, weights=shards, moments=moments, gradients=0 if setup.offload else share, exchange=bucket)
    own = 0 if setup.offload else share
    kept = accumulated if engine is Engine.ZERO1 else share * setup.accumulating
    return replace(held, weights=weights + own, moments=moments, gradients=kept)


def _measure_exchange(moment: Moment, cost: Cost, setup: Setup) -> tuple[int, int]:
    """Find gradients and memory for the exchange at a moment, beside what stays."""
    engine, backward, trained = setup.engine, moment.phase == "backward", FP32_BYTES * cost.trainable
    gradients = moment.layer_gradients + moment.root_gradients
    layers = cost.frozen_layers if moment.phase == "teacher" else cost.trained_layers
    largest = FP32_BYTES * max(layers, default=0)
    if engine in (Engine.SINGLE, Engine.DDP):
        return (0 if setup.accumulating else gradients), 0  # accumulated ones are resident
    if engine is Engine.FSDP2:
        # The layer that runs, and the one that is fetched meanwhile.
        gathered = FP32_BYTES * root_parameters(cost, setup.processes) + 2 * largest
        scattered = 0 if setup.offload or setup.accumulating else moment.layer_gradients // setup.processes
        return moment.root_gradients + scattered, gathered + (2 * largest if backward else 0)
    # Full buckets are sent meanwhile; the last ones when the pass is over.
    flat = setup.in_flight(gradients) if gradients >= FP32_BYTES * ZERO_BUCKET else 0
    if engine is not Engine.ZERO3:
        shards = 0 if setup.offload or setup.accumulating else gradients // setup.processes
        return shards, (setup.buckets(gradients) + flat if backward else 0)
    live = _live_weights(moment.phase, cost) + flat
    if moment.phase == "forward":  # fetched weights lie in one piece first, which goes when all of it was used
        live += min(trained, FP32_BYTES * ZERO3_PREFETCH)
    return 0, live


def _live_weights(phase: str, cost: Cost) -> int:
    """Count gathered weights under ZeRO-3, in bytes. A layer that is used again within the reuse distance stays."""
    trained = FP32_BYTES * cost.trainable
    fetched = FP32_BYTES * ZERO3_PREFETCH
    if phase == "teacher":
        largest = max(cost.frozen_layers, default=0)
        return min(FP32_BYTES * largest + fetched, FP32_BYTES * (cost.parameters - cost.trainable))
    # A layer is used again after those behind it ran forward and backward.
    reused = FP32_BYTES * (ZERO3_REUSE_DISTANCE // 2)
    return min(trained, reused + FP32_BYTES * max(cost.trained_layers, default=0) + fetched)
