from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_equissl.objectives.vicreg import VICRegObjective, covariance_term, invariance_term, variance_term
from hf_equissl.views.needs import Needs

from .helpers import encode, make_views, random_features, tiny_config, tiny_encoder

# What the battery builds it with.
SMALL = {"expander_sizes": (16, 16, 16)}


def reference(x: np.ndarray, y: np.ndarray, weights: tuple[float, float, float]) -> tuple[float, float, float]:
    """The three weighted terms with loops, in float64, from the equations."""
    images, width = x.shape
    invariance = sum((x[i, j] - y[i, j]) ** 2 for i in range(images) for j in range(width)) / (images * width)
    variance = covariance = 0.0
    for z in (x, y):
        means = [sum(z[i, j] for i in range(images)) / images for j in range(width)]

        def cov(a: int, b: int, z=z, means=means) -> float:
            return sum((z[i, a] - means[a]) * (z[i, b] - means[b]) for i in range(images)) / (images - 1)

        hinge = [max(0.0, 1 - math.sqrt(cov(j, j) + 1e-4)) for j in range(width)]
        variance += sum(hinge) / width / 2
        covariance += sum(cov(a, b) ** 2 for a in range(width) for b in range(width) if a != b) / width
    return weights[0] * invariance, weights[1] * variance, weights[2] * covariance


# More images than dimensions, and fewer: the covariance term takes the smaller of two matrices.
SHAPES = [(7, 5), (7, 12)]


def projections(shape: tuple[int, int] = SHAPES[0], scale: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return scale * rng.standard_normal(shape), scale * rng.standard_normal(shape) + 0.3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [(10, 10, 1), (25, 25, 1), (1, 2, 3)])
def test_terms_equal_the_reference(weights, shape):
    x, y = projections(shape)
    objective = VICRegObjective(tiny_config(), *weights, expander_sizes=(4,))
    output = objective._loss(torch.tensor(x), torch.tensor(y))
    expected = reference(x, y, weights)
    parts = [output.logs[f"loss_{name}"].item() for name in ("invariance", "variance", "covariance")]
    assert parts == pytest.approx(expected, rel=1e-9)
    assert output.loss.item() == pytest.approx(sum(expected), rel=1e-9)
    assert min(expected) > 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_equals_central_differences_of_the_reference(shape):
    x, y = projections(shape)
    tensor = torch.tensor(x, requires_grad=True)
    VICRegObjective(tiny_config(), 3, 2, 5, expander_sizes=(4,))._loss(tensor, torch.tensor(y)).loss.backward()
    for entry in [(0, 0), (3, 2), (6, 4), (2, 1)]:
        step = np.zeros_like(x)
        step[entry] = 1e-6
        difference = sum(reference(x + step, y, (3, 2, 5))) - sum(reference(x - step, y, (3, 2, 5)))
        assert tensor.grad[entry].item() == pytest.approx(difference / 2e-6, rel=1e-5)
        assert abs(tensor.grad[entry].item()) > 1e-3


def test_terms_of_known_matrices():
    z = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # variances and covariance are 2
    assert covariance_term(z).item() == pytest.approx((4 + 4) / 2)
    assert variance_term(z).item() == 0
    assert variance_term(torch.zeros(4, 3)).item() == pytest.approx(1 - 0.01)
    assert invariance_term(z, -z).item() == pytest.approx(4)


def test_one_dimension_has_no_covariance():
    assert covariance_term(torch.randn(6, 1)).item() == 0


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_and_the_expander_sees_one_view_at_a_time(pooling):
    config = tiny_config()
    objective = VICRegObjective(config, expander_sizes=(8, 4), pooling=pooling)
    views = make_views(Needs())
    student = random_features(config, views)
    pooled = [tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1) for tokens in student.tokens]
    z1, z2 = (objective.expander(student.stem(h, part="invariant")) for h in pooled)
    torch.testing.assert_close(objective(student, None, views).loss, objective._loss(z1, z2).loss)


def test_only_the_invariant_rows_of_the_stem_and_no_decoder_learn():
    config, encoder = tiny_config(), tiny_encoder()
    views = make_views(Needs())
    VICRegObjective(config, expander_sizes=(8, 4))(encode(encoder, views), None, views).loss.backward()
    (weight,) = (p for name, p in encoder.named_parameters() if "stem" in name and p.ndim == 2)
    assert weight.grad[: config.invariant_size].abs().max(dim=1).values.min() > 0
    assert weight.grad[config.invariant_size :].abs().max() == 0


def test_an_encoder_without_a_stem_gives_all_its_dimensions():
    config = tiny_config(feature_size=None, equivariant_size=None)
    encoder = tiny_encoder(config)
    views = make_views(Needs())
    objective = VICRegObjective(config, expander_sizes=(8, 4))
    assert objective.expander[0].in_features == config.hidden_size
    assert torch.isfinite(objective(encode(encoder, views), None, views).loss)


def test_collapse_is_visible():
    config, views = tiny_config(), make_views(Needs())
    objective = VICRegObjective(config, expander_sizes=(4,))
    student = random_features(config, views)
    student.tokens = student.tokens[:, :1].expand_as(student.tokens)  # every image alike
    logs = objective(student, None, views).logs
    assert logs["projection_std"].item() == pytest.approx(0, abs=1e-6)
    assert logs["loss_variance"].item() == pytest.approx(10 * 0.99, rel=1e-4)


def test_defaults_are_those_of_the_paper():
    objective = VICRegObjective(tiny_config())
    assert (objective.invariance_weight, objective.variance_weight, objective.covariance_weight) == (10, 10, 1)
    assert [m.out_features for m in objective.expander if isinstance(m, torch.nn.Linear)] == [1024, 1024, 1024]
    assert objective.needs == Needs()


@pytest.mark.parametrize("kwargs", [{"pooling": "max"}, {"variance_weight": -1}, {"expander_sizes": ()}])
def test_wrong_arguments(kwargs):
    with pytest.raises(ValueError, match=r"pooling|negative|positive layer width"):
        VICRegObjective(tiny_config(), **kwargs)


@pytest.mark.parametrize(
    ("crops", "batch", "message"), [(1, 4, "exactly 2"), (3, 4, "exactly 2"), (2, 1, "at least 2")]
)
def test_wrong_batches(crops, batch, message):
    views = make_views(Needs(), batch=batch, crops=crops)
    objective = VICRegObjective(tiny_config(), expander_sizes=(4, 4))
    with pytest.raises(ValueError, match=message):
        objective(random_features(tiny_config(), views), None, views)
