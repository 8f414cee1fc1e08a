"""Translation by hand, against scipy and PIL."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from hf_equissl.views import TranslationFamily


def test_hand_computed_shift():
    """One pixel right, half a pixel down: each value is the mean of the two above it on the left."""
    image = torch.tensor([[0.2, 0.4, 0.6], [0.4, 0.6, 0.8], [0.0, 0.2, 1.0]])
    shifted = torch.tensor([[0.0, 0.1, 0.2], [0.0, 0.3, 0.5], [0.0, 0.2, 0.4]])
    family = TranslationFamily(unit="pixels")
    out = family.apply(image.expand(1, 3, 3, 3), torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(out[0, 0], shifted, rtol=0, atol=1e-6)


def test_equals_scipy_at_every_fraction(smooth_images, scipy_rigid):
    images, shifts = smooth_images(2, 24, 40), torch.tensor([[3.7, -2.2], [-8.1, 9.9]])
    fractions = torch.tensor([0.25, 0.5, 1.0])
    ours = TranslationFamily(unit="pixels").path(images, shifts, fractions)
    for i in range(2):
        for k, fraction in enumerate(fractions.tolist()):
            tx, ty = (shifts[i] * fraction).tolist()
            expected = scipy_rigid(images[i].double().numpy(), 0, tx, ty)
            np.testing.assert_allclose(ours[i, k].numpy(), expected, atol=2e-5)


def test_whole_pixels_agree_with_pil(smooth_images):
    images = (smooth_images(1, 32, 32) * 255).round() / 255
    ours = TranslationFamily(unit="pixels").apply(images, torch.tensor([[5.0, -3.0]]))[0]
    pil = Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy())
    # PIL's coefficients map output to input: x_in = x_out - tx.
    moved = pil.transform(pil.size, Image.Transform.AFFINE, (1, 0, -5, 0, 1, 3))
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), np.asarray(moved) / 255, atol=1e-4)


def test_units_mean_the_same_motion(smooth_images):
    images = smooth_images(1, 112, 56)
    at_224 = TranslationFamily().apply(images, torch.tensor([[8.0, 4.0]]))
    pixels = TranslationFamily(unit="pixels").apply(images, torch.tensor([[2.0, 2.0]]))
    fraction = TranslationFamily(unit="fraction", max_shift=0.1).apply(images, torch.tensor([[2 / 56, 2 / 112]]))
    torch.testing.assert_close(at_224, pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(fraction, pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels[..., 2:, 2:], images[..., :-2, :-2], rtol=0, atol=1e-4)


def test_targets():
    family = TranslationFamily()
    torch.testing.assert_close(family.targets(torch.tensor([[5.0, -10.0]])), torch.tensor([[0.5, -1.0]]))
