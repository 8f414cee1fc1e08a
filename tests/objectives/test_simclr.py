from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_equissl.objectives.contrast import nt_xent
from hf_equissl.objectives.simclr import SimCLRObjective
from hf_equissl.views.needs import Needs

from .helpers import encode, make_views, random_features, tiny_config, tiny_encoder

# What the battery builds it with.
SMALL = {"projector_sizes": (16, 8)}


def reference(x: np.ndarray, y: np.ndarray, temperature: float) -> float:
    """Eq. 1 with loops, in float64: every view asks, all others answer."""
    views = [row / math.sqrt(float(row @ row)) for row in (*x, *y)]
    total = 0.0
    for i, asking in enumerate(views):
        other = (i + len(x)) % len(views)
        scores = {k: math.exp(float(asking @ view) / temperature) for k, view in enumerate(views) if k != i}
        total -= math.log(scores[other] / sum(scores.values()))
    return total / len(views)


def projections() -> np.ndarray:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((5, 4))
    return np.stack([first, 2 * first + rng.standard_normal((5, 4))])  # lengths say nothing


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_equals_the_reference(temperature):
    z = projections()
    loss, accuracy = nt_xent(torch.tensor(z), temperature)
    assert loss.item() == pytest.approx(reference(*z, temperature), rel=1e-9)
    assert 0 < accuracy < 1


def test_gradient_equals_central_differences_of_the_reference():
    z = projections()
    tensor = torch.tensor(z, requires_grad=True)
    nt_xent(tensor, 0.5)[0].backward()
    for entry in [(0, 0, 0), (1, 3, 2), (0, 4, 3)]:
        step = np.zeros_like(z)
        step[entry] = 1e-6
        difference = reference(*(z + step), 0.5) - reference(*(z - step), 0.5)
        assert tensor.grad[entry].item() == pytest.approx(difference / 2e-6, rel=1e-5)
        assert abs(tensor.grad[entry].item()) > 1e-3


def test_known_values():
    alike, _ = nt_xent(torch.ones(2, 6, 3), 0.1)
    assert alike.item() == pytest.approx(math.log(11))  # 12 views, 11 to choose from
    apart, accuracy = nt_xent(torch.eye(4).expand(2, 4, 4), 0.5)
    assert apart.item() == pytest.approx(math.log(1 + 6 * math.exp(-2)))
    assert accuracy == 1


def test_the_projector_sees_one_view_at_a_time_and_only_the_invariant_part():
    config, encoder, views = tiny_config(), tiny_encoder(), make_views(Needs())
    objective = SimCLRObjective(config, **SMALL)
    student = random_features(config, views)
    z = torch.stack([objective.projector(student.stem(tokens[:, 0], part="invariant")) for tokens in student.tokens])
    output = objective(student, None, views)
    torch.testing.assert_close(output.loss, nt_xent(z, 0.1)[0])
    torch.testing.assert_close(output.projections, z)
    objective(encode(encoder, views), None, views).loss.backward()
    gradient = encoder.stem.weight.grad.abs().amax(dim=1)
    assert gradient[: config.invariant_size].min() > 0
    assert gradient[config.invariant_size :].max() == 0


def test_defaults_are_those_of_the_paper():
    objective = SimCLRObjective(tiny_config())
    assert objective.temperature == 0.1
    assert [m.out_features for m in objective.projector if isinstance(m, torch.nn.Linear)] == [2048, 128]
    assert objective.needs == Needs()
    assert not objective.state_dict().keys() & {"projector.1.running_mean", "projector.0.bias"}


@pytest.mark.parametrize(
    ("crops", "batch", "message"), [(1, 4, "exactly 2"), (3, 4, "exactly 2"), (2, 1, "at least 2")]
)
def test_wrong_batches_and_temperatures(crops, batch, message):
    views = make_views(Needs(), batch=batch, crops=crops)
    objective = SimCLRObjective(tiny_config(), **SMALL)
    with pytest.raises(ValueError, match=message):
        objective(random_features(tiny_config(), views), None, views)
    with pytest.raises(ValueError, match=r"`temperature` is 0, expected a value above 0"):
        SimCLRObjective(tiny_config(), temperature=0)
