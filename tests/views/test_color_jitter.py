"""The colour jitter family: a hand-computed image, and its path."""

from __future__ import annotations

import colorsys

import torch

from hf_equissl.views import ColorJitterFamily


def reference(image: torch.Tensor, offsets: list[float]) -> torch.Tensor:
    """The four steps on one image (3, H, W) in float64, pixel by pixel for the hue."""
    brightness, contrast, saturation, hue = offsets
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    image = (image.double() * (1 + brightness)).clamp(0, 1)
    image = ((1 + contrast) * image - contrast * (weights * image).sum(0).mean()).clamp(0, 1)
    image = ((1 + saturation) * image - saturation * (weights * image).sum(0)).clamp(0, 1)
    out = torch.empty_like(image)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*image[:, row, column].tolist())
            out[:, row, column] = torch.tensor(colorsys.hsv_to_rgb((h + hue) % 1, s, v), dtype=torch.float64)
    return out


def test_hand_computed_image():
    """Brightness x 1.2; contrast x 0.5 about the mean luma; no saturation; hue half a turn."""
    image = torch.tensor([[[0.5, 0.0]], [[0.25, 0.0]], [[0.0, 0.0]]])[None]  # an orange and a black pixel
    # After brightness (0.6, 0.3, 0); luma 0.2989 * 0.6 + 0.587 * 0.3 = 0.35544, mean over both pixels 0.17772.
    # After contrast (0.38886, 0.23886, 0.08886) and 0.08886. Hue 30 degrees; opposite, 210: (min, middle, max).
    expected = torch.tensor([[[0.08886, 0.08886]], [[0.23886, 0.08886]], [[0.38886, 0.08886]]])
    family = ColorJitterFamily(hue=0.5, contrast=0.5)
    out = family.apply(image, torch.tensor([[0.2, -0.5, 0.0, 0.5]]))[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_path_scales_the_four_offsets():
    family = ColorJitterFamily()
    images = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    parameters = family.sample(torch.rand(3, 4, generator=torch.Generator().manual_seed(1)))
    fractions = torch.tensor([1 / 3, 2 / 3, 1.0])
    path = family.path(images, parameters, fractions)
    for i in range(3):
        for k, fraction in enumerate(fractions.tolist()):
            expected = reference(images[i], (parameters[i].double() * fraction).tolist())
            torch.testing.assert_close(path[i, k].double(), expected, rtol=0, atol=3e-6)


def test_parameters_keep_their_order_and_ranges():
    family = ColorJitterFamily(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.05)
    smallest = family.sample(torch.zeros(1, 4))
    torch.testing.assert_close(smallest, torch.tensor([[-0.1, -0.2, -0.3, -0.05]]))
    torch.testing.assert_close(family.targets(smallest), -torch.ones(1, 4))
    assert family.parameter_names == ("brightness", "contrast", "saturation", "hue")
