"""What every objective of both registries has to do; a new entry is tested here without being named."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import Tensor, nn

from hf_equissl.objectives import LossOutput, Objective

from .helpers import (
    CASES,
    encode,
    make_views,
    merge,
    own,
    reorder,
    run_processes,
    teacher_features,
    tiny_encoder,
    tiny_objective,
)

HALF = 4  # images of one process: pairs among them stay together
every_objective = pytest.mark.parametrize(("kind", "name"), CASES, ids=[name for _, name in CASES])


def run(objective: Objective, encoder: nn.Module, views=None) -> LossOutput:
    needs = objective.needs
    views = make_views(needs) if views is None else views
    return objective(encode(encoder, views, needs), teacher_features(needs, views), views)


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": parameter.grad
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@every_objective
def test_finite_fp32_scalar_and_parts_that_add_up(kind, name):
    output = run(tiny_objective(kind, name), tiny_encoder())
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.loss)
    parts = [value for key, value in output.logs.items() if key.startswith("loss_")]
    assert parts
    torch.testing.assert_close(sum(parts), output.loss.detach())
    for value in output.logs.values():
        assert value.shape == ()
        assert torch.isfinite(value)
        assert not value.requires_grad


@every_objective
def test_every_trained_parameter_gets_a_gradient(kind, name):
    objective, encoder = tiny_objective(kind, name), tiny_encoder()
    run(objective, encoder).loss.backward()
    followers = {id(p) for _, teacher_head in objective.ema_pairs() for p in teacher_head.parameters()}
    for key, parameter in objective.named_parameters():
        assert has_gradient(parameter) == (parameter.requires_grad and id(parameter) not in followers), key
    for key, parameter in encoder.named_parameters():
        assert has_gradient(parameter) == is_reached(objective, key), key


def has_gradient(parameter: nn.Parameter) -> bool:
    """Whether there is one that is not 0 everywhere."""
    assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    return parameter.grad is not None and bool(parameter.grad.any())


def is_reached(objective: Objective, key: str) -> bool:
    """Whether the objective says that it trains this parameter of the encoder."""
    reach = objective.trains
    if block := re.match(r"encoder\.layer\.(\d+)\.", key):
        return reach.blocks is None or int(block[1]) < reach.blocks
    parts = {"stem": reach.stem, "layernorm": reach.norm, "mask_token": objective.needs.masks}
    return next((said for part, said in parts.items() if part in key.split(".")), True)


@every_objective
def test_the_teacher_gets_no_gradient(kind, name):
    objective, encoder = tiny_objective(kind, name), tiny_encoder()
    views = make_views(objective.needs)
    # Leaves with gradient, which production's teacher never has: the objective itself must not let any through.
    teacher = encode(tiny_encoder(seed=5).requires_grad_(False), views, objective.needs, masked=False)
    further = [view for views_of in teacher.extra.values() for view in views_of.values()]
    maps = [part for features in (teacher, *further) for part in (features, *features.hidden.values())]
    leaves = [part.tokens.requires_grad_(True) for part in maps]
    objective(encode(encoder, views, objective.needs), teacher, views).loss.backward()
    assert all(leaf.grad is None for leaf in leaves)


@every_objective
def test_reordering_the_batch_changes_nothing(kind, name):
    if own(name, "ORDER_DEPENDENT", False):
        pytest.skip("the published loss depends on the order of the batch")
    # Two equal objectives: the first batch may move the buffers of one.
    objective, twin, encoder = tiny_objective(kind, name), tiny_objective(kind, name), tiny_encoder()
    views = make_views(objective.needs)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = reorder(views, order[order < views.batch_size])
    torch.testing.assert_close(run(objective, encoder, shuffled).loss, run(twin, encoder, views).loss)


@every_objective
def test_bfloat16_autocast_is_finite_close_and_reduced_in_fp32(kind, name):
    objective, encoder = tiny_objective(kind, name), tiny_encoder()
    expected = run(objective, encoder).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run(objective, encoder).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0.03)
    loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(objective, encoder).values())


@every_objective
def test_state_round_trip(kind, name, tmp_path):
    objective, other, encoder = tiny_objective(kind, name), tiny_objective(kind, name, seed=11), tiny_encoder()
    run(objective, encoder)  # buffers move
    torch.save(objective.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(run(objective, encoder).loss, run(other, encoder).loss)
    states = zip(objective.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(key == key2 and torch.equal(value, value2) for (key, value), (key2, value2) in states)


@every_objective
def test_docstring_links_the_paper_and_the_citation_is_bibtex(kind, name):
    cls = type(tiny_objective(kind, name))
    assert re.search(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|openreview\.net/forum\?id=\w+)", inspect.getdoc(cls))
    assert re.match(r"@\w+\{[\w:-]+,\n", cls.citation)
    assert cls.citation.count("{") == cls.citation.count("}")
    for key in ("title", "author", "year"):
        assert re.search(rf"^\s+{key}\s*= \{{", cls.citation, flags=re.MULTILINE), key


def loss_and_gradients(kind: str, name: str, rank: int, processes: int) -> dict:
    """Loss, logs and gradients for one process's share of the batch, not yet averaged; buffers after it."""
    objective, encoder = tiny_objective(kind, name), tiny_encoder()
    shares = (range(HALF), range(HALF, 2 * HALF))
    halves = [make_views(objective.needs, batch=2 * HALF, images=images) for images in shares]
    output = run(objective, encoder, halves[rank] if processes == 2 else merge(halves))
    output.loss.backward()
    buffers = {key: value.clone().float() for key, value in objective.named_buffers()}
    return {"loss": output.loss.detach(), "gradients": gradients(objective, encoder), "buffers": buffers}


def every_share(rank: int, processes: int) -> dict[str, dict]:
    return {name: loss_and_gradients(kind, name, rank, processes) for kind, name in CASES}


@pytest.fixture(scope="module")
def shares(tmp_path_factory) -> list[dict[str, dict]]:
    """Results of two processes, one launch for all objectives."""
    return run_processes(every_share, tmp_path_factory.mktemp("shares"))


@every_objective
def test_two_processes_equal_one(kind, name, shares):
    expected = loss_and_gradients(kind, name, 0, 1)
    first, second = (share[name] for share in shares)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, expected["loss"], rtol=1e-5, atol=1e-5)
    assert first["gradients"].keys() == second["gradients"].keys() == expected["gradients"].keys()
    for key, gradient in expected["gradients"].items():
        averaged = (first["gradients"][key] + second["gradients"][key]) / 2  # as data-parallel wrappers do
        tolerance = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(averaged, gradient, rtol=1e-5, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    for key, value in expected["buffers"].items():
        torch.testing.assert_close(first["buffers"][key], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(first["buffers"][key], second["buffers"][key])
