from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hf_equissl.modeling import EquiSSLStem
from hf_equissl.objectives.heads import linear_of_invariant
from hf_equissl.views.needs import Needs

from . import distillation_reference as reference
from .helpers import make_views, tiny_config

CONFIG = tiny_config(hidden_size=8, feature_size=64, equivariant_size=16)


def run(rows: int, monkeypatch: pytest.MonkeyPatch, fold: bool | None) -> tuple[Tensor, dict[str, Tensor], int]:
    """Output, gradients, and how often the weights were multiplied; ``fold`` None lets the cost decide."""
    calls: list[str] = []
    original = EquiSSLStem.fold
    monkeypatch.setattr(EquiSSLStem, "fold", lambda stem, *args: calls.append("") or original(stem, *args))
    if fold is not None:
        monkeypatch.setattr(EquiSSLStem, "is_fold_cheaper", lambda *args: fold)
    features = reference.make_features(CONFIG, make_views(Needs(), batch=2), seed=3)
    torch.manual_seed(0)
    linear = nn.Linear(48, 6)
    tokens = features.tokens.flatten(0, 2)[:rows].clone().requires_grad_(True)
    output = linear_of_invariant(linear, features, tokens)
    (output.sin() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    named = {
        "tokens": tokens,
        **dict(linear.named_parameters()),
        **dict(copy.copy(features.stem).named_parameters("stem")),
    }
    monkeypatch.undo()
    return output.detach(), {name: parameter.grad for name, parameter in named.items()}, len(calls)


def test_one_map_equals_two_in_value_and_gradient(monkeypatch):
    folded, folded_gradients, folds = run(40, monkeypatch, fold=True)
    expected, gradients, none = run(40, monkeypatch, fold=False)
    assert (folds, none) == (1, 0)
    torch.testing.assert_close(folded, expected)
    assert folded_gradients.keys() == {"tokens", "weight", "bias", "stem.weight", "stem.bias"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(folded_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0.01, name
    assert not folded_gradients["stem.weight"][48:].any()  # the equivariant rows


def test_the_cheaper_way_is_taken(monkeypatch):
    # Apart rows * 48 * (8 + 6) products, together rows * 8 * 6 + 8 * 6 * 48: equal at 3.7 rows.
    assert run(3, monkeypatch, fold=None)[2] == 0
    assert run(4, monkeypatch, fold=None)[2] == 1


def test_anything_but_the_stem_itself_is_called():
    features = reference.make_features(CONFIG, make_views(Needs(), batch=2), seed=3)
    linear, tokens = nn.Linear(48, 6), features.tokens.flatten(0, 2)
    stem = features.stem
    expected = linear_of_invariant(linear, features, tokens)
    features.stem = lambda rows, part: stem(rows, part=part)  # as adapters wrap layers
    torch.testing.assert_close(linear_of_invariant(linear, features, tokens), expected)
    features.stem = None
    narrow = nn.Linear(8, 6)
    assert torch.equal(linear_of_invariant(narrow, features, tokens), narrow(tokens))
