from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_equissl.objectives.prototypes import PrototypeHead, Prototypes, prototype_cross_entropy
from hf_equissl.views.needs import Needs

from . import distillation_reference as reference
from .helpers import make_views, tiny_config

CONFIG = tiny_config()


def make_head(**kwargs) -> PrototypeHead:
    """A head with biases and gains that show."""
    torch.manual_seed(0)
    head = PrototypeHead(**{"in_features": 16, "num_prototypes": 12, "hidden_size": 10, "bottleneck_size": 6, **kwargs})
    with torch.no_grad():
        for name, value in head.state_dict().items():
            value.add_(torch.rand_like(value) if name.endswith(("bias", "gain")) else 0.2 * torch.randn_like(value))
    return head


def test_prototypes_are_unit_directions_times_gains():
    torch.manual_seed(0)
    prototypes = Prototypes(256, 500)
    torch.testing.assert_close(prototypes().norm(dim=1), torch.ones(500))
    with torch.no_grad():
        prototypes.gain.mul_(torch.linspace(0.5, 2, 500)[:, None])
        prototypes.direction.mul_(torch.linspace(2, 3, 500)[:, None])  # lengths say nothing
    torch.testing.assert_close(prototypes().norm(dim=1), torch.linspace(0.5, 2, 500))


def test_initialisation():
    torch.manual_seed(0)
    head = PrototypeHead(400, 1000)
    direction, first, last = head.prototypes.direction, head.mlp[0], head.mlp[-1]
    assert direction.abs().max() <= 1 / 16  # uniform within 1 / sqrt(256), as nn.Linear
    assert direction.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.01)
    assert torch.equal(head.prototypes.gain, torch.ones(1000, 1))
    for linear in (first, last):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert not linear.bias.any()
    assert [m.out_features for m in head.mlp if isinstance(m, torch.nn.Linear)] == [2048, 2048, 256]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_head_equals_the_reference(layers):
    head = make_head(num_layers=layers)
    features = reference.make_features(CONFIG, make_views(Needs(), batch=2), seed=1)
    rows, patches = head(features, features.cls.flatten(0, 1), features.patches.flatten(0, 2))
    for given, tokens in ((rows, features.cls), (patches, features.patches)):
        expected = reference.bottleneck(head, features, tokens).reshape(given.shape)
        np.testing.assert_allclose(given.detach(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(head.weights()[0].detach(), reference.prototypes(head), rtol=1e-5, atol=1e-6)


def test_what_patches_have_of_their_own():
    features = reference.make_features(CONFIG, make_views(Needs(), batch=2), seed=1)
    tokens = features.cls[0]
    names = {}
    for patches in ("shared", "own_prototypes", "own_head"):
        head = make_head(patches=patches)
        names[patches] = {name.split(".")[0] for name, _ in head.named_parameters()}
        cls_rows, patch_rows = head(features, tokens, tokens)
        cls_weight, patch_weight = head.weights()
        assert torch.equal(cls_rows, patch_rows) == (patches != "own_head")
        assert (cls_weight is patch_weight) == (patches == "shared")
    assert names["shared"] == {"mlp", "prototypes"}
    assert names["own_prototypes"] == {"mlp", "prototypes", "patch_prototypes"}
    assert names["own_head"] == {"mlp", "prototypes", "patch_mlp", "patch_prototypes"}


def test_rows_and_prototypes_are_fp32_under_autocast():
    head = make_head()
    features = reference.make_features(CONFIG, make_views(Needs(), batch=2), seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, _ = head(features, features.cls[0], None)
        weight = head.prototypes()
    assert rows.dtype == weight.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    np.testing.assert_allclose(weight.detach(), reference.prototypes(head), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_gain_cannot_be_trained(freeze):
    head = make_head(freeze_gain=freeze)
    head.prototypes().sum().backward()
    names = {name for name, parameter in head.prototypes.named_parameters() if parameter.grad is not None}
    assert names == ({"direction"} if freeze else {"direction", "gain"})
    assert head.prototypes.gain.requires_grad is not freeze
    assert head.prototypes.gain.shape == (12, 1)
    # Checkpoints of both kinds fit each other.
    make_head(freeze_gain=not freeze).load_state_dict(head.state_dict())


@pytest.mark.parametrize("name", ["num_prototypes", "hidden_size", "bottleneck_size", "num_layers"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match="is 0, expected at least 1"):
        make_head(**{name: 0})


def problem(rows: int = 7, count: int = 9, width: int = 4, dtype: torch.dtype = torch.float64) -> tuple:
    g = torch.Generator().manual_seed(4)
    x = F.normalize(torch.randn(rows, width, generator=g, dtype=dtype), dim=1).requires_grad_(True)
    weight = torch.randn(count, width, generator=g, dtype=dtype).requires_grad_(True)
    # Sums of several targets occur: one of the rows meets two.
    targets = torch.rand(rows, count, generator=g, dtype=dtype)
    return x, weight, targets, torch.rand(rows, generator=g, dtype=dtype)


def plain_cross_entropy(rows, weight, targets, row_weights, temperature) -> torch.Tensor:
    """In one piece, differentiated by autograd."""
    logs = torch.log_softmax(rows @ weight.T / temperature, dim=1)
    return -((targets * logs).sum(dim=1) * row_weights).sum()


def small_pieces(monkeypatch, logits: int) -> None:
    monkeypatch.setattr("hf_equissl.objectives.prototypes.LOGITS_AT_ONCE", logits)


@pytest.mark.parametrize("logits", [1, 27, 63, 2**24])  # 1, 3, 7 and all of 7 rows with 9 prototypes at once
def test_cross_entropy_in_pieces_equals_that_in_one(monkeypatch, logits):
    small_pieces(monkeypatch, logits)
    x, weight, targets, factors = problem()
    pieces: list[int] = []

    def piece(part: slice) -> torch.Tensor:
        pieces.append(len(targets[part]))
        return targets[part]

    loss = prototype_cross_entropy(x, weight, piece, factors, 0.1)
    expected = plain_cross_entropy(x, weight, targets, factors, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(3 * loss, (x, weight))
    for given, wanted in zip(gradients, torch.autograd.grad(3 * expected, (x, weight)), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-12)
        assert wanted.abs().max() > 0.1
    assert sum(pieces) == 7
    assert max(pieces) == min(7, max(1, logits // 9))


def test_cross_entropy_passes_gradcheck(monkeypatch):
    small_pieces(monkeypatch, 27)
    x, weight, targets, factors = problem()
    assert torch.autograd.gradcheck(
        lambda x, weight: prototype_cross_entropy(x, weight, targets.__getitem__, factors, 0.5), (x, weight)
    )


def test_cross_entropy_where_only_one_side_learns():
    x, weight, targets, factors = problem()
    expected = torch.autograd.grad(plain_cross_entropy(x, weight, targets, factors, 0.1), (x, weight))
    fixed = prototype_cross_entropy(x, weight.detach(), targets.__getitem__, factors, 0.1)
    torch.testing.assert_close(torch.autograd.grad(fixed, x)[0], expected[0])
    fixed = prototype_cross_entropy(x.detach(), weight, targets.__getitem__, factors, 0.1)
    torch.testing.assert_close(torch.autograd.grad(fixed, weight)[0], expected[1])
    with torch.no_grad():
        assert not prototype_cross_entropy(x, weight, targets.__getitem__, factors, 0.1).requires_grad


def test_cross_entropy_keeps_no_logits():
    x, weight, targets, factors = problem(rows=400, count=300)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        prototype_cross_entropy(x, weight, targets.__getitem__, factors, 0.1)
    assert sorted(kept) == [300 * 4, 400 * 4]


def test_cross_entropy_equals_the_reference():
    x, weight, targets, factors = problem()
    loss = prototype_cross_entropy(x, weight, targets.__getitem__, factors, 0.1)
    logits = (x @ weight.T).detach().numpy() / 0.1
    expected = sum(
        float(factor) * target.sum().item() * reference.entropy((target / target.sum()).numpy(), row)
        for factor, target, row in zip(factors, targets, logits, strict=True)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_products_in_bf16_round_their_factors_and_nothing_else(monkeypatch):
    small_pieces(monkeypatch, 3000)  # 10 of 400 rows at once: sums over 40 pieces
    x, weight, targets, factors = problem(rows=400, count=300, dtype=torch.float32)
    loss = prototype_cross_entropy(x, weight, targets.__getitem__, factors, 0.1, torch.bfloat16)
    given = torch.autograd.grad(loss, (x, weight))
    assert {tensor.dtype for tensor in (loss, *given)} == {torch.float32}
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (x, weight)]
    expected = plain_cross_entropy(*rounded, targets.double(), factors.double(), 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for ours, wanted in zip(given, torch.autograd.grad(expected, rounded), strict=True):
        assert (ours - wanted).norm() < 0.01 * wanted.norm()
    plain = prototype_cross_entropy(x, weight, targets.__getitem__, factors, 0.1)
    assert not torch.equal(torch.autograd.grad(plain, x)[0], given[0])


def test_cross_entropy_without_rows_is_zero_with_zero_gradients():
    x, weight, targets, factors = problem()
    x = x.detach()[:0].requires_grad_(True)
    loss = prototype_cross_entropy(x, weight, targets[:0].__getitem__, factors[:0], 0.1)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == (0, 4)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("freeze_gain", [False, True])
def test_weight_normalisation_and_its_gradients_are_those_of_the_definition(freeze_gain):
    torch.manual_seed(0)
    prototypes = Prototypes(7, 5, freeze_gain)
    if not freeze_gain:
        prototypes.gain.data.uniform_(0.5, 2)
    incoming = torch.randn(5, 7)
    weight = prototypes()
    weight.backward(incoming)
    v, g, up = (tensor.detach().double().numpy() for tensor in (prototypes.direction, prototypes.gain, incoming))
    length = np.sqrt((v**2).sum(axis=1, keepdims=True))
    unit = v / length
    along = (up * unit).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weight.detach(), g * unit, rtol=1e-5)
    np.testing.assert_allclose(prototypes.direction.grad, g / length * (up - along * unit), rtol=1e-4, atol=1e-6)
    if freeze_gain:
        assert prototypes.gain.grad is None
    else:
        np.testing.assert_allclose(prototypes.gain.grad, along, rtol=1e-4)
