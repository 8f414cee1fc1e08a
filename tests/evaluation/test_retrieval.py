from __future__ import annotations

import pytest
import torch
from scipy.spatial.transform import Rotation

from hf_equissl.evaluation.retrieval import (
    hit_rate,
    mean_reciprocal_rank,
    prediction_retrieval_error,
    quaternions,
    relative_rotation,
    target_ranks,
)


def test_rotations_are_those_of_scipy() -> None:
    angles = (torch.rand(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 3
    made, expected = quaternions(angles), Rotation.from_euler("xyz", angles.numpy())
    assert torch.allclose(made, torch.from_numpy(expected.as_quat()), atol=1e-12)
    between = relative_rotation(made[:10], made[10:])
    assert torch.allclose(between, torch.from_numpy((expected[:10].inv() * expected[10:]).as_quat()), atol=1e-12)


def test_ranks_hits_and_errors_by_hand() -> None:
    views = torch.eye(4).expand(3, 4, 4)
    # The true views are 0, 1 and 2; the predictions put them first, second and last.
    predictions = torch.tensor([[2.0, 0, 0, 0], [3.0, 1, 0.5, 0], [4.0, 3, 1, 2]])
    ranks = target_ranks(predictions, views, torch.tensor([0, 1, 2]))
    assert ranks.tolist() == [1, 2, 4]
    assert target_ranks(torch.ones(2, 4), torch.ones(2, 5, 4), torch.tensor([0, 3])).tolist() == [5, 5]
    assert mean_reciprocal_rank(ranks) == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)
    assert [hit_rate(ranks, k) for k in (1, 2, 5)] == pytest.approx([1 / 3, 2 / 3, 1])
    rotations = quaternions(torch.tensor([[0.0, 0, 0], [torch.pi, 0, 0], [torch.pi / 2, 0, 0], [0.3, 0.2, 0.1]]))
    bank = torch.eye(4)
    found = [prediction_retrieval_error(bank[:1], rotations[row : row + 1], bank, rotations) for row in range(3)]
    assert found == pytest.approx([0, 1, 0.5], abs=1e-6)  # none, half a turn, a quarter
    assert prediction_retrieval_error(bank, rotations, bank, -rotations, chunk_size=3) == pytest.approx(0, abs=1e-6)
