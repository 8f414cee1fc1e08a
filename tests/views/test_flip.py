"""The flip family by hand, and its missing path."""

from __future__ import annotations

import pytest
import torch

from hf_equissl.views import FlipFamily


def test_hand_computed_flip():
    image = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).expand(2, 3, 2, 3)
    out = FlipFamily().apply(image, torch.tensor([[1.0], [0.0]]))
    assert torch.equal(out[0, 0], torch.tensor([[0.3, 0.2, 0.1], [0.6, 0.5, 0.4]]))
    assert torch.equal(out[1], image[1])


def test_intermediate_fractions_are_refused():
    family, images, flips = FlipFamily(), torch.rand(1, 3, 4, 4), torch.ones(1, 1)
    assert not family.continuous
    with pytest.raises(ValueError, match=r"0\.5.*no intermediate images.*cross_attention_reconstruction"):
        family.path(images, flips, torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="no intermediate images"):
        family.apply(images, flips, 0.3)


def test_share_of_flips_and_targets():
    draws = torch.rand(10_000, 1, generator=torch.Generator().manual_seed(0))
    assert FlipFamily().sample(draws).mean().item() == pytest.approx(0.5, abs=0.02)
    assert FlipFamily(p=0.2).sample(draws).mean().item() == pytest.approx(0.2, abs=0.02)
    assert FlipFamily(p=0).sample(draws).sum() == 0
    assert FlipFamily(p=1).sample(draws).min() == 1
    assert FlipFamily().targets(torch.tensor([[0.0], [1.0]])).tolist() == [[-1.0], [1.0]]
