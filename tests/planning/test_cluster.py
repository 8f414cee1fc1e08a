"""The largest batch that fits, time, advice, and what a cluster may not be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_equissl.distributed.engines import Engine
from hf_equissl.planning.arithmetic import Schedule
from hf_equissl.planning.assumptions import GIB, Cluster, Speed, parse_engine
from hf_equissl.planning.cluster import Planner, gpus_of_a_node, name_engine
from hf_equissl.planning.memory import Setup, peak
from hf_equissl.planning.report import advice, engine_table, plan_data, plan_lines
from hf_equissl.planning.step import Cost
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.utils.suggestions import RecipeError

from .test_engines import COST

MIB = 1024**2


def cost(batch: int) -> Cost:
    """100 MiB an image and a square, as covariances of the batch have."""
    other = 100 * MIB * batch + 4096 * batch**2
    moments = [replace(moment, other=other if moment.phase == "forward" else 0) for moment in COST.moments]
    return replace(COST, batch=batch, moments=tuple(moments))


def planner(per_device: int = 32, accumulation: int = 1, **cluster: float) -> Planner:
    given = Cluster(**{"gpus": 8, "memory": 10.0, "reserve": 0.0, **cluster})
    plan = Schedule(per_device, given.gpus, accumulation, 10_000, 100, 10, 10.0, 1e-3, 5)
    return Planner(cost, plan, given, Speed(utilisation=0.5, device_tflops=1.0))


@pytest.mark.parametrize("engine", [Engine.DDP, Engine.FSDP2])
@pytest.mark.parametrize("memory", [3.0, 10.0, 400.0])
def test_the_largest_batch_fits_and_one_more_does_not(engine: Engine, memory: float) -> None:
    plans = planner(memory=memory)
    setup = Setup(engine, 8)
    largest = plans.largest_batch(setup, exact=True)
    assert peak(cost(largest), setup).total <= memory * GIB < peak(cost(largest + 1), setup).total
    assert len(plans._costs) < 10
    assert plans.largest_batch(setup, exact=False) == pytest.approx(largest, rel=0.02)


def test_nothing_fits_into_too_little() -> None:
    assert planner(memory=0.05).largest_batch(Setup(Engine.DDP, 8), exact=True) == 0


def test_batches_that_the_objectives_refuse_are_not_tried() -> None:
    def refuse_errors(batch: int) -> Cost:
        if batch < 4:
            raise RecipeError(f"KoLeo needs 4 images, got {batch}")
        return cost(batch)

    for memory, fits in ((0.05, 0), (0.3, 0), (0.45, 4)):
        plans = replace(planner(memory=memory), measure=refuse_errors, smallest=4)
        assert plans.largest_batch(Setup(Engine.DDP, 8), exact=True) == fits
        assert plans.largest_batch(Setup(Engine.DDP, 8), exact=False) == fits
    none = plan_lines("mine", plans, [replace(plans, cluster=Cluster(memory=0.05, reserve=0.0)).plan("ddp")] * 2, "", 1)
    assert "none" in "\n".join(none)


def test_batches_between_multiples_are_not_tried() -> None:
    def pairs(batch: int) -> Cost:
        assert batch % 2 == 0
        return cost(batch)

    for memory in (0.05, 0.3, 3.0, 10.0, 400.0):
        single, double = planner(memory=memory), replace(planner(memory=memory), measure=pairs, smallest=2, multiple=2)
        one, two = (plans.largest_batch(Setup(Engine.DDP, 8), exact=True) for plans in (single, double))
        assert two == one - one % 2
        assert double.largest_batch(Setup(Engine.DDP, 8), exact=False) % 2 == 0
    plans = replace(planner(memory=5.0), smallest=2, multiple=2)
    odd = advice([plans.plan("ddp")] * 2, plans, recipe_batch=24)[-1]
    assert "leaves 3 for each of 8 devices: the objectives need 2, or a multiple of 2" in odd


def test_a_step_waits_for_arithmetic_or_for_the_exchange() -> None:
    plan = planner().plan("ddp")
    assert plan.compute == pytest.approx(32 * 1.1e9 / 0.5e12)  # 1.1 GFLOP an image
    assert plan.exchange == pytest.approx((2 * 4000 * 7 / 8 + 77) / 200e9, rel=0.01)
    assert (plan.bound, plan.seconds) == ("arithmetic", (plan.compute, plan.compute + plan.exchange))
    slow = planner(gpus=16, network=1e-6).plan("ddp")
    assert (slow.bound, slow.seconds[0]) == ("exchange", pytest.approx((2 * 4000 * 15 / 16 + 77) / 1e3, rel=0.01))
    # A network that is faster than the links between devices does not help.
    assert planner(gpus=16, network=500.0).cluster.bandwidth() == 200e9


def test_advice_names_the_simplest_engine_and_keeps_the_batch() -> None:
    plans = planner(memory=5.0)
    compared = [plans.plan(name) for name in ("ddp", "fsdp2")]
    text = "\n".join(advice(compared, plans, recipe_batch=2048))
    assert "ddp: the simplest that fits 32 images per device" in text
    assert "256 images per step, learning rate 0.001" in text
    assert "--training.per_device_train_batch_size 32 --training.gradient_accumulation_steps 8" in text
    assert "does not divide into 8 devices" in "\n".join(advice(compared, plans, recipe_batch=100))
    assert "leaves 0 for each" not in text
    few = advice(compared, replace(plans, smallest=2), recipe_batch=8)
    assert "leaves 1 for each of 8 devices: the objectives need 2" in few[-1]
    small = planner(memory=2.0)
    text = "\n".join(advice([small.plan("ddp")], small, recipe_batch=2048))
    assert "no engine fits 32 images per device; ddp fits 20: --training.per_device_train_batch_size 20" in text


def test_advice_counts_the_gradients_that_accumulation_keeps() -> None:
    """Beside 100 MiB of gradients that stay, one image fewer fits."""
    large = replace(COST.parts[0], parameters=100 * MIB // 4, trainable=100 * MIB // 4)

    def with_weights(batch: int) -> Cost:
        return replace(cost(batch), parts=(large,))

    # 400 MiB of weights, moments and buckets, and 24.5 images.
    plans = replace(planner(per_device=16, memory=2850 / 1024), measure=with_weights)
    ddp = plans.plan("ddp")
    kept = plans.largest_batch(replace(ddp.setup, accumulating=True), exact=True)
    assert (ddp.largest_batch, kept) == (24, 23)
    text = "\n".join(advice([ddp, ddp], plans, recipe_batch=8 * 48))  # 48 = 2 x 24 = 3 x 16
    assert "--training.per_device_train_batch_size 16 --training.gradient_accumulation_steps 3" in text
    full = replace(planner(per_device=16, memory=2150 / 1024), measure=with_weights)
    alone = replace(full.plan("ddp"), largest_batch=1)
    assert "does not fit under ddp" in advice([alone], replace(full, smallest=16), recipe_batch=8 * 17)[-1]


def test_offloading_plans_say_what_their_times_leave_out() -> None:
    plans = planner()
    note = "with +offload the optimizer's step is the host's, and not counted"
    offloading = [plans.plan("zero3+offload")]
    assert note in "\n".join(plan_lines("mine", plans, offloading, "fp32", 256))
    assert note in "\n".join(plan_lines("mine", plans, [plans.plan("ddp"), *offloading], "fp32", 256))
    assert note not in "\n".join(plan_lines("mine", plans, [plans.plan("ddp")], "fp32", 256))


@pytest.mark.parametrize(
    ("bf16", "tf32", "said"),
    [
        (True, None, "312 TFLOP/s per device (A100, bf16)"),
        (False, True, "156 TFLOP/s per device (A100, TF32)"),
        (False, None, "19.5 TFLOP/s per device (A100, fp32)"),
    ],
)
def test_the_assumed_peak_follows_the_precision(bf16: bool, tf32: bool | None, said: str) -> None:
    args = EquiSSLTrainingArguments(output_dir="unused", use_cpu=True, bf16=bf16)
    args.tf32 = tf32
    assert Speed().of(args).describe().endswith(said)
    assert Speed(device_tflops=float("989")).of(args).device_tflops == 989
    assert Speed(device_tflops=float("312")).of(args).device_tflops == 312  # as it was given


@pytest.mark.parametrize(("processes", "of_a_node"), [(1, 1), (8, 8), (12, 6), (16, 8), (20, 5), (11, 1)])
def test_nodes_of_a_launch(processes: int, of_a_node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert gpus_of_a_node(processes) == of_a_node
    assert Cluster(gpus=processes, gpus_per_node=of_a_node).nodes == processes // of_a_node
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert gpus_of_a_node(12) == 4
    assert gpus_of_a_node(6) == 6  # a plan for other processes than were started


def test_reports_say_the_same_in_words_and_in_data() -> None:
    plans = planner(gpus=16)
    compared = [plans.plan(name) for name in ("ddp", "zero3+offload")]
    rows = engine_table(compared, plans.schedule, plans.cluster)
    assert rows[1].split()[0] == "ddp"
    assert rows[2].split()[0] == "zero3+offload"
    data = plan_data("mine", plans, compared, "fp32")
    assert data["cluster"]["nodes"] == 2
    first = data["engines"][0]
    assert first["peak_bytes"] == sum(first["memory_bytes"].values()) == compared[0].held.total
    assert str(first["largest_batch_per_device"]) in rows[1].split()
    detail = "\n".join(plan_lines("mine", plans, compared[1:], "fp32", 512))
    assert "in the host's memory, for each device" in detail
    assert "to and from the host" in detail
    assert f"the largest batch per device that does: {compared[1].largest_batch}" in detail


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": 0}, "--gpus 0: expected 1 or more"),
        ({"gpus": 12}, "--gpus 12 are no whole number of nodes of 8. Set --gpus_per_node, or plan for 8 GPUs"),
        ({"memory": 0.0}, "--memory 0: expected a number above 0"),
        ({"memory": -40.0}, "--memory -40"),
        ({"network": float("nan")}, "--network nan"),
        ({"reserve": 90.0}, "--reserve 90: expected 0 or more GiB, and less than the memory, 80 GiB"),
    ],
)
def test_impossible_clusters(given: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Cluster(**given)


def test_engines_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_engine("zero2+offload") == (Engine.ZERO2, True)
    with pytest.raises(RecipeError, match=r"--engine fsdp: there is no such engine\. Did you mean 'fsdp2'\?"):
        parse_engine("fsdp")
    with pytest.raises(RecipeError, match="--engine single uses one device, got --gpus 8"):
        planner().plan("single")
    args = EquiSSLTrainingArguments(output_dir="unused", use_cpu=True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (name_engine(args, 1), name_engine(args, 2)) == ("single", "ddp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert name_engine(args, 2) == "fsdp2"
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert name_engine(args, 2) == "fsdp2+offload"
