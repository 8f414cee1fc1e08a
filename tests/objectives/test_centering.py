from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_equissl.objectives.centering import centered_softmax, sinkhorn_knopp

from . import distillation_reference as reference
from .helpers import run_processes


def logits(rows: int = 10, prototypes: int = 6, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(6))


def test_centered_softmax_by_hand():
    # (0.2 - 0.1, 0.3 - 0.3) / 0.1 = (1, 0)
    probabilities = centered_softmax(torch.tensor([[0.2, 0.3]]), torch.tensor([0.1, 0.3]), 0.1)
    torch.testing.assert_close(probabilities, torch.tensor([[0.7310586, 0.2689414]]))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_sinkhorn_equals_the_reference(temperature, iterations):
    given = sinkhorn_knopp(logits(), temperature, iterations)
    expected = reference.sinkhorn(logits().double().numpy(), temperature, iterations)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-6)
    assert expected.max() > 0.5


def test_sinkhorn_rows_are_distributions_and_columns_become_equal():
    rows, prototypes = logits().shape
    torch.testing.assert_close(sinkhorn_knopp(logits(), 0.07).sum(dim=1), torch.ones(rows))
    settled = sinkhorn_knopp(logits(), 0.07, iterations=300)
    torch.testing.assert_close(settled.sum(dim=1), torch.ones(rows))
    torch.testing.assert_close(settled.sum(dim=0), torch.full((prototypes,), rows / prototypes), rtol=1e-3, atol=1e-3)
    uneven = torch.softmax(logits() / 0.07, dim=1).sum(dim=0)
    assert uneven.max() / uneven.min() > 2  # the softmax alone is far from it


def test_sinkhorn_with_large_gains_and_without_rows():
    assert torch.isfinite(sinkhorn_knopp(logits(scale=30), 0.04)).all()  # exp(30 / 0.04) would be infinite
    assert sinkhorn_knopp(logits()[:0], 0.04).shape == (0, 6)


def share(rank: int, processes: int) -> Tensor:
    parts = logits().split([3, 7]) if rank < 2 else [logits()]
    return sinkhorn_knopp(parts[rank], 0.05)


def test_sinkhorn_over_two_processes_with_unequal_rows_equals_one(tmp_path):
    first, second = run_processes(share, tmp_path)
    torch.testing.assert_close(torch.cat([first, second]), sinkhorn_knopp(logits(), 0.05))
