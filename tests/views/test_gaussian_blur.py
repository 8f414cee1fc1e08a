"""The Gaussian blur family: a hand-computed image, its path and its threshold."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage

from hf_equissl.views import GaussianBlurFamily


def test_hand_computed_image():
    """One bright pixel with a kernel of three becomes the outer product of the kernel with itself."""
    image = torch.zeros(1, 3, 5, 5)
    image[..., 2, 2] = 1
    side = math.exp(-0.5)
    kernel = torch.tensor([side, 1.0, side]) / (1 + 2 * side)  # 0.27407, 0.45186, 0.27407
    out = GaussianBlurFamily(kernel_size=3).apply(image, torch.tensor([[1.0]]))
    torch.testing.assert_close(out[0, 0, 1:4, 1:4], kernel[:, None] * kernel, rtol=0, atol=1e-6)
    assert out[0, 0, 0].abs().max() == 0


def test_path_scales_sigma():
    images = torch.rand(2, 3, 20, 31, generator=torch.Generator().manual_seed(0))
    sigma, fractions = torch.tensor([[2.0], [0.9]]), torch.tensor([1 / 3, 2 / 3, 1.0])
    path = GaussianBlurFamily().path(images, sigma, fractions)
    for i in range(2):
        for k, fraction in enumerate(fractions.tolist()):
            planes = images[i].double().numpy()
            expected = [ndimage.gaussian_filter(p, sigma[i].item() * fraction, radius=6, mode="mirror") for p in planes]
            np.testing.assert_allclose(path[i, k].numpy(), np.stack(expected), atol=1e-6)


def test_below_the_threshold_the_image_is_returned():
    images = torch.rand(2, 3, 16, 16)
    path = GaussianBlurFamily().path(images, torch.tensor([[0.1], [1.0]]), torch.tensor([0.04, 0.49, 1.0]))
    assert torch.equal(path[0, 0], images[0])
    assert torch.equal(path[0, 1], images[0])
    assert torch.equal(path[1, 0], images[1])  # sigma 0.04
    assert (path[1, 1] - images[1]).abs().max() > 0.1


def test_a_constant_image_stays_constant():
    out = GaussianBlurFamily().apply(torch.full((1, 3, 16, 16), 0.37), torch.tensor([[2.0]]))
    torch.testing.assert_close(out, torch.full_like(out, 0.37), rtol=0, atol=1e-6)


def test_targets():
    family = GaussianBlurFamily()
    torch.testing.assert_close(
        family.targets(torch.tensor([[0.1], [1.05], [2.0]])), torch.tensor([[-1.0], [0.0], [1.0]])
    )
    torch.testing.assert_close(family.sample(torch.tensor([[0.0], [0.5]])), torch.tensor([[0.1], [1.05]]))
