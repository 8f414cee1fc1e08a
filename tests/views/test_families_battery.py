"""One battery for every transformation family in the registry; new entries join by being registered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from hf_equissl.views import TRANSFORMATIONS, TransformationFamily, build_transformation
from hf_equissl.views.uniform import UniformFamily

SIZES = [(32, 32), (24, 40)]


MEMBERS = [{"name": "rotation"}, {"name": "crop"}, {"name": "color_jitter"}]
ENTRIES = [{"name": name} for name in sorted(TRANSFORMATIONS)]
ENTRIES += [{"name": name, "families": MEMBERS} for name in ("joint", "one_of")]


@pytest.fixture(params=ENTRIES, ids=lambda entry: entry["name"])
def family(request: pytest.FixtureRequest) -> TransformationFamily:
    return build_transformation(**request.param)


def test_the_identity_has_its_parameters_and_changes_nothing(family):
    images, parameters = make(family)
    identity = torch.tensor([family.identity_parameters]).expand_as(parameters)
    torch.testing.assert_close(family.apply(images, identity), images, atol=1e-5, rtol=0)


def make(family: TransformationFamily, batch: int = 6, size: tuple[int, int] = (32, 32), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, *size, generator=generator)
    draws = torch.rand(batch, family.num_draws, generator=generator)
    return images, family.sample(draws)


def path_fractions(family: TransformationFamily) -> torch.Tensor:
    return torch.tensor([0.0, 1 / 3, 2 / 3, 1.0] if family.continuous else [0.0, 1.0])


@pytest.mark.parametrize("size", SIZES)
def test_fraction_zero_is_the_identity_and_one_is_g(family, size):
    images, parameters = make(family, size=size)
    path = family.path(images, parameters, path_fractions(family))
    assert path.shape == (6, len(path_fractions(family)), 3, *size)
    assert path.dtype == torch.float32
    assert torch.equal(path[:, 0], images)
    assert torch.equal(family.apply(images, parameters, 0.0), images)
    assert torch.equal(path[:, -1], family.apply(images, parameters))
    assert (path[:, -1] != images).any()


def test_same_parameters_same_image_and_inputs_untouched(family):
    images, parameters = make(family)
    before = images.clone(), parameters.clone()
    fractions = path_fractions(family)
    assert torch.equal(family.path(images, parameters, fractions), family.path(images, parameters, fractions))
    assert torch.equal(images, before[0])
    assert torch.equal(parameters, before[1])


@pytest.mark.parametrize("size", SIZES)
def test_batch_equals_its_samples_one_by_one(family, size):
    images, parameters = make(family, batch=37, size=size)  # not a multiple of any vector or chunk length
    fractions = path_fractions(family)
    batch = family.path(images, parameters, fractions)
    single = [family.path(images[i : i + 1], parameters[i : i + 1], fractions) for i in range(37)]
    torch.testing.assert_close(batch, torch.cat(single), rtol=0, atol=1e-6)
    draws = torch.rand(37, family.num_draws)
    torch.testing.assert_close(
        family.sample(draws), torch.cat([family.sample(draws[i : i + 1]) for i in range(37)]), rtol=1e-6, atol=1e-6
    )


def test_a_fraction_does_not_depend_on_its_neighbours(family):
    images, parameters = make(family, batch=3)
    fractions = path_fractions(family)
    path = family.path(images, parameters, fractions)
    for k, fraction in enumerate(fractions.tolist()):
        assert torch.equal(path[:, k], family.apply(images, parameters, fraction))


def test_parameters_are_reproducible_from_draws(family):
    draws = torch.rand(50, family.num_draws)
    parameters = family.sample(draws)
    assert parameters.shape == (50, family.num_parameters)
    assert parameters.dtype == torch.float32
    assert family.num_parameters == len(family.parameter_names)
    assert torch.equal(parameters, family.sample(draws.clone()))
    state = torch.get_rng_state()
    family.sample(draws)
    assert torch.equal(state, torch.get_rng_state())


def test_wrong_number_of_draws_is_refused(family):
    with pytest.raises(ValueError, match="draws have shape"):
        family.sample(torch.rand(4, family.num_draws + 1))


def test_targets_are_normalised(family):
    draws = torch.rand(20_000, family.num_draws, generator=torch.Generator().manual_seed(1))
    targets = family.targets(family.sample(draws))
    assert targets.shape == (20_000, family.num_parameters)
    assert targets.abs().max() <= 1.001
    assert (targets.amax(0) > 0.8).all()
    assert (targets.amin(0) < -0.8).all()


def test_parameters_are_uniform_and_independent(family):
    if not isinstance(family, UniformFamily):
        pytest.skip("not uniform by design; see its own test")
    draws = torch.rand(5000, family.num_draws, generator=torch.Generator().manual_seed(2))
    targets = family.targets(family.sample(draws)).double().numpy()
    for column in targets.T:
        assert stats.kstest(column, "uniform", args=(-1, 2)).pvalue > 1e-3
    if targets.shape[1] > 1:
        correlation = np.corrcoef(targets.T) - np.eye(targets.shape[1])
        assert np.abs(correlation).max() < 0.06


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_output_stays_in_the_unit_interval(family, value):
    images, parameters = make(family, batch=16)
    images[:8] = images[:8].round()  # black and white overshoot most easily
    images[8:] = value
    path = family.path(images, parameters, path_fractions(family))
    assert path.min() >= 0
    assert path.max() <= 1


def test_half_precision_images_are_computed_in_fp32(family):
    images, parameters = make(family)
    images = images.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = family.apply(images, parameters)
    assert out.dtype == torch.float32
    assert torch.equal(out, family.apply(images.float(), parameters))


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)])
def test_wrong_images_are_refused(family, images):
    parameters = family.sample(torch.rand(2, family.num_draws))
    with pytest.raises(ValueError, match="expected"):
        family.path(images, parameters, torch.tensor([1.0]))


def test_nothing_is_read_back_to_the_host(family):
    """Meta tensors have no values: .item(), nonzero and boolean indexing all fail on them."""
    draws = torch.empty(2, family.num_draws, device="meta")
    parameters = family.sample(draws)
    path = family.path(torch.empty(2, 3, 16, 16, device="meta"), parameters, path_fractions(family))
    assert path.device.type == "meta"
    assert path.shape == (2, len(path_fractions(family)), 3, 16, 16)
    assert family.targets(parameters).shape == (2, family.num_parameters)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu_and_never_waits(family):
    images, parameters = make(family)
    fractions = path_fractions(family)
    on_device = images.cuda(), parameters.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        path = family.path(*on_device, fractions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(path.cpu(), family.path(images, parameters, fractions), rtol=0, atol=1e-4)
    assert torch.equal(path[:, 0].cpu(), images)


def test_registry_names_the_nearest_name_and_keyword():
    with pytest.raises(ValueError, match=r"there is no 'rotaton'\. Did you mean 'rotation'\? Valid: rotation, tr"):
        build_transformation("rotaton")
    with pytest.raises(ValueError, match=r"unknown key 'max_degree'\. Did you mean 'max_degrees'\?.*interp"):
        build_transformation("rotation", max_degree=30)
    assert build_transformation("rotation", max_degrees=30).max_degrees == 30


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rotation", {"max_degrees": -1}),
        ("rotation", {"max_degrees": 181}),
        ("rotation", {"max_degrees": float("nan")}),
        ("rotation", {"max_degrees": "45"}),
        ("rotation", {"fill": "black"}),
        ("rotation", {"interpolation": "linear"}),
        ("translation", {"unit": "percent"}),
        ("translation", {"unit": "fraction"}),  # the default of 10 would be ten image widths
        ("translation", {"max_shift": -2}),
        ("se2", {"path": "straight"}),
        ("color_jitter", {"brightness": 1.5}),
        ("color_jitter", {"hue": 0.6}),
        ("color_jitter", {"saturation": True}),
        ("gaussian_blur", {"kernel_size": 12}),
        ("gaussian_blur", {"kernel_size": 0}),
        ("gaussian_blur", {"min_sigma": 3.0}),
        ("gaussian_blur", {"min_sigma": -0.1}),
        ("crop", {"scale": (0.0, 1.0)}),
        ("crop", {"scale": (0.5, 0.2)}),
        ("crop", {"ratio": 1.0}),
        ("flip", {"p": 1.1}),
    ],
)
def test_impossible_values_are_refused_at_construction(name, options):
    with pytest.raises(ValueError, match=r"expected|comes first"):
        build_transformation(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rotation", {"max_degrees": 0}),
        ("translation", {"max_shift": 0}),
        ("se2", {"max_degrees": 0, "max_shift": 0}),
        ("color_jitter", {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}),
        ("gaussian_blur", {"min_sigma": 1.0, "max_sigma": 1.0}),
        ("crop", {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}),
    ],
)
def test_an_empty_range_gives_zero_targets(name, options):
    family = build_transformation(name, **options)
    assert torch.equal(
        family.targets(family.sample(torch.rand(5, family.num_draws))), torch.zeros(5, family.num_parameters)
    )
