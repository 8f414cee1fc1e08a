"""SE(2): one resampling, both paths, against scipy and the matrix exponential."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from hf_equissl.views import RotationFamily, SE2Family, TranslationFamily
from hf_equissl.views.se2 import geodesic_shift

PARAMETERS = torch.tensor([[45.0, 3.0, -2.0], [-30.0, -7.5, 4.0], [10.0, 0.0, 9.0]])


def test_hand_computed_image():
    """A quarter turn counter-clockwise, then one pixel right."""
    image = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    moved = torch.tensor([[0.0, 0.3, 0.6], [0.0, 0.2, 0.5], [0.0, 0.1, 0.4]])
    family = SE2Family(max_degrees=90, unit="pixels")
    out = family.apply(image.expand(1, 3, 3, 3), torch.tensor([[90.0, 1.0, 0.0]]))
    torch.testing.assert_close(out[0, 0], moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("fraction", [0.4, 1.0])
def test_linear_path_equals_scipy(smooth_images, scipy_rigid, size, fraction):
    images = smooth_images(3, *size)
    ours = SE2Family(unit="pixels").apply(images, PARAMETERS, fraction)
    for i in range(3):
        expected = scipy_rigid(images[i].double().numpy(), *(PARAMETERS[i].double() * fraction).tolist())
        np.testing.assert_allclose(ours[i].numpy(), expected, atol=2e-5)


def test_without_shift_or_angle_it_is_the_simpler_family(smooth_images):
    images, fractions = smooth_images(1, 32, 32), torch.tensor([0.5, 1.0])
    rotated = SE2Family().path(images, torch.tensor([[20.0, 0.0, 0.0]]), fractions)
    shifted = SE2Family().path(images, torch.tensor([[0.0, 7.0, -3.0]]), fractions)
    torch.testing.assert_close(rotated, RotationFamily().path(images, torch.tensor([[20.0]]), fractions))
    torch.testing.assert_close(shifted, TranslationFamily().path(images, torch.tensor([[7.0, -3.0]]), fractions))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_geodesic_shift_equals_the_matrix_exponential(fraction):
    for degrees, tx, ty in [*PARAMETERS.double().tolist(), [0.0, 2.0, 3.0], [170.0, 5.0, 1.0]]:
        angle = np.deg2rad(degrees)
        g = np.array([[np.cos(angle), np.sin(angle), tx], [-np.sin(angle), np.cos(angle), ty], [0, 0, 1]])
        expected = linalg.expm(fraction * linalg.logm(g).real)[:2, 2]
        values = (torch.tensor([[v]], dtype=torch.float64) for v in (angle, tx, ty, fraction))
        ours = [v.item() for v in geodesic_shift(*values)]
        np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_geodesic_path_equals_scipy_and_ends_at_g(smooth_images, scipy_rigid):
    images, fraction = smooth_images(3, 24, 40), 0.4
    geodesic, linear = SE2Family(path="geodesic", unit="pixels"), SE2Family(unit="pixels")
    assert torch.equal(geodesic.apply(images, PARAMETERS), linear.apply(images, PARAMETERS))
    assert torch.equal(geodesic.apply(images, PARAMETERS, 0.0), images)
    ours = geodesic.apply(images, PARAMETERS, fraction)
    for i, (degrees, tx, ty) in enumerate(PARAMETERS.double().tolist()):
        angle = np.deg2rad(degrees)
        g = np.array([[np.cos(angle), np.sin(angle), tx], [-np.sin(angle), np.cos(angle), ty], [0, 0, 1]])
        shift_x, shift_y = linalg.expm(fraction * linalg.logm(g).real)[:2, 2]
        expected = scipy_rigid(images[i].double().numpy(), degrees * fraction, shift_x, shift_y)
        np.testing.assert_allclose(ours[i].numpy(), expected, atol=2e-5)
    assert (ours - linear.apply(images, PARAMETERS, fraction)).abs().max() > 0.01


def test_units_scale_the_shift_alone(smooth_images):
    images = smooth_images(1, 112, 112)
    at_224 = SE2Family().apply(images, torch.tensor([[20.0, 8.0, -6.0]]))
    pixels = SE2Family(unit="pixels").apply(images, torch.tensor([[20.0, 4.0, -3.0]]))
    torch.testing.assert_close(at_224, pixels, rtol=0, atol=1e-5)


def test_targets():
    targets = SE2Family().targets(torch.tensor([[45.0, -5.0, 10.0]]))
    torch.testing.assert_close(targets, torch.tensor([[1.0, -0.5, 1.0]]))
