from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hf_equissl.objectives.augself import WIDTHS, AugSelfObjective, crop_difference
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views.base import Views
from hf_equissl.views.needs import Needs

from .helpers import FACTS, encode, make_views, random_features, tiny_config, tiny_encoder

EVERY_FACTOR = {f"{name}_weight": weight for name, weight in zip(WIDTHS, (0.5, 0.3, 0.2, 0.7, 1.1, 0.6), strict=True)}
# What the battery builds it with; its g makes no quarter turns.
SMALL = {"hidden_size": 16, **EVERY_FACTOR, "rotation_weight": 0.0}
# Of a run whose g turns images beside something else.
TURNED = replace(FACTS, parameter_names=("rotation_angle", "rot90_turns"))


def tiny(config: Any = None, **kwargs: Any) -> AugSelfObjective:
    torch.manual_seed(0)
    return AugSelfObjective(config or tiny_config(), TURNED, **{"hidden_size": 16, **kwargs})


def turned_views(needs: Needs, **kwargs: Any) -> Views:
    views = make_views(needs, **kwargs)
    views.parameters = torch.stack([torch.rand(views.batch_size), torch.arange(views.batch_size) % 4], dim=1)
    return views


def difference(views: Views, image: int, one: int, other: int) -> dict[str, list[float]]:
    """What each factor of view ``one`` less that of ``other`` is for one image, from the paper's definitions."""

    def of(view: int) -> dict[str, list[float]]:
        top, left, height, width = views.crop_boxes[view, image].double().tolist()
        drawn = {name: value[view, image].item() for name, value in views.photometric.items()}
        x = left + width / 2
        strengths = FACTS.strengths[view]
        jitter = [0.0] * 4
        if drawn["jitter_applied"]:
            jitter = [(drawn[n] - 1) / (2 * strengths[n]) for n in ("brightness", "contrast", "saturation")]
            jitter += [drawn["hue"] / (2 * strengths["hue"])]
        return {
            "crop": [top + height / 2, 1 - x if drawn["flip"] else x, height, width],
            "color": jitter,
            "blur": [drawn["blur_sigma"]],
            "solarize": [128 / 255 if drawn["solarize"] else 1.0],
            "flip": [float(drawn["flip"])],
            "rotation": [views.parameters[image, 1].item() if view else 0.0],  # the last view is turned
        }

    mine, theirs = of(one), of(other)
    found = {name: [a - b for a, b in zip(mine[name], theirs[name], strict=True)] for name in mine}
    return found | {"flip": [float(mine["flip"] == theirs["flip"])]}


def reference(predict, h1: np.ndarray, h2: np.ndarray, views: Views, weights: dict[str, float]) -> float:
    """The loss with loops in float64; ``predict(name, pairs)`` runs an MLP on all pairs, as it normalises batches."""
    images = len(h1)
    pairs = [np.concatenate([h1[i], h2[i]]) for i in range(images)] + [
        np.concatenate([h2[i], h1[i]]) for i in range(images)
    ]
    order = [(i, 0, -1) for i in range(images)] + [(i, -1, 0) for i in range(images)]
    total = 0.0
    for name, weight in weights.items():
        outputs, errors = predict(name, np.stack(pairs)), []
        for output, (image, one, other) in zip(outputs, order, strict=True):
            if name == "rotation":
                turns = int(difference(views, image, one, other)[name][0]) % 4
                errors.append(math.log(sum(math.exp(value) for value in output)) - output[turns])
                continue
            for value, target in zip(output, difference(views, image, one, other)[name], strict=True):
                if name == "flip":
                    p = 1 / (1 + math.exp(-value))
                    errors.append(-target * math.log(p) - (1 - target) * math.log(1 - p))
                else:
                    errors.append((math.tanh(value) - target) ** 2)
        total += weight * sum(errors) / len(errors)
    return total


def test_loss_of_every_factor_equals_the_reference():
    objective = tiny(**EVERY_FACTOR).double()
    views = turned_views(objective.needs, crops=3)
    student = random_features(tiny_config(), views)
    student.tokens = student.tokens.double()
    student.joined = torch.randn(3, 2, 32)  # images that join the usual ones have no parameters

    def predict(name: str, pairs: np.ndarray) -> list[list[float]]:
        first, norm1, _, second, norm2, _, last = objective.predictors[name]
        x = pairs
        for linear, norm in ((first, norm1), (second, norm2)):
            x = x @ linear.weight.detach().numpy().T
            x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + norm.eps)  # weight 1 and bias 0, as at the start
            x = np.maximum(0, x)
        return (x @ last.weight.detach().numpy().T + last.bias.detach().numpy()).tolist()

    h1, h2 = student.tokens[0, :, 0].numpy(), student.tokens[-1, :, 0].numpy()
    output = objective(student, None, views)
    weights = {name: EVERY_FACTOR[f"{name}_weight"] for name in WIDTHS}
    assert output.loss.item() == pytest.approx(reference(predict, h1, h2, views, weights), rel=1e-5)
    for name in WIDTHS:
        expected = reference(predict, h1, h2, views, {name: weights[name]})
        assert output.logs[f"loss_{name}"].item() == pytest.approx(expected, rel=1e-5)
        assert expected > 0.01


def test_targets_of_a_flip_are_those_of_the_method():
    """Sanity value: two equal boxes with their centre at x, only view 1 mirrored, differ by (0, 1 - 2x) and 0."""
    boxes = torch.tensor([[0.2, 0.1, 0.5, 0.4], [0.0, 0.5, 0.3, 0.5]])  # x = 0.3, 0.75
    mirrored, plain = torch.tensor([True, True]), torch.tensor([False, False])
    expected = torch.tensor([[0, 0.4, 0, 0], [0, -0.5, 0, 0]])
    torch.testing.assert_close(crop_difference(boxes, boxes, mirrored, plain), expected)
    torch.testing.assert_close(crop_difference(boxes, boxes, plain, mirrored), -expected)
    assert crop_difference(boxes, boxes, mirrored, mirrored).abs().max() == 0


def test_targets_change_sign_with_the_order_of_the_views_and_lie_in_the_range_of_tanh():
    objective = tiny(**EVERY_FACTOR)
    views = turned_views(objective.needs, batch=64)
    targets = objective.targets(views)
    turns = targets.pop("rotation")
    assert turns[:8].tolist() == [0, 3, 2, 1] * 2  # view 1 less view 2
    assert turns[64:72].tolist() == [0, 1, 2, 3] * 2
    for name, value in targets.items():
        assert value.shape == (128, WIDTHS[name])
        torch.testing.assert_close(value[64:], value[:64] if name == "flip" else -value[:64])
    assert targets["crop"].abs().max() < 1
    assert 0.5 < targets["color"].abs().max() <= 1


def test_a_factor_without_weight_has_no_head():
    objective = tiny(crop_weight=1.0, color_weight=0.0)
    assert list(objective.predictors) == ["crop"]
    assert tiny().weights == {"crop": 0.5, "color": 0.5}
    assert not tiny().needs.parameters


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_layer_and_its_norm(layer):
    objective, encoder = tiny(layer=layer), tiny_encoder()
    assert objective.needs == Needs(crop_boxes=True, photometric=True, hidden_layers=(1,) if layer == 1 else ())
    views = make_views(objective.needs)
    student = encode(encoder, views, objective.needs)
    objective(student, None, views).loss.backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("encoder.layer.1") for name in reached) == (layer != 1)
    assert any(name.startswith("layernorm") for name in reached) == (layer != 1)
    assert not any("stem" in name for name in reached)
    assert any(name.startswith("encoder.layer.0") for name in reached)
    own = [p for name, p in objective.named_parameters() if name.startswith("norm.")]
    assert len(own) == (2 if layer == 1 else 0)
    assert all(p.grad.any() for p in objective.parameters())


def recipe(pipeline: dict[str, Any], augself: dict[str, Any], **model: Any) -> Recipe:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return Recipe.from_dict({
        "model": {**sizes, **model},
        "objectives": {"invariance": {"name": "vicreg", "expander_sizes": [8, 8]},
                       "equivariance": [{"name": "augself", "hidden_size": 8, **augself}]},
        "views": {"pipeline": pipeline},
        "training": {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 4},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("pipeline", "augself", "model", "message"),
    [
        ({"name": "center"}, {}, {}, "this view pipeline does neither"),
        (
            {"name": "vicreg", "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0},
            {},
            {},
            "differ in color, and this view pipeline treats all views alike there. Set color_weight: 0",
        ),
        ({"name": "vicreg", "jitter_probability": 0}, {}, {}, "differ in color"),
        ({"name": "vicreg", "crop_scale": None}, {}, {}, "differ in crop"),
        ({"name": "vicreg", "flip_probability": 0}, {"flip_weight": 1}, {}, "differ in flip"),
        ({"name": "vicreg", "blur_probability": 0}, {"blur_weight": 1}, {}, "differ in blur"),
        ({"name": "vicreg", "solarize_probability": 0}, {"solarize_weight": 1}, {}, "differ in solarize"),
        ({"name": "vicreg"}, {"crop_weight": -1}, {}, "may not be negative"),
        ({"name": "vicreg"}, {"crop_weight": 0, "color_weight": 0}, {}, "one must be above 0"),
        ({"name": "vicreg"}, {"rotation_weight": 1}, {}, "quarter turns a view is turned, and no view is"),
        ({"name": "vicreg"}, {"layer": 3}, {}, "blocks 1 to 2"),
        ({"name": "vicreg"}, {"layer": 1}, {"cls_insertion_layer": 1}, "inserts it after block 1"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_the_first_step(pipeline, augself, model, message):
    with pytest.raises(RecipeError, match=message):
        prepare(recipe(pipeline, augself, **model), None, dry=True)


def test_the_run_says_how_strong_its_colours_are():
    run = prepare(recipe({"name": "vicreg", "view_2": {"saturation": 0.7}}, {"solarize_weight": 1.0}), None, dry=True)
    assert [strengths["saturation"] for strengths in run.config.facts["strengths"]] == [0.2, 0.7]
    assert run.cost().view_bytes > 0


def test_wrong_inputs():
    objective, config = tiny(), tiny_config()
    views = make_views(objective.needs)
    student = random_features(config, views)
    with pytest.raises(ValueError, match="two global crops, got 1"):
        objective(replace(student, tokens=student.tokens[:1]), None, views)
    with pytest.raises(ValueError, match="do not say how they were cropped"):
        objective(student, None, make_views(Needs()))
