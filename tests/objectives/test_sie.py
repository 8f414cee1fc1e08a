from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_equissl.objectives.heads import HyperPredictor
from hf_equissl.objectives.sie import SIEObjective
from hf_equissl.objectives.vicreg import VICRegObjective
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views import build_transformation
from hf_equissl.views.needs import Needs

from .helpers import FACTS, encode, make_views, merge, random_features, run_processes, tiny_config, tiny_encoder

# What the battery builds it with.
SMALL = {"expander_sizes": (12, 12)}


def hinge(z: np.ndarray) -> float:
    """Mean over dimensions of max(0, 1 - standard deviation), with loops."""
    images, width = z.shape
    total = 0.0
    for j in range(width):
        mean = sum(z[i, j] for i in range(images)) / images
        variance = sum((z[i, j] - mean) ** 2 for i in range(images)) / (images - 1)
        total += max(0.0, 1 - math.sqrt(variance + 1e-4))
    return total / width


def redundancy(z: np.ndarray) -> float:
    """Squared covariances of different dimensions over the number of dimensions, with loops."""
    images, width = z.shape
    centred = [[z[i, j] - sum(z[k, j] for k in range(images)) / images for j in range(width)] for i in range(images)]
    total = 0.0
    for a in range(width):
        for b in range(width):
            if a != b:
                total += (sum(row[a] * row[b] for row in centred) / (images - 1)) ** 2
    return total / width


def squared_error(a: np.ndarray, b: np.ndarray) -> float:
    return sum((p - q) ** 2 for p, q in zip(a.ravel(), b.ravel(), strict=True)) / a.size


def reference(x, y, x_inv, y_inv, prediction) -> float:
    """SIE's whole loss, with its published weights, from the formula in float64."""
    both_x, both_y = np.concatenate([x_inv, x], axis=1), np.concatenate([y_inv, y], axis=1)
    return (
        10 * squared_error(x_inv, y_inv)
        + 4.5 * squared_error(prediction, y)
        + 10 * (hinge(both_x) + hinge(both_y)) / 2
        + 10 * hinge(prediction) / 2
        + redundancy(both_x)
        + redundancy(both_y)
    )


def embeddings(width: int = 5, width_inv: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(7, width)] * 2 + [(7, width_inv)] * 2 + [(7, width)]
    return [0.7 * rng.standard_normal(shape) + 0.2 for shape in shapes]


def tiny(**kwargs: Any) -> SIEObjective:
    torch.manual_seed(0)
    return SIEObjective(tiny_config(), FACTS, **{**SMALL, **kwargs})


def ours(x, y, x_inv, y_inv, prediction) -> torch.Tensor:
    """The same as two objectives: VICReg with its invariance alone, and SIE."""
    base = VICRegObjective(tiny_config(), 10, 0, 0, expander_sizes=(4,))._loss(x_inv, y_inv)
    return base.loss + tiny()._loss(x, y, prediction, base.projections).loss


def test_beside_an_invariance_term_it_is_the_published_loss_in_value_and_gradient():
    arrays = embeddings()
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    loss = ours(*tensors)
    assert loss.item() == pytest.approx(reference(*arrays), rel=1e-9)
    loss.backward()
    for number, entry in [(0, (2, 3)), (1, (0, 0)), (2, (6, 1)), (3, (4, 2)), (4, (5, 4))]:
        step = np.zeros_like(arrays[number])
        step[entry] = 1e-6
        up, down = ([a + sign * step if n == number else a for n, a in enumerate(arrays)] for sign in (1, -1))
        difference = (reference(*up) - reference(*down)) / 2e-6
        assert tensors[number].grad[entry].item() == pytest.approx(difference, rel=1e-5)
        assert abs(difference) > 1e-3


def test_without_projections_of_a_base_only_the_equivariant_part_is_regularised():
    x, y, _, _, prediction = embeddings()
    parts = tiny(variance_weight=3, covariance_weight=2)._loss(*map(torch.tensor, (x, y, prediction)), None).logs
    assert parts["loss_variance"].item() == pytest.approx(3 * (hinge(x) + hinge(y)) / 2)
    assert parts["loss_covariance"].item() == pytest.approx(2 * (redundancy(x) + redundancy(y)))
    assert parts["loss_prediction"].item() == pytest.approx(4.5 * squared_error(prediction, y))
    assert parts["mse_without_g"].item() == pytest.approx(squared_error(x, y))


def test_no_variance_of_the_prediction_is_an_option():
    x, y, x_inv, y_inv, prediction = map(torch.tensor, embeddings())
    projections = torch.stack([x_inv, y_inv])
    whole, without = (tiny(**options)._loss(x, y, prediction, projections) for options in ({}, NO_VARIANCE))
    assert without.logs["loss_prediction_variance"] == 0
    assert (whole.loss - without.loss).item() == pytest.approx(5 * hinge(prediction.numpy()))


NO_VARIANCE = {"prediction_variance_weight": 0.0}


@pytest.mark.parametrize("deep", [False, True], ids=["linear", "deep"])
def test_predictor_is_the_matrix_of_the_hypernetwork_times_the_embedding(deep):
    torch.manual_seed(0)
    size, inputs = 5, 3
    predictor = HyperPredictor(inputs, size, deep=deep).double()
    x, theta = torch.randn(4, size, dtype=torch.double), torch.rand(4, inputs, dtype=torch.double)
    layers = [layer.weight.detach().numpy() for layer in predictor.code if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 2 * deep
    assert not any(name.endswith("bias") for name, _ in predictor.named_parameters())
    maps = predictor.maps.weight.detach().numpy().reshape(size, inputs, size)  # (row, number, column)
    expected = np.zeros((4, size))
    for image in range(4):
        code = theta[image].numpy()
        for layer in layers:
            code = np.maximum(0, layer @ code)
        matrix = sum(code[k] * maps[:, k] for k in range(inputs))
        expected[image] = matrix @ x[image].numpy()
    np.testing.assert_allclose(predictor(x, theta).detach().numpy(), expected, rtol=1e-12)
    assert np.abs(expected).max() > 0.05


def test_where_g_changes_nothing_the_constant_lets_it_be_the_identity():
    """Sanity values: without the constant a g whose parameters are 0 maps everything to 0."""
    views = make_views(Needs(parameters=True))
    views.normalized_parameters = torch.zeros_like(views.normalized_parameters)
    x = torch.randn(6, 12)
    with_one, without = tiny(), tiny(append_one=False)
    assert with_one._inputs(views).shape == (6, 4)
    with torch.no_grad():
        with_one.predictor.maps.weight[:, -12:] = torch.eye(12)
        torch.testing.assert_close(with_one.predictor(x, with_one._inputs(views)), x)
        assert without.predictor(x, without._inputs(views)).abs().max() == 0


def test_predictor_may_start_as_the_identity():
    views = make_views(Needs(parameters=True))
    views.normalized_parameters = torch.zeros_like(views.normalized_parameters)
    objective, x = tiny(predictor_start="identity"), torch.randn(6, 12)
    torch.testing.assert_close(objective.predictor(x, objective._inputs(views)), x)
    views.normalized_parameters = torch.ones_like(views.normalized_parameters)
    assert (objective.predictor(x, objective._inputs(views)) - x).abs().max() > 0.01
    for other in ({"append_one": False}, {"hypernetwork": "deep"}):
        with pytest.raises(ValueError, match="only the constant 1 has a matrix of its own"):
            tiny(predictor_start="identity", **other)


def test_predictions_of_the_authors_start_are_larger_by_the_root_of_the_width():
    torch.manual_seed(0)
    x, inputs = torch.randn(50, 64), torch.rand(50, 2)
    large, usual = (HyperPredictor(2, 64, start=start)(x, inputs).std() for start in ("authors", "random"))
    assert (large / usual).item() == pytest.approx(8, rel=0.1)
    assert tiny(predictor_start="authors").predictor.maps.weight.abs().max() > 0.4  # up to 1 / sqrt(4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_first_and_last_view_meet_behind_one_projector(pooling):
    objective, config = tiny(pooling=pooling), tiny_config()
    views = make_views(objective.needs, crops=3)
    student = random_features(config, views)
    pooled = [t[:, 0] if pooling == "cls" else t[:, 1:].mean(1) for t in (student.tokens[0], student.tokens[-1])]
    x, y = (objective.expander(student.stem(h, part="equivariant")) for h in pooled)
    theta = torch.cat([views.normalized_parameters, torch.ones(6, 1)], dim=1)
    student.projections = torch.randn(3, 8, 4)  # two images more, which joined the usual ones
    expected = objective._loss(x, y, objective.predictor(x, theta), student.projections[:, :6])
    torch.testing.assert_close(objective(student, None, views).loss, expected.loss)


def test_gradient_reaches_the_equivariant_rows_of_the_stem_alone_and_the_deep_code():
    config, encoder = tiny_config(), tiny_encoder()
    objective = tiny(hypernetwork="deep")
    views = make_views(objective.needs)
    objective(encode(encoder, views), None, views).loss.backward()
    (weight,) = (p for name, p in encoder.named_parameters() if "stem" in name and p.ndim == 2)
    assert weight.grad[config.invariant_size :].abs().max(dim=1).values.min() > 0
    assert weight.grad[: config.invariant_size].abs().max() == 0
    assert all(p.grad.abs().max() > 0 for p in objective.predictor.parameters())


def share(rank: int, processes: int) -> dict[str, Any]:
    """Value and gradients of one process's half of the batch, or of the whole, with projections of a base."""
    objective, encoder = tiny(), tiny_encoder()
    halves = [make_views(objective.needs, images=range(start, start + 3)) for start in (0, 3)]
    student = encode(encoder, views := halves[rank] if processes == 2 else merge(halves))
    mix = torch.randn(32, 7, generator=torch.Generator().manual_seed(3))
    student.projections = student.cls @ mix
    loss = objective(student, None, views).loss
    loss.backward()
    modules = {"encoder": encoder, "objective": objective}
    gradients = {f"{k}.{n}": p.grad for k, m in modules.items() for n, p in m.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def test_two_processes_equal_one_also_with_projections_of_a_base(tmp_path: Path):
    expected, (first, second) = share(0, 1), run_processes(share, tmp_path)
    assert first.keys() == second.keys() == expected.keys()
    for key, value in expected.items():
        tolerance = 1e-5 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            (first[key] + second[key]) / 2, value, rtol=1e-5, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def recipe(transformation: dict[str, Any] | None, **changes: Any) -> Recipe:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return Recipe.from_dict({
        "model": {**sizes, "feature_size": 16, "equivariant_size": 8, **changes},
        "objectives": {"invariance": {"name": "vicreg", "expander_sizes": [8, 8]},
                       "equivariance": [{"name": "sie", "expander_sizes": [8, 8]}]},
        "views": {"pipeline": {"name": "center"}, "transformation": transformation},
        "training": {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 4},
    })  # fmt: skip


FOUR = [{"name": "rotation"}, {"name": "translation"}, {"name": "color_jitter"}, {"name": "gaussian_blur"}]


@pytest.mark.parametrize("name", ["joint", "one_of"])
def test_all_families_at_once_or_one_each_time(name):
    run = prepare(recipe({"name": name, "families": FOUR}), None, dry=True)
    assert len(run.config.facts["parameter_names"]) == 8
    assert run.config.facts["same_base"]
    assert run.first.normalized_parameters.shape[1] == 8
    assert run.cost().view_bytes > 0


def test_parameters_of_one_family_each_time_say_which_one_it_was():
    """Families that were not drawn have the scaled parameters of their identity, so no two look alike."""
    family = build_transformation("one_of", families=FOUR)
    parameters = family.sample(torch.rand(64, family.num_draws, generator=torch.Generator().manual_seed(0)))
    nothing = family.targets(torch.tensor([family.identity_parameters]))
    changed = (family.targets(parameters) != nothing).float().split([1, 2, 4, 1], dim=1)
    assert torch.stack([part.amax(dim=1) for part in changed]).sum(dim=0).eq(1).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"transformation": None}, "the parameters of g, and there are none"),
        (
            {"transformation": {"name": "rotation"}, "feature_size": None, "equivariant_size": None},
            "this encoder has none",
        ),
    ],
)
def test_a_run_without_parameters_or_equivariant_part_is_refused_before_its_first_step(changed, message):
    with pytest.raises(RecipeError, match=message):
        prepare(recipe(**changed), None, dry=True)


def test_wrong_inputs():
    wrong = {"prediction_weight": (-1, "negative"), "hypernetwork": ("wide", "'deep'"), "pooling": ("max", "'mean'")}
    wrong["predictor_start"] = ("zeros", "'identity'")
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            tiny(**{name: value})
    objective, config = tiny(), tiny_config()
    views = make_views(objective.needs)
    with pytest.raises(ValueError, match="no parameters of g"):
        objective(random_features(config, views), None, replace(views, normalized_parameters=None))
    one = random_features(config, views)
    with pytest.raises(ValueError, match="two global crops, v1 and v2"):
        objective(replace(one, tokens=one.tokens[:1]), None, views)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        objective.check_batch(1, 1)
