from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_equissl.objectives.essl import ESSLObjective, FourRotations
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views.base import Item
from hf_equissl.views.makers import ViewSettings
from hf_equissl.views.view_specs import PipelineSpec, ViewSpec

from .helpers import encode, make_views, tiny_config, tiny_encoder

# What the battery builds it with: crops of 2 x 2 patches, large enough to show something.
SMALL = {"size": 16, "crop_scale": (0.3, 1.0), "hidden_size": 24, "bottleneck_size": 12}


def tiny(**kwargs: Any) -> ESSLObjective:
    torch.manual_seed(0)
    return ESSLObjective(tiny_config(), **{**SMALL, **kwargs})


def reference(objective: ESSLObjective, representations: list[np.ndarray]) -> tuple[float, float]:
    """Loss and accuracy with loops in float64, and the MLP by its formula."""
    layers = list(objective.classifier)
    losses, right = [], 0
    for turns, batch in enumerate(representations):
        for x in batch:
            for layer in layers:
                if isinstance(layer, torch.nn.Linear):
                    x = layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()
                elif isinstance(layer, torch.nn.LayerNorm):
                    x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)  # weight 1 and bias 0, as at the start
                else:
                    x = np.maximum(0, x)
            losses.append(math.log(sum(math.exp(value) for value in x)) - x[turns])
            right += int(np.argmax(x)) == turns
    return sum(losses) / len(losses), right / len(losses)


def test_loss_equals_the_reference():
    objective = tiny().double()
    views = make_views(objective.needs)
    student = encode(tiny_encoder(), views, objective.needs)
    turned = student.extra["four_rotations"]
    for features in turned.values():
        features.tokens = features.tokens.detach().double()
    expected, accuracy = reference(objective, [turned[turns].tokens[:, 0].numpy() for turns in range(4)])
    output = objective(student, None, views)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert output.logs["accuracy"].item() == pytest.approx(accuracy)
    assert abs(expected - math.log(4)) < 0.5


def test_head_has_the_published_layers():
    objective = ESSLObjective(tiny_config())
    widths = [(m.in_features, m.out_features, m.bias is not None) for m in objective.classifier if hasattr(m, "bias")
              and isinstance(m, torch.nn.Linear)]  # fmt: skip
    assert widths == [(32, 32, True), (32, 32, True), (32, 256, True), (256, 4, True)]
    kinds = "".join(type(module).__name__[0] for module in objective.classifier)
    assert kinds == "LLRLLRLLL"  # Linear, LayerNorm, ReLU twice; Linear, LayerNorm, Linear
    (extra,) = objective.needs.extra
    assert extra.options["size"] == 96
    assert extra.options["spec"] == ViewSpec(crop_scale=(0.05, 0.14), blur_probability=0.1)
    assert not extra.patches


def test_four_views_are_quarter_turns_against_the_clock_of_one_crop():
    plain = ViewSpec(crop_scale=None, flip_probability=0, jitter_probability=0, grayscale_probability=0,
                     blur_probability=0)  # fmt: skip
    maker = FourRotations(ViewSettings(32, 8, PipelineSpec()), size=16, spec=plain)
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[0, -1] = 255  # a white corner, on the right above
    rng = np.random.default_rng(0)
    batch = maker.collate([maker.crop(Item((Image.fromarray(pixels),)), rng) for _ in range(3)], [], rng)
    views, facts = maker(batch)
    assert facts is None
    corners = [(0, -1), (0, 0), (-1, 0), (-1, -1)]  # right above, left above, left below, right below
    for view, (row, column) in zip(views, corners, strict=True):
        assert view.shape == (3, 3, 16, 16)
        assert (view[:, :, row, column] == 1).all()
        assert view.sum() == 9


def test_views_differ_between_images_and_are_the_same_again():
    objective = tiny()
    once, again = (make_views(objective.needs).extra["four_rotations"] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    torch.testing.assert_close(once[3], once[0].rot90(3, dims=(-2, -1)))
    assert not torch.equal(once[0][0], once[0][1])


def test_gradient_reaches_all_of_the_encoder_but_the_stem_and_nothing_of_the_usual_crops():
    objective, encoder = tiny(), tiny_encoder()
    views = make_views(objective.needs)
    student = encode(encoder, views, objective.needs)
    student.tokens.retain_grad()
    objective(student, None, views).loss.backward()
    assert student.tokens.grad is None
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (
            "stem" not in name and "mask_token" not in name
        ), name
    assert all(parameter.grad.any() for parameter in objective.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 20}, "`size` of E-SSL's crops is 20, expected a multiple of model.patch_size, 8"),
        ({"crop_scale": [0.5, 0.2]}, "crop_scale is .* lower first"),
        ({"crop_scale": [0.5]}, "crop_scale is .* two numbers"),
    ],
)
def test_impossible_crops_are_refused_before_the_first_step(changes, message):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    raw = {
        "model": sizes,
        "objectives": {"invariance": {"name": "vicreg", "expander_sizes": [8, 8]},
                       "equivariance": [{"name": "essl", "size": 16, **changes}]},
        "views": {"pipeline": {"name": "vicreg"}},
        "training": {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 4},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        prepare(Recipe.from_dict(raw), None, dry=True)
