from __future__ import annotations

import pytest
import torch

from hf_equissl.objectives.koleo import koleo_loss

from . import distillation_reference as reference


def representations(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(8))
    return (x * torch.linspace(0.5, 3, 7)[:, None]).to(dtype)  # lengths say nothing


def test_equals_brute_force():
    expected = reference.koleo(representations().double().numpy())
    assert koleo_loss(representations()).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_equals_central_differences_of_brute_force():
    x = representations().requires_grad_(True)
    koleo_loss(x).backward()
    for entry in [(0, 0, 0), (1, 3, 2), (0, 6, 4)]:
        step = torch.zeros(x.shape, dtype=torch.float64)
        step[entry] = 1e-6
        values = [reference.koleo((x.detach().double() + sign * step).numpy()) for sign in (1, -1)]
        assert x.grad[entry].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-5)
    assert x.grad.abs().max() > 0.1


def test_views_do_not_see_each_other():
    x = representations()
    parts = koleo_loss(x[:1]) + koleo_loss(x[1:])
    torch.testing.assert_close(koleo_loss(x), parts)
    torch.testing.assert_close(koleo_loss(x[:1].expand(2, -1, -1)), 2 * koleo_loss(x[:1]))  # not its own neighbour


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    x = representations(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(x)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.koleo(x.double().numpy()), rel=1e-4)


def test_equal_images_stay_finite():
    x = torch.ones(2, 3, 4).requires_grad_(True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() > 2 * 15  # -log of about 1e-8, twice
    assert torch.isfinite(x.grad).all()


def test_a_single_image_is_refused():
    with pytest.raises(ValueError, match="at least 2 images"):
        koleo_loss(representations()[:, :1])
