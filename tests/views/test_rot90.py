"""Quarter turns by hand, and their missing path."""

from __future__ import annotations

import pytest
import torch

from hf_equissl.views import Rot90Family


def test_hand_computed_turns():
    image = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).expand(4, 3, 2, 2)
    out = Rot90Family().apply(image, torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    expected = [[[0.1, 0.2], [0.3, 0.4]], [[0.2, 0.4], [0.1, 0.3]], [[0.4, 0.3], [0.2, 0.1]], [[0.3, 0.1], [0.4, 0.2]]]
    assert torch.equal(out[:, 0], torch.tensor(expected))  # counter-clockwise: what was on the right is above


def test_an_image_that_is_not_square_keeps_its_shape():
    image = torch.zeros(1, 3, 8, 16)
    image[..., 8:] = 1  # white on the right
    out = Rot90Family().apply(image, torch.ones(1, 1))
    assert out.shape == image.shape
    assert out[..., :3, :].min() > 0.9
    assert out[..., 5:, :].max() < 0.1


def test_intermediate_fractions_are_refused():
    with pytest.raises(ValueError, match=r"0\.5.*no intermediate images.*rotation"):
        Rot90Family().path(torch.rand(1, 3, 4, 4), torch.ones(1, 1), torch.tensor([0.0, 0.5, 1.0]))


def test_shares_of_turns_and_targets():
    draws = torch.rand(10_000, 1, generator=torch.Generator().manual_seed(0))

    def shares(p: float) -> list[float]:
        turns = Rot90Family(p).sample(draws)
        return [(turns == number).float().mean().item() for number in range(4)]

    assert shares(0.75) == pytest.approx([0.25] * 4, abs=0.02)
    assert shares(0.3) == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.02)
    assert shares(0)[0] == 1
    assert shares(1) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.02)
    assert Rot90Family().targets(torch.tensor([[0.0], [3.0]])).tolist() == [[-1.0], [1.0]]
