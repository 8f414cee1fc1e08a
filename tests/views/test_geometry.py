"""warp and its conventions against scipy, which shares no code with grid_sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_equissl.views.geometry import FILLS, affine_inverse, rigid_inverse, shift_to_pixels, warp


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
def test_rigid_warp_equals_scipy(smooth_images, scipy_rigid, fill, size):
    images = smooth_images(4, *size)
    degrees = torch.tensor([[30.0], [-45.0], [0.0], [170.0]])
    tx, ty = torch.tensor([[0.0], [1.3], [-2.5], [4.0]]), torch.tensor([[0.0], [-0.7], [3.25], [-5.5]])
    ours = warp(images, rigid_inverse(degrees, tx, ty), fill)[:, 0]
    for i in range(4):
        expected = scipy_rigid(images[i].double().numpy(), degrees[i, 0].item(), tx[i, 0].item(), ty[i, 0].item(), fill)
        np.testing.assert_allclose(ours[i].numpy(), expected, atol=2e-5)


def test_several_maps_in_one_call_equal_one_call_each(smooth_images):
    images = smooth_images(3, 16, 16)
    degrees = torch.tensor([[10.0, 20.0, 30.0], [-5.0, 0.0, 5.0], [1.0, 2.0, 3.0]])
    inverse = rigid_inverse(degrees, torch.ones(3, 3), torch.zeros(3, 3))
    together = warp(images, inverse)
    assert together.shape == (3, 3, 3, 16, 16)
    for k in range(3):
        assert torch.equal(together[:, k], warp(images, inverse[:, k : k + 1])[:, 0])


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (30, 50)])
def test_identity_map_returns_the_image_bit_for_bit(size):
    images = torch.rand(2, 3, *size)
    zero = torch.zeros(2, 1)
    for interpolation in ("bilinear", "nearest", "bicubic"):
        out = warp(images, rigid_inverse(zero, zero, zero), interpolation=interpolation)
        assert torch.equal(out[:, 0], images)


def test_bicubic_is_clamped_and_sharper_than_bilinear():
    images = torch.zeros(1, 1, 8, 8)
    images[..., 4:] = 1
    inverse = affine_inverse(
        (
            (torch.ones(1, 1), torch.zeros(1, 1), torch.full((1, 1), 0.3)),
            (torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1)),
        )
    )
    cubic = warp(images, inverse, "border", "bicubic")
    linear = warp(images, inverse, "border", "bilinear")
    assert cubic.min() == 0
    assert cubic.max() == 1
    # 0.3 pixels into the step from 0 to 1; cubic convolution with a = -0.75 at distances 1.3, 0.7, 0.3, 1.7.
    assert linear[0, 0, 0, 4, 3].item() == pytest.approx(0.3, abs=1e-5)

    def kernel(d: float) -> float:
        a = -0.75
        return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a

    assert cubic[0, 0, 0, 4, 3].item() == pytest.approx(kernel(0.7) + kernel(1.7), abs=1e-5)


def test_units():
    tx, ty = torch.tensor([10.0]), torch.tensor([-10.0])
    assert shift_to_pixels(tx, ty, "pixels", 32, 64) == (tx, ty)
    assert [v.item() for v in shift_to_pixels(tx, ty, "pixels_at_224", 112, 448)] == [20.0, -5.0]
    assert [v.item() for v in shift_to_pixels(tx / 100, ty / 100, "fraction", 50, 200)] == pytest.approx([20.0, -5.0])
