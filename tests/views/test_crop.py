"""The crop family against PIL, against a loop over tries, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_equissl.views import CropFamily


def loop_sample(draws: list[float], scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[float, ...]:
    """RandomResizedCrop's rule on the unit square, one try after the other."""
    for area_draw, ratio_draw in zip(draws[:10], draws[10:20], strict=True):
        area = scale[0] + (scale[1] - scale[0]) * area_draw
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * ratio_draw)
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if width <= 1 and height <= 1:
            return (1 - height) * draws[20], (1 - width) * draws[21], height, width
    width, height = 1.0, 1.0
    if ratio[0] > 1:
        height = 1 / ratio[0]
    elif ratio[1] < 1:
        width = ratio[1]
    return (1 - height) / 2, (1 - width) / 2, height, width


@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.85, 1.0), (0.5, 2.0)), ((0.9, 1.0), (1.5, 2.0)), ((0.9, 1.0), (0.25, 0.5))],
)
def test_boxes_equal_the_loop(scale, ratio):
    draws = torch.rand(500, 22, generator=torch.Generator().manual_seed(0))
    boxes = CropFamily(scale, ratio).sample(draws)
    expected = torch.tensor([loop_sample(row, scale, ratio) for row in draws.double().tolist()])
    torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-5)


def test_boxes_have_the_distribution_of_random_resized_crop():
    boxes = CropFamily().sample(torch.rand(20_000, 22, generator=torch.Generator().manual_seed(1))).double()
    top, left, height, width = boxes.unbind(1)
    area, log_ratio = height * width, torch.log(width / height)
    assert area.min() >= 0.08 - 1e-6
    assert log_ratio.abs().max() <= math.log(4 / 3) + 1e-5
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height).max() <= 1 + 1e-6
    assert (left + width).max() <= 1 + 1e-6
    # Areas up to 3/4 fit with every ratio, so among them the area stays uniform and the ratio log-uniform.
    small = area < 0.75
    assert area[small].mean().item() == pytest.approx((0.08 + 0.75) / 2, abs=0.01)
    assert log_ratio[small].var().item() == pytest.approx((2 * math.log(4 / 3)) ** 2 / 12, rel=0.05)
    free = small & (area > 0.1)
    assert (top / (1 - height))[free].mean().item() == pytest.approx(0.5, abs=0.01)


def test_hand_computed_crop():
    """The left half of a row of four, enlarged to four: positions 0 - 0.25, 0.25, 0.75, 1.25 of the input."""
    image = torch.tensor([0.0, 0.4, 0.8, 1.0]).expand(1, 3, 4, 4)
    out = CropFamily().apply(image, torch.tensor([[0.0, 0.0, 1.0, 0.5]]))
    # The neighbour of position 1.25 lies outside the box but inside the image, and counts.
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([0.0, 0.1, 0.3, 0.5]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 40), (32, 48)])
def test_equals_pil_resize_of_the_box(smooth_images, size):
    height, width = size
    images = (smooth_images(1, height, width) * 255).round() / 255
    for box in ([0.1, 0.25, 0.5, 0.6], [0.0, 0.0, 0.3, 0.3], [0.33, 0.41, 0.667, 0.59]):
        ours = CropFamily().apply(images, torch.tensor([box]))[0]
        top, left, box_height, box_width = box
        edges = (left * width, top * height, (left + box_width) * width, (top + box_height) * height)
        pil = Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy())
        expected = np.asarray(pil.resize((width, height), Image.Resampling.BILINEAR, box=edges)) / 255
        np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=0.006)


def test_path_interpolates_the_box(smooth_images):
    images, family = smooth_images(1, 32, 32), CropFamily()
    box = torch.tensor([[0.2, 0.4, 0.5, 0.6]])
    half = family.apply(images, box, 0.5)
    torch.testing.assert_close(half, family.apply(images, torch.tensor([[0.1, 0.2, 0.75, 0.8]])), rtol=0, atol=1e-5)


def test_targets():
    family = CropFamily()
    low = math.sqrt(0.08 * 3 / 4)
    corners = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1 - low, 1 - low, low, low]])
    expected = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]])
    torch.testing.assert_close(family.targets(corners), expected, rtol=0, atol=1e-5)
