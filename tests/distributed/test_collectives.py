from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_equissl.distributed import agreement, collectives
from hf_equissl.objectives.heads import Projector, SyncBatchNorm1d
from tests.objectives.helpers import run_processes


def batch(rows: int = 6, width: int = 4) -> Tensor:
    # A mean far from zero: naive sums of squares would lose the variance in fp32.
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) + 1000


def global_term(x: Tensor) -> Tensor:
    """Mixes rows: row i counts differently for every other row."""
    weights = torch.linspace(0.5, 2, x.shape[0])
    return ((x.T * weights) @ x).square().mean() + (x.sum(0) ** 3).mean()


def weighted_sum(x: Tensor) -> Tensor:
    return (x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum()


def norm(rows: slice, layer: nn.BatchNorm1d, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and statistics for some rows of the batch; the loss sums over rows."""
    own = x[rows].clone().requires_grad_(True)
    output = layer(own)
    factors = torch.linspace(-1, 1, x.numel()).view(x.shape)[rows]
    (output.sin() * factors).sum().backward()
    return {
        "output": output.detach(),
        "input_gradient": own.grad,
        "weight_gradient": layer.weight.grad,
        "bias_gradient": layer.bias.grad,
        **{name: value.clone() for name, value in layer.named_buffers()},
    }


def three_dimensional() -> Tensor:
    return torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(4))


def worker(rank: int, processes: int) -> dict[str, Any]:
    own = slice(0, 3) if rank == 0 else slice(3, 6)
    x = (batch() - 1000)[own].clone().requires_grad_(True)
    gathered = collectives.gather(x)
    global_term(gathered).backward()
    y = (batch() - 1000)[own].clone().requires_grad_(True)
    total = collectives.all_reduce_sum(y)
    weighted_sum(total.square()).backward()
    uneven = slice(0, 2) if rank == 0 else slice(2, 6)
    z = (batch() - 1000)[uneven].clone().requires_grad_(True)
    rows, there = collectives.gather_rows(z, most_rows=5)
    global_term(rows[there]).backward()
    one_dimensional = collectives.gather_rows(torch.arange(rank + 1), most_rows=2)
    uneven_rows = slice(0, 1) if rank == 0 else slice(1, 5)
    evaluated = SyncBatchNorm1d(4).eval()
    cumulative = SyncBatchNorm1d(4, momentum=None)
    for part in (batch(), 2 * batch()):
        cumulative(part[own])
    begin = time.monotonic()
    left = agreement.leave_to_main(lambda: time.sleep(1.0) or "done")
    waited = time.monotonic() - begin
    speaks = agreement.speaks_for_all()
    agreement.answer_others(60.0)
    return {
        "left_to_main": (left, waited >= 0.9),
        "speaks": speaks,
        "rank": (collectives.rank(), collectives.world_size(), collectives.is_main_process()),
        "gathered": gathered.detach(),
        "gather_gradient": x.grad,
        "integers": collectives.gather(torch.tensor([rank, rank + 10])),
        "total": total.detach(),
        "sum_gradient": y.grad,
        "rows": (rows.detach(), there),
        "rows_gradient": z.grad,
        "one_dimensional": one_dimensional,
        "means": collectives.reduce_mean(
            {"a": torch.tensor(1.0 + rank), "b": torch.tensor(4 * rank)}
            if rank == 0
            else {"b": torch.tensor(4 * rank), "a": torch.tensor(1.0 + rank)}
        ),
        "norm": norm(uneven, SyncBatchNorm1d(4), batch()),
        "norm_3d": norm(uneven_rows, SyncBatchNorm1d(3), three_dimensional()),
        "norm_bf16": SyncBatchNorm1d(4)((batch() - 1000)[own].bfloat16()).dtype,
        "evaluated": evaluated(batch()[own]).detach(),
        "cumulative": {name: value.clone() for name, value in cumulative.named_buffers()},
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run_processes(worker, folder)


def test_rank_and_world_size(ranks):
    assert [r["rank"] for r in ranks] == [(0, 2, True), (1, 2, False)]


def test_what_is_left_to_the_main_process_is_waited_for(ranks):
    assert [r["left_to_main"] for r in ranks] == [("done", True), (None, True)]


def test_one_process_speaks(ranks):
    assert sorted(r["speaks"] for r in ranks) == [False, True]


def test_who_keeps_the_store_may_be_stopped(monkeypatch):
    """It never answers then: each speaks for itself, and soon."""

    class Stopped:
        def compare_set(self, *_: str) -> bytes:
            time.sleep(60)
            return b""

    monkeypatch.setattr(agreement, "world_size", lambda: 2)
    monkeypatch.setattr(agreement, "_get_default_store", Stopped)
    begin = time.monotonic()
    assert agreement.speaks_for_all(patience=0.3)
    assert time.monotonic() - begin < 10


def test_unequal_numbers_of_rows_are_gathered_with_the_gradient_of_one_process(ranks):
    x = (batch() - 1000).requires_grad_(True)
    alone, all_there = collectives.gather_rows(x, most_rows=9)
    assert alone is x
    assert all_there.all()
    global_term(alone).backward()
    for r in ranks:
        rows, there = r["rows"]
        assert there.tolist() == [True, True, False, False, False, True, True, True, True, False]
        assert torch.equal(rows[there], x.detach())
        assert not rows[~there].any()
        numbers, real = r["one_dimensional"]
        assert (numbers.tolist(), real.tolist()) == ([0, 0, 0, 1], [True, False, True, True])
    # As for equal numbers: the sum over processes is twice the gradient of one.
    torch.testing.assert_close(torch.cat([r["rows_gradient"] for r in ranks]) / 2, x.grad)
    with pytest.raises(ValueError, match="at most 5 rows per process, got 6"):
        collectives.gather_rows(x, most_rows=5)


def test_gather_is_ordered_by_rank_and_its_gradient_is_that_of_one_process(ranks):
    x = (batch() - 1000).requires_grad_(True)
    global_term(x).backward()
    for r in ranks:
        torch.testing.assert_close(r["gathered"], x.detach(), rtol=0, atol=0)
        assert r["integers"].tolist() == [0, 10, 1, 11]
    # Each process evaluates the same term: the sum over processes is twice it, which averaging gradients undoes.
    torch.testing.assert_close(torch.cat([r["gather_gradient"] for r in ranks]) / 2, x.grad)
    assert x.grad.abs().min() > 0


def test_all_reduce_sum_and_its_gradient(ranks):
    y = (batch() - 1000).requires_grad_(True)
    total = y[:3] + y[3:]
    weighted_sum(total.square()).backward()
    for r in ranks:
        torch.testing.assert_close(r["total"], total.detach())
    torch.testing.assert_close(torch.cat([r["sum_gradient"] for r in ranks]) / 2, y.grad)


def test_reduce_mean_averages_by_name(ranks):
    for r in ranks:
        assert {name: value.item() for name, value in r["means"].items()} == {"a": 1.5, "b": 2.0}
    assert list(ranks[1]["means"]) == ["b", "a"]


@pytest.mark.parametrize(("key", "x"), [("norm", batch()), ("norm_3d", three_dimensional())])
def test_batch_norm_over_two_processes_of_unequal_size_equals_one(ranks, key, x):
    parts = [r[key] for r in ranks]
    expected = norm(slice(None), nn.BatchNorm1d(x.shape[1]), x)
    # fp32 resolves values near 1000 to 6e-5; a difference of squares would be wrong by several per cent.
    loose = {"rtol": 1e-3, "atol": 1e-3} if key == "norm" else {"rtol": 1e-5, "atol": 1e-5}
    for name in ("output", "input_gradient"):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), expected[name], **loose)
    for name in ("weight_gradient", "bias_gradient"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], expected[name], **loose)
    for part in parts:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(part[name], expected[name])
    assert expected["input_gradient"].abs().max() > 0


def test_batch_norm_keeps_the_dtype_and_uses_running_statistics_in_evaluation(ranks):
    assert ranks[0]["norm_bf16"] == torch.bfloat16
    torch.testing.assert_close(ranks[1]["evaluated"], nn.BatchNorm1d(4).eval()(batch()[3:]).detach())


def test_batch_norm_cumulative_average(ranks):
    layer = nn.BatchNorm1d(4, momentum=None)
    for part in (batch(), 2 * batch()):
        layer(part)
    for name, value in layer.named_buffers():
        torch.testing.assert_close(ranks[0]["cumulative"][name], value)


def test_one_process_is_a_no_op():
    x = batch()
    assert (collectives.rank(), collectives.world_size(), collectives.is_main_process()) == (0, 1, True)
    assert collectives.gather(x) is x
    assert collectives.all_reduce_sum(x) is x
    assert collectives.reduce_mean({}) == {}
    means = collectives.reduce_mean({"a": torch.tensor(2.0, requires_grad=True)})
    assert means["a"].item() == 2
    assert not means["a"].requires_grad


def test_batch_norm_of_one_process_is_the_parent():
    expected = norm(slice(None), nn.BatchNorm1d(4), batch())
    for name, value in norm(slice(None), SyncBatchNorm1d(4), batch()).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_projector_layers():
    layers = [type(layer).__name__ for layer in Projector(8, (16, 16, 4))]
    assert layers == ["Linear", "SyncBatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert Projector(8, (16, 16, 4))[-1].bias is None
    assert Projector(8, (5,))(torch.zeros(3, 8)).shape == (3, 5)


@pytest.mark.parametrize("sizes", [(), (16, 0), (16, 2.5)])
def test_projector_refuses_other_widths(sizes):
    with pytest.raises(ValueError, match="positive layer width"):
        Projector(8, sizes)
