"""Memory and traffic of each engine against arithmetic by hand, on a step of round numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_equissl.distributed.engines import Engine
from hf_equissl.planning.memory import (
    ZERO3_PREFETCH,
    ZERO3_REUSE_DISTANCE,
    ZERO_BUCKET,
    Setup,
    host_bytes,
    peak,
    peaks_by_phase,
)
from hf_equissl.planning.optimizer_memory import OptimizerMemory
from hf_equissl.planning.step import Cost, Part
from hf_equissl.planning.storages import Moment
from hf_equissl.planning.traffic import traffic
from hf_equissl.pretraining.deepspeed import REDUCE_BUCKET

CONFIGS = Path(__file__).resolve().parents[2] / "training" / "accelerate_configs"
# 1000 trained parameters, 10 layers of 90 and a root of 100; a teacher with as many.
COST = Cost(
    batch=2,
    parts=(Part("encoder: blocks", 1000, 1000, flops=1e9), Part("teacher: encoder", 1000, 0, flops=1e8)),
    trained_layers=(90,) * 10,
    frozen_layers=(90,) * 10,
    trained_calls=(1,) * 10,
    frozen_calls=(1,) * 10,
    root=((100, 1, True), (100, 1, False)),
    buffers=5,
    activation_bytes=9000,
    moments=(
        Moment("teacher", 0, 0, 0, 500),
        Moment("forward", 0, 0, 0, 10_000),
        Moment("backward", 0, 400, 0, 9_000),
        Moment("backward", 1800, 400, 0, 5_000),
        Moment("backward", 3600, 400, 0, 0),
    ),
    exchanged_bytes=77,
    view_bytes=30,
    logs=(),
)
REST = 4 * 5 + 30  # buffers and views
P, T = 8000, 4000  # bytes of all weights, and of the trained ones
BUCKET = 4 * ZERO_BUCKET


def by_phase(engine: str, processes: int = 4, **more: Any) -> dict[str, int]:
    setup = Setup(Engine(engine), processes, **more)
    return {name: held.total - REST for name, held in peaks_by_phase(COST, setup).items()}


def test_one_device_holds_everything() -> None:
    always = P + 2 * T
    assert by_phase("single", 1) == {
        "teacher": always + 500,
        "forward": always + 10_000,
        "backward": always + 9_400,
        "optimizer": always + T,
    }
    assert by_phase("single", 1, optimizer=OptimizerMemory(fused=False))["optimizer"] == always + 2 * T
    assert by_phase("single", 1, optimizer=OptimizerMemory("LARS", 1.0))["optimizer"] == P + 2 * T
    # Gradients of earlier micro-batches are there from the start.
    assert by_phase("single", 1, accumulating=True)["forward"] == always + T + 10_000
    assert peak(COST, Setup(Engine.SINGLE)).phase == "forward"


def test_ddp_keeps_buckets() -> None:
    assert by_phase("ddp") == {name: value + T for name, value in by_phase("single", 1).items()}


def test_fsdp2_gathers_layers_and_keeps_the_root_whole() -> None:
    always, root, layer = (P + 2 * T) // 4, 4 * 200, 4 * 90
    gathered = root + 2 * layer
    phases = by_phase("fsdp2")
    assert phases["forward"] == always + gathered + 10_000
    # Early in the backward pass the root's gradients are there; two layers' gradients are on their way.
    assert phases["backward"] == always + gathered + 2 * layer + 400 + 9_000
    # The gathered root is let go before its gradients are copied to be scattered.
    assert phases["reduction"] == always + 400 + 400 + T // 4
    assert phases["optimizer"] == always + T // 4
    offloaded = by_phase("fsdp2", offload=True)
    assert offloaded["forward"] == gathered + 10_000
    assert "optimizer" not in offloaded


def test_fsdp2_keeps_whole_gradients_between_micro_batches() -> None:
    always, root, layer = (P + 2 * T) // 4, 4 * 200, 4 * 90
    phases = by_phase("fsdp2", accumulating=True)
    assert phases["forward"] == always + T + root + 2 * layer + 10_000
    assert phases["backward"] == always + T + root + 4 * layer + 400 + 9_000
    assert phases["optimizer"] == always + T // 4  # reduced by then
    assert by_phase("fsdp2", accumulating=True, offload=True)["forward"] == T + root + 2 * layer + 10_000


def test_fsdp2_gathers_whole_rows() -> None:
    """A parameter of one row of 100 is gathered with 3 empty ones."""
    flat = replace(COST, root=((1, 100, True), (100, 1, False)))
    more = 3 * 4 * 100
    even, padded = (peaks_by_phase(cost, Setup(Engine.FSDP2, 4)) for cost in (COST, flat))
    assert padded["forward"].exchange == even["forward"].exchange + more
    even_sent, padded_sent = (traffic(cost, Setup(Engine.FSDP2, 4)) for cost in (COST, flat))
    assert padded_sent.weights == even_sent.weights + more * 3 // 4
    assert padded_sent.gradients == even_sent.gradients + more * 3 // 4


def test_zero_shards_more_with_each_stage() -> None:
    share = T // 4
    first = P + share + 2 * share
    assert by_phase("zero1")["forward"] == by_phase("zero2")["forward"] == first + 10_000
    # Two buckets, into which gradients move; the last ones are reduced when the pass is over.
    for stage in ("zero1", "zero2"):
        assert by_phase(stage)["backward"] == first + 2 * BUCKET + 9_000 + 400 // 4
        assert by_phase(stage)["reduction"] == first + 2 * BUCKET + T + share
    kept = {"zero1": T, "zero2": share}  # between micro-batches
    for stage, gradients in kept.items():
        assert by_phase(stage, accumulating=True)["forward"] == first + gradients + 10_000
    assert by_phase("zero1")["optimizer"] == by_phase("zero2")["optimizer"] == first + 2 * share
    third = (P + T) // 4 + 2 * share + share + BUCKET
    assert by_phase("zero3")["forward"] == third + 2 * T + 10_000  # so small a model stays gathered until backward
    assert by_phase("zero3")["reduction"] == third + T
    assert by_phase("zero3")["optimizer"] == third + share
    assert by_phase("zero3", offload=True)["forward"] == BUCKET + 2 * T + 10_000
    # On CPUs an empty buffer takes what is written into it.
    assert by_phase("zero2", on_cpu=True)["backward"] == first + 400 + 9_000 + 400 // 4


def test_full_buckets_are_copied_while_the_backward_pass_runs() -> None:
    small, full = 4 * ZERO_BUCKET - 4, 4 * ZERO_BUCKET
    for engine, buckets in (("zero1", 2), ("zero2", 2), ("zero3", 1)):
        held = []
        for gradients in (small, full):
            moments = (Moment("backward", gradients, 0, 0, 9_000),)
            cost = replace(COST, parts=(Part("encoder: blocks", 10**9, 10**9),), moments=moments)
            held.append(peaks_by_phase(cost, Setup(Engine(engine), 8))["backward"].exchange)
        assert held[1] - held[0] == BUCKET
        assert held[0] >= buckets * BUCKET


def test_large_models_are_gathered_in_part_by_zero3() -> None:
    layer = 10**9
    large = replace(
        COST, parts=(Part("encoder: blocks", 10 * layer, 10 * layer),), trained_layers=(layer,) * 10, frozen_layers=()
    )
    held = peak(large, Setup(Engine.ZERO3, 8))
    assert held.exchange == 4 * (ZERO_BUCKET + ZERO3_REUSE_DISTANCE // 2 + layer + 2 * ZERO3_PREFETCH)


def test_offloaded_shares_lie_in_the_hosts_memory() -> None:
    share = T // 4
    assert host_bytes(COST, Setup(Engine.ZERO3, 4)) == 0
    assert host_bytes(COST, Setup(Engine.FSDP2, 4, offload=True)) == P // 4 + 3 * share
    assert host_bytes(COST, Setup(Engine.ZERO2, 4, offload=True)) == 5 * share
    one = OptimizerMemory(states=1.0)
    assert host_bytes(COST, Setup(Engine.ZERO2, 4, offload=True, optimizer=one)) == 4 * share
    # Weights, moments, and gradients twice: as they arrive, and as the optimizer reads them.
    assert host_bytes(COST, Setup(Engine.ZERO3, 4, offload=True)) == P // 4 + 5 * share


@pytest.mark.parametrize(
    ("engine", "weights", "gradients"),
    [("ddp", 0, 2 * T), ("fsdp2", P + 4 * 900, T), ("zero1", T, 2 * T), ("zero2", T, 2 * T), ("zero3", P, T)],
)
def test_bytes_on_a_ring_of_four(engine: str, weights: int, gradients: int) -> None:
    sent = traffic(COST, Setup(Engine(engine), 4))
    assert (sent.weights, sent.gradients, sent.objectives, sent.host) == (weights * 3 // 4, gradients * 3 // 4, 77, 0)
    assert sent.network == sent.weights + sent.gradients + 77


def test_accumulation_gathers_for_each_micro_batch_and_reduces_once() -> None:
    sent = traffic(COST, Setup(Engine.FSDP2, 4, accumulating=True), accumulation=3)
    assert (sent.weights, sent.gradients, sent.objectives) == (3 * (P + 4 * 900) * 3 // 4, T * 3 // 4, 3 * 77)
    assert traffic(COST, Setup(Engine.SINGLE)).gradients == 0


TWO_PASSES = replace(COST, trained_calls=(2,) * 10)  # crops, then further views


def test_each_pass_through_a_layer_gathers_it_under_fsdp2() -> None:
    layers, root = 4 * 900, 4 * 100
    sent = traffic(TWO_PASSES, Setup(Engine.FSDP2, 4))
    # The student's layers twice forward and twice backward, the teacher's once, both roots once.
    assert sent.weights == (4 * layers + layers + 2 * root) * 3 // 4
    assert sent.gradients == T * 3 // 4
    # What was accumulated is reduced before the last micro-batch's gradients are there.
    sent = traffic(TWO_PASSES, Setup(Engine.FSDP2, 4, accumulating=True), accumulation=3)
    assert sent.weights == 3 * (5 * layers + 2 * root) * 3 // 4
    assert sent.gradients == (2 * layers + root) * 3 // 4
    offloaded = traffic(TWO_PASSES, Setup(Engine.FSDP2, 4, offload=True))
    assert offloaded.host == (5 * layers + 2 * root + T) // 4


def test_zero3_gathers_again_what_is_beyond_the_reuse_distance() -> None:
    assert traffic(TWO_PASSES, Setup(Engine.ZERO3, 4)) == traffic(COST, Setup(Engine.ZERO3, 4))
    layer = ZERO3_REUSE_DISTANCE // 5
    parts = (Part("encoder: blocks", 10 * layer, 10 * layer),)
    large = replace(TWO_PASSES, parts=parts, trained_layers=(layer,) * 10, frozen_layers=(), frozen_calls=(), root=())
    sent = traffic(large, Setup(Engine.ZERO3, 4))
    assert sent.weights == 4 * layer * (4 * 10 - 2.5) * 3 // 4  # what the backward pass meets first is still there


def test_offloaded_gradients_cross_the_bus_three_times_under_zero3() -> None:
    assert traffic(COST, Setup(Engine.ZERO3, 4, offload=True)).host == (P + 3 * T) // 4
    again = traffic(COST, Setup(Engine.ZERO3, 4, offload=True, accumulating=True), accumulation=2)
    assert again.host == (2 * P + 5 * T) // 4


def test_one_process_sends_nothing() -> None:
    alone = replace(COST, exchanged_bytes=0)
    assert traffic(alone, Setup(Engine.DDP, 1)).network == 0


def test_buckets_are_those_of_the_shipped_configurations() -> None:
    """What the package sets, and DeepSpeed's defaults, hold as long as no configuration says otherwise."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = {}
    for path in sorted(CONFIGS.glob("deepspeed_*.yaml")):
        given |= yaml.safe_load(path.read_text())["deepspeed_config"]
    config = DeepSpeedZeroConfig(stage=3)
    assert given.get("reduce_bucket_size", REDUCE_BUCKET) == ZERO_BUCKET
    assert given.get("overlap_comm", True)  # two buckets under ZeRO-1 and 2
    assert given.get("stage3_max_reuse_distance", config.max_reuse_distance) == ZERO3_REUSE_DISTANCE
    assert given.get("stage3_prefetch_bucket_size", config.prefetch_bucket_size) == ZERO3_PREFETCH
