"""Rotation against scipy, PIL and a hand-computed quarter turn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hf_equissl.views import RotationFamily


def test_hand_computed_quarter_turn():
    """+90 degrees, counter-clockwise on screen: the right column becomes the top row."""
    image = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    turned = torch.tensor([[0.3, 0.6, 0.9], [0.2, 0.5, 0.8], [0.1, 0.4, 0.7]])
    out = RotationFamily(max_degrees=90).apply(image.expand(1, 3, 3, 3), torch.tensor([[90.0]]))
    torch.testing.assert_close(out[0, 0], turned, rtol=0, atol=1e-6)
    assert torch.equal(turned, torch.rot90(image))


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("fraction", [1 / 3, 1.0])
def test_equals_scipy(smooth_images, scipy_rigid, size, fraction):
    images, angles = smooth_images(3, *size), torch.tensor([[45.0], [-20.0], [3.0]])
    ours = RotationFamily().apply(images, angles, fraction)
    for i in range(3):
        expected = scipy_rigid(images[i].double().numpy(), angles[i].item() * fraction, 0, 0)
        np.testing.assert_allclose(ours[i].numpy(), expected, atol=2e-5)


def test_sign_and_values_agree_with_pil(smooth_images):
    images = smooth_images(1, 64, 64)
    pixels = (images * 255).round() / 255
    ours = RotationFamily().apply(pixels, torch.tensor([[25.0]]))[0]
    pil = Image.fromarray((pixels[0].permute(1, 2, 0) * 255).round().byte().numpy())
    expected = np.asarray(pil.rotate(25, resample=Image.Resampling.BILINEAR)) / 255
    inside = (slice(12, -12), slice(12, -12))  # PIL treats the border pixels in another way
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy()[inside], expected[inside], atol=0.008)


def test_there_and_back_restores_the_centre_disc(smooth_images):
    images, family = smooth_images(2, 48, 48), RotationFamily()
    angles = torch.tensor([[40.0], [-15.0]])
    back = family.apply(family.apply(images, angles), -angles)
    y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(48) - 23.5, indexing="ij")
    disc = x**2 + y**2 < 20**2
    assert (back - images)[..., disc].abs().max() < 0.05  # two bilinear passes smooth a little
    assert (family.apply(images, angles) - images)[..., disc].abs().max() > 0.3


def test_fill_decides_the_corners():
    images, angle = torch.ones(1, 3, 32, 32), torch.tensor([[45.0]])
    assert RotationFamily().apply(images, angle)[0, :, 0, 0].max() == 0
    for fill in ("reflect", "border"):
        assert RotationFamily(fill=fill).apply(images, angle).min() > 0.999


def test_nearest_keeps_the_values():
    images = torch.rand(1, 3, 16, 16)
    out = RotationFamily(interpolation="nearest", fill="border").apply(images, torch.tensor([[33.0]]))
    assert torch.isin(out, images).all()


def test_targets():
    assert RotationFamily(max_degrees=60).targets(torch.tensor([[30.0], [-60.0]])).tolist() == [[0.5], [-1.0]]
