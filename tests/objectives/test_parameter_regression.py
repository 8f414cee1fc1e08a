from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_equissl.objectives.parameter_regression import ParameterRegressionObjective
from hf_equissl.views.facts import ViewFacts
from hf_equissl.views.needs import Needs

from .helpers import FACTS, encode, make_views, random_features, tiny_config, tiny_encoder

# What the battery builds it with.
SMALL = {"hidden_sizes": (12,)}


def build(**kwargs) -> ParameterRegressionObjective:
    torch.manual_seed(1)
    return ParameterRegressionObjective(tiny_config(), FACTS, **{**SMALL, **kwargs})


@pytest.mark.parametrize("crops", [2, 3])
def test_loss_equals_the_reference(crops):
    """Squared error of every parameter of every image, with loops in float64."""
    objective, config = build(hidden_sizes=(12, 7)), tiny_config()
    views = make_views(objective.needs, crops=crops)
    student = random_features(config, views)
    student.joined = student.tokens[:, :2, 0]  # two images more, which have no parameters
    weights = [parameter.detach().double().numpy() for parameter in objective.parameters()]
    total = 0.0
    for image in range(6):
        cls = student.tokens[:, image, 0]
        value = torch.cat([student.stem(cls[v], part="invariant") for v in (0, crops - 1)]).double().numpy()
        for number in range(0, len(weights), 2):
            value = weights[number] @ value + weights[number + 1]
            value = np.maximum(value, 0) if number + 2 < len(weights) else value
        total += sum((value[k] - views.normalized_parameters[image, k].item()) ** 2 for k in range(3))
    output = objective(student, None, views)
    assert output.loss.item() == pytest.approx(total / 18, rel=1e-5)
    theta = views.normalized_parameters.double().numpy()
    assert output.logs["parameter_std"].item() ** 2 == pytest.approx(theta.var(axis=0).mean(), rel=1e-5)


def test_gradient_reaches_the_invariant_rows_of_the_stem_alone():
    objective, encoder, config = build(), tiny_encoder(), tiny_config()
    views = make_views(objective.needs)
    objective(encode(encoder, views), None, views).loss.backward()
    (weight,) = (p for name, p in encoder.named_parameters() if "stem" in name and p.ndim == 2)
    assert weight.grad[: config.invariant_size].abs().max(dim=1).values.min() > 0
    assert weight.grad[config.invariant_size :].abs().max() == 0


def test_it_learns_to_tell_the_parameters_of_g():
    """It could not from one of the views, nor if it looked at another view than g was applied to."""
    objective, encoder = build(hidden_sizes=(64,)), tiny_encoder()
    views = make_views(objective.needs, batch=12)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=3e-3)
    for _ in range(60):
        output = objective(encode(encoder, views), None, views)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss < 0.1 * output.logs["parameter_std"] ** 2


def test_wrong_inputs():
    assert build().needs == Needs(parameters=True)
    with pytest.raises(ValueError, match=r"parameters of g, and there are none\. Name a transformation"):
        ParameterRegressionObjective(tiny_config(), ViewFacts())
    objective = build()
    views = make_views(objective.needs)
    student = random_features(tiny_config(), views)
    with pytest.raises(ValueError, match="no parameters of g"):
        objective(student, None, replace(views, normalized_parameters=None))
    with pytest.raises(ValueError, match="two global crops, v1 and v2"):
        objective(replace(student, tokens=student.tokens[:1]), None, views)
