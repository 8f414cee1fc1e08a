"""Colour and blur functions against colorsys, PIL, scipy and kornia."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from hf_equissl.views import photometric as P


def rgb(seed: int = 0, batch: int = 4, size: tuple[int, int] = (17, 23)) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255


def test_hue_equals_colorsys():
    pixels = torch.rand(3000, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    pixels[:300] = (pixels[:300] * 2).round() / 2  # ties between channels: greys, primaries, secondaries
    turns = torch.rand(3000, generator=torch.Generator().manual_seed(1)) * 4 - 2
    turns[:100] = torch.tensor([0.5, -0.5, 1 / 6, 1 / 3, 1.0] * 20)
    ours = P.adjust_hue(pixels, turns)[..., 0, 0]
    expected = []
    for pixel, turn in zip(pixels[..., 0, 0].double().tolist(), turns.double().tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    np.testing.assert_allclose(ours.numpy(), np.array(expected), atol=3e-6)


def test_hue_by_hand():
    """A third of a turn takes red to green; a sixth takes red to yellow; grey stays."""
    red, grey = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.4, 0.4, 0.4])
    pixels = torch.stack((red, red, grey))[:, :, None, None]
    out = P.adjust_hue(pixels, torch.tensor([1 / 3, 1 / 6, 0.3]))[..., 0, 0]
    expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.4, 0.4, 0.4]])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_hue_equals_kornia():
    kornia = pytest.importorskip("kornia")
    images, turns = rgb(), torch.tensor([0.1, -0.1, 0.33, -0.45])
    expected = kornia.enhance.adjust_hue(images, turns * 2 * torch.pi)
    torch.testing.assert_close(P.adjust_hue(images, turns), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.4])
@pytest.mark.parametrize(
    ("ours", "enhancer"),
    [
        (P.adjust_brightness, ImageEnhance.Brightness),
        (P.adjust_contrast, ImageEnhance.Contrast),
        (P.adjust_saturation, ImageEnhance.Color),
    ],
)
def test_enhancements_agree_with_pil(ours, enhancer, factor):
    images = (rgb(batch=1) * 255).round() / 255
    expected = from_pil(enhancer(to_pil(images[0])).enhance(factor))
    # 8 bits: PIL rounds the luma (or its mean) and the result.
    torch.testing.assert_close(ours(images, torch.tensor([factor]))[0], expected, rtol=0, atol=2.1 / 255)


def test_contrast_uses_the_mean_luma_of_each_image():
    images, factors = rgb().double(), torch.tensor([0.5, 0.9, 1.0, 1.3])
    luma = 0.2989 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    mean = luma.mean((1, 2))[:, None, None, None]
    factor = factors.double()[:, None, None, None]
    expected = (factor * images + (1 - factor) * mean).clamp(0, 1)
    torch.testing.assert_close(P.adjust_contrast(images, factors).double(), expected, rtol=0, atol=1e-6)


def test_saturation_by_hand():
    pixel = torch.tensor([0.8, 0.4, 0.2])[None, :, None, None]
    luma = 0.2989 * 0.8 + 0.587 * 0.4 + 0.114 * 0.2  # 0.49672
    out = P.adjust_saturation(pixel, torch.tensor([0.5]))[0, :, 0, 0]
    expected = torch.tensor([(value + luma) / 2 for value in (0.8, 0.4, 0.2)])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    grey = P.to_grayscale(pixel)
    torch.testing.assert_close(grey, P.adjust_saturation(pixel, torch.tensor([0.0])))
    torch.testing.assert_close(grey[0, :, 0, 0], torch.full((3,), luma), rtol=0, atol=1e-6)


def test_solarize_agrees_with_pil_and_takes_a_threshold_per_sample():
    images = (rgb(batch=1) * 255).round() / 255
    expected = from_pil(ImageOps.solarize(to_pil(images[0]), threshold=128))
    torch.testing.assert_close(P.solarize(images, 128 / 255)[0], expected, rtol=0, atol=1e-6)
    images = rgb(batch=2)
    out = P.solarize(images, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(out[0], torch.where(images[0] >= 0.5, 1 - images[0], images[0]))
    assert torch.equal(out[1], images[1])


def test_neutral_strengths_are_the_identity_bit_for_bit():
    images, one, zero = rgb(), torch.ones(4), torch.zeros(4)
    assert torch.equal(P.adjust_brightness(images, one), images)
    assert torch.equal(P.adjust_contrast(images, one), images)
    assert torch.equal(P.adjust_saturation(images, one), images)
    assert torch.equal(P.adjust_hue(images, zero), images)
    assert torch.equal(P.gaussian_blur(images, zero), images)
    assert torch.equal(P.solarize(images, 2.0), images)
    # One neutral sample among others.
    out = P.color_jitter(images, *(torch.tensor([0.7, 1.0, 1.2, 0.9]),) * 3, torch.tensor([0.1, 0.0, -0.1, 0.05]))
    assert torch.equal(out[1], images[1])
    assert (out[0] != images[0]).any()


def test_color_jitter_is_the_four_functions_in_order():
    images = rgb(batch=5)
    strengths = [torch.linspace(0.6, 1.4, 5), torch.linspace(1.4, 0.6, 5), torch.linspace(0.7, 1.3, 5)]
    turns = torch.linspace(-0.1, 0.1, 5)
    expected = P.adjust_brightness(images, strengths[0])
    expected = P.adjust_contrast(expected, strengths[1])
    expected = P.adjust_saturation(expected, strengths[2])
    expected = P.adjust_hue(expected, turns)
    torch.testing.assert_close(P.color_jitter(images, *strengths, turns), expected, rtol=0, atol=1e-6)


def test_chunks_do_not_change_the_result(monkeypatch):
    images, turns, sigma = rgb(batch=7), torch.linspace(-0.4, 0.4, 7), torch.linspace(0, 2, 7)
    whole = P.adjust_hue(images, turns), P.gaussian_blur(images, sigma)
    monkeypatch.setattr(P, "CPU_CHUNK", 2 * images[0].numel())
    assert torch.equal(P.adjust_hue(images, turns), whole[0])
    assert torch.equal(P.gaussian_blur(images, sigma), whole[1])


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_equals_scipy(sigma):
    images = rgb(batch=1)
    ours = P.gaussian_blur(images, torch.tensor([sigma]), kernel_size=13)[0]
    # "mirror" is scipy's name of a reflection that does not repeat the border pixel.
    expected = [ndimage.gaussian_filter(plane, sigma, radius=6, mode="mirror") for plane in images[0].double().numpy()]
    np.testing.assert_allclose(ours.numpy(), np.stack(expected), atol=1e-6)


def test_blur_equals_kornia():
    kornia = pytest.importorskip("kornia")
    images, sigma = rgb(batch=3), torch.tensor([0.4, 1.0, 1.9])
    expected = kornia.filters.gaussian_blur2d(images, (13, 13), torch.stack((sigma, sigma), 1), "reflect")
    torch.testing.assert_close(P.gaussian_blur(images, sigma), expected, rtol=0, atol=1e-5)


def test_blur_refuses_even_kernels_and_too_small_images():
    with pytest.raises(ValueError, match="kernel_size=12: expected an odd number"):
        P.gaussian_blur(torch.rand(1, 3, 20, 20), torch.ones(1), kernel_size=12)
    with pytest.raises(ValueError, match="kernel_size 13 needs images of at least 7 pixels, not 6 x 20"):
        P.gaussian_blur(torch.rand(1, 3, 6, 20), torch.ones(1))
    assert P.gaussian_blur(torch.rand(1, 3, 7, 20), torch.ones(1)).shape == (1, 3, 7, 20)


def test_grey_images_have_neither_saturation_nor_hue():
    grey, factor = torch.rand(2, 1, 8, 8), torch.tensor([0.5, 1.3])
    torch.testing.assert_close(P.adjust_saturation(grey, factor), grey, rtol=0, atol=1e-6)
    assert torch.equal(P.adjust_hue(grey, factor), grey)
    assert torch.equal(P.to_grayscale(grey), grey)
    assert P.color_jitter(grey, factor, factor, factor, factor).shape == grey.shape
    with pytest.raises(ValueError, match="4 channels"):
        P.adjust_hue(torch.rand(1, 4, 8, 8), torch.zeros(1))
