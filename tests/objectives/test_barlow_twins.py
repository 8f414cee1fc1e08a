from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_equissl.objectives.barlow_twins import BarlowTwinsObjective
from hf_equissl.views.needs import Needs

from .helpers import encode, make_views, random_features, tiny_config, tiny_encoder

# What the battery builds it with.
SMALL = {"projector_sizes": (16, 16, 16)}


def reference(x: np.ndarray, y: np.ndarray, weight: float) -> tuple[float, float]:
    """Both sums of eq. 1 with loops, in float64; dimensions are normalised as batch normalisation does (1e-5)."""
    images, width = x.shape

    def normalise(z: np.ndarray) -> np.ndarray:
        out = np.zeros_like(z)
        for j in range(width):
            mean = sum(z[b, j] for b in range(images)) / images
            variance = sum((z[b, j] - mean) ** 2 for b in range(images)) / images
            out[:, j] = [(z[b, j] - mean) / math.sqrt(variance + 1e-5) for b in range(images)]
        return out

    x, y = normalise(x), normalise(y)
    invariance = redundancy = 0.0
    for i in range(width):
        for j in range(width):
            c = sum(x[b, i] * y[b, j] for b in range(images)) / images
            if i == j:
                invariance += (1 - c) ** 2
            else:
                redundancy += c**2
    return invariance, weight * redundancy


def projections() -> np.ndarray:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((7, 5))
    return np.stack([first, 2 * first + rng.standard_normal((7, 5)) + 0.3])


def build(width: int, **kwargs) -> BarlowTwinsObjective:
    return BarlowTwinsObjective(tiny_config(), projector_sizes=(width,), **kwargs)


@pytest.mark.parametrize("weight", [0.0051, 1.0])
def test_terms_equal_the_reference(weight):
    z = projections()
    output = build(5, redundancy_weight=weight)._loss(torch.tensor(z))
    expected = reference(*z, weight)
    parts = [output.logs[f"loss_{name}"].item() for name in ("invariance", "redundancy")]
    assert parts == pytest.approx(expected, rel=1e-9)
    assert output.loss.item() == pytest.approx(sum(expected), rel=1e-9)
    assert min(expected) > 1e-3


def test_gradient_equals_central_differences_of_the_reference():
    z = projections()
    tensor = torch.tensor(z, requires_grad=True)
    build(5, redundancy_weight=0.5)._loss(tensor).loss.backward()
    for entry in [(0, 0, 0), (1, 3, 2), (0, 6, 4)]:
        step = np.zeros_like(z)
        step[entry] = 1e-6
        difference = sum(reference(*(z + step), 0.5)) - sum(reference(*(z - step), 0.5))
        assert tensor.grad[entry].item() == pytest.approx(difference / 2e-6, rel=1e-5)
        assert abs(tensor.grad[entry].item()) > 1e-3


def test_known_values():
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # uncorrelated, of variance 1
    objective = build(2)
    assert objective._loss(torch.stack([signs, signs])).loss.item() == pytest.approx(0, abs=1e-6)
    opposite = objective._loss(torch.stack([signs, -signs])).logs
    assert opposite["loss_invariance"].item() == pytest.approx(2 * (1 + 1) ** 2, rel=1e-4)
    assert opposite["correlation"].item() == pytest.approx(-1, rel=1e-4)
    redundant = signs[:, :1].expand(4, 8)  # 8 times one dimension: all 8 * 7 entries beside the diagonal are 1
    logs = build(8)._loss(torch.stack([redundant, redundant])).logs
    assert logs["loss_redundancy"].item() == pytest.approx(0.0051 * 56, rel=1e-4)
    unrelated = build(2)._loss(torch.stack([signs[:, :1].expand(4, 2), signs[:, 1:].expand(4, 2)])).logs
    assert unrelated["loss_invariance"].item() == pytest.approx(2)  # d, as at the start


def test_the_projector_sees_one_view_at_a_time_and_only_the_invariant_part():
    config, encoder, views = tiny_config(), tiny_encoder(), make_views(Needs())
    objective = BarlowTwinsObjective(config, **SMALL)
    student = random_features(config, views)
    z = torch.stack([objective.projector(student.stem(tokens[:, 0], part="invariant")) for tokens in student.tokens])
    output = objective(student, None, views)
    torch.testing.assert_close(output.loss, objective._loss(z).loss)
    torch.testing.assert_close(output.projections, z)
    objective(encode(encoder, views), None, views).loss.backward()
    gradient = encoder.stem.weight.grad.abs().amax(dim=1)
    assert gradient[: config.invariant_size].min() > 0
    assert gradient[config.invariant_size :].max() == 0


def test_collapse_is_visible():
    config, views = tiny_config(), make_views(Needs())
    student = random_features(config, views)
    student.tokens = student.tokens[:, :1].expand_as(student.tokens)  # every image alike
    logs = BarlowTwinsObjective(config, projector_sizes=(4,))(student, None, views).logs
    assert logs["projection_std"].item() == pytest.approx(0, abs=1e-6)
    assert logs["loss_invariance"].item() == pytest.approx(4, rel=1e-3)


def test_defaults_are_those_of_the_paper():
    with torch.device("meta"):
        objective = BarlowTwinsObjective(tiny_config())
    assert objective.redundancy_weight == 0.0051
    assert [m.out_features for m in objective.projector if isinstance(m, torch.nn.Linear)] == [8192] * 3
    assert not any("bias" in name for name, _ in objective.projector[0].named_parameters())
    assert objective.needs == Needs()


@pytest.mark.parametrize(
    ("crops", "batch", "message"), [(1, 4, "exactly 2"), (3, 4, "exactly 2"), (2, 1, "at least 2")]
)
def test_wrong_batches_and_weights(crops, batch, message):
    views = make_views(Needs(), batch=batch, crops=crops)
    objective = BarlowTwinsObjective(tiny_config(), **SMALL)
    with pytest.raises(ValueError, match=message):
        objective(random_features(tiny_config(), views), None, views)
    with pytest.raises(ValueError, match=r"`redundancy_weight` is -1, expected 0 or more"):
        BarlowTwinsObjective(tiny_config(), redundancy_weight=-1)
