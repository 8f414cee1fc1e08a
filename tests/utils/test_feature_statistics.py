from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_equissl.utils.feature_statistics import effective_rank, feature_std


def test_effective_rank_of_orthonormal_rows_is_their_number():
    q = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    for r in (1, 3, 17):
        low_rank = q[:, :r] @ torch.linalg.qr(torch.randn(40, r))[0].T  # (64, 40), r equal singular values
        assert effective_rank(low_rank).item() == pytest.approx(r, rel=1e-3)
        assert effective_rank(low_rank.T).item() == pytest.approx(r, rel=1e-3)


def test_effective_rank_equals_the_formula_on_singular_values():
    h = np.random.default_rng(0).standard_normal((50, 12)) * np.logspace(0, -5, 12)
    sigma = np.linalg.svd(h, compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    expected = math.exp(-(p * np.log(p)).sum())
    assert effective_rank(torch.tensor(h)).item() == pytest.approx(expected, rel=1e-5)
    assert effective_rank(torch.tensor(h, dtype=torch.float32)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_effective_rank_of_a_point_is_one(value):
    assert effective_rank(torch.full((10, 8), value)).item() == pytest.approx(1, abs=1e-3)


def test_effective_rank_does_not_depend_on_scale_and_gives_fp32_without_gradient():
    h = torch.randn(30, 10, requires_grad=True)
    rank = effective_rank(h)
    assert rank.dtype == torch.float32
    assert not rank.requires_grad
    assert effective_rank(1e4 * h).item() == pytest.approx(rank.item(), rel=1e-4)


def test_feature_std_is_zero_at_collapse_and_one_over_root_d_when_isotropic():
    assert feature_std(torch.ones(5, 7) * 3).item() == pytest.approx(0, abs=1e-6)
    h = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert feature_std(h).item() == pytest.approx(1 / 8, rel=0.01)
    assert feature_std(h * torch.rand(4000, 1).add(0.1)).item() == pytest.approx(feature_std(h).item(), rel=1e-4)


def test_feature_std_equals_numpy():
    h = np.random.default_rng(1).standard_normal((9, 4))
    rows = h / np.sqrt((h**2).sum(1, keepdims=True))
    assert feature_std(torch.tensor(h)).item() == pytest.approx(rows.std(0, ddof=1).mean(), rel=1e-5)


@pytest.mark.parametrize("monitor", [effective_rank, feature_std])
@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 4), (8,)])
def test_other_shapes_are_refused(monitor, shape):
    with pytest.raises(ValueError, match=r"\(M, D\)"):
        monitor(torch.zeros(shape))


def test_rank_of_what_is_not_finite_is_nan():
    h = torch.randn(4, 6)
    h[1, 2] = torch.nan
    assert effective_rank(h).isnan()
