from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hf_equissl.objectives.base import Features
from hf_equissl.objectives.equimod import PARAMETERS, EquiModObjective, UnaugmentedImage, augmentation_parameters
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views.base import Item, Views
from hf_equissl.views.facts import ViewFacts
from hf_equissl.views.makers import ViewSettings
from hf_equissl.views.needs import Needs
from hf_equissl.views.view_specs import PIPELINES, PipelineSpec

from .helpers import FACTS, encode, make_views, random_features, tiny_config, tiny_encoder

# What the battery builds it with.
SMALL = {"hidden_size": 16, "projection_size": 8}
FORMS = ["nt_xent", "info_nce"]


def tiny(config: Any = None, facts: ViewFacts = FACTS, **kwargs: Any) -> EquiModObjective:
    torch.manual_seed(0)
    return EquiModObjective(config or tiny_config(), facts, **{**SMALL, **kwargs})


def heads(objective: EquiModObjective, h: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of all rows (M, D), and the predictions of the views, from the layers as the paper lists them."""

    def linear(module: nn.Module, x: np.ndarray) -> np.ndarray:
        assert module.bias is None
        return x @ module.weight.detach().numpy().T

    def normalized(x: np.ndarray) -> np.ndarray:  # weight 1 and bias 0, as at the start
        return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)

    first, _, _, second, _, _, third, _ = objective.projector
    y = np.maximum(normalized(linear(first, h)), 0)
    y = normalized(linear(third, np.maximum(normalized(linear(second, y)), 0)))
    images = len(h) - len(p)
    encoded = normalized(linear(objective.parameter_encoder[0], p))
    repeated = np.concatenate([y[:images]] * (len(p) // images))
    return y, normalized(linear(objective.predictor[0], np.concatenate([repeated, encoded], axis=1)))


def parameters_of(views: Views) -> list[list[float]]:
    """The paper's vector of each view of each image, standardised as the run's pipeline draws it."""
    rows = []
    for view in range(len(views.crop_boxes)):
        for image in range(views.batch_size):
            drawn = {name: float(value[view, image]) for name, value in views.photometric.items()}
            drawn |= dict(zip(("top", "left", "height", "width"), views.crop_boxes[view, image].tolist(), strict=True))
            names = ["top", "left", "height", "width", "flip", "jitter_applied", *[None] * 4, "brightness", "contrast"]
            names += ["saturation", "hue", "grayscale", "blur_applied", "blur_sigma", "solarize"]
            row = []
            for name in names:  # the order of the colour operations never changes
                spread = FACTS.deviations[name] if name else 0.0
                row.append((drawn[name] - FACTS.means[name]) / spread if spread else 0.0)
            rows.append(row)
    return rows


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def reference(y: np.ndarray, predicted: np.ndarray, images: int, tau: float, form: str) -> tuple[float, float]:
    """Loss and equivariance gain with loops in float64."""
    actual = y[images:]
    sets, losses = (list(actual), list(predicted)), []
    for own, other in (sets, sets[::-1]):
        for i, row in enumerate(own):
            negatives = [z for j, z in enumerate(own) if j != i] if form == "nt_xent" else []
            total = sum(math.exp(similarity(row, z) / tau) for z in [*other, *negatives])
            losses.append(math.log(total) - similarity(row, other[i]) / tau)
    mean = sum(losses) / len(losses)
    gains = [similarity(actual[i], predicted[i]) - similarity(actual[i], y[i % images]) for i in range(len(actual))]
    return mean if form == "nt_xent" else 2 * tau * mean, sum(gains) / len(gains)


@pytest.mark.parametrize(("form", "layer"), [("nt_xent", None), ("info_nce", None), ("nt_xent", 1)])
def test_loss_equals_the_reference(form, layer):
    objective, config = tiny(contrast=form, layer=layer).double(), tiny_config()
    views = make_views(objective.needs)
    student, deep = random_features(config, views), random_features(config, views, seed=8)
    student.tokens = student.tokens.double().requires_grad_(True)
    student.hidden[1] = replace(deep, tokens=deep.tokens.double().requires_grad_(True))
    student.joined = torch.randn(2, 1, 32)  # images that join the usual ones: what was done to them is not known
    image = torch.randn(6, 1, 32, dtype=torch.float64, requires_grad=True)
    student.extra["unaugmented"] = {0: Features(image, 1, (4, 4), None)}
    tokens = student.tokens if layer is None else student.hidden[1].tokens

    def evaluate(h: np.ndarray) -> tuple[float, float]:
        if layer is not None:
            h = (h - h.mean(axis=1, keepdims=True)) / np.sqrt(h.var(axis=1, keepdims=True) + config.layer_norm_eps)
        return reference(*heads(objective, h, np.array(parameters_of(views))), 6, 0.2, form)

    h = np.concatenate([image[:, 0].detach().numpy(), *tokens[:, :, 0].detach().numpy()])  # the images, then two views
    expected, gain = evaluate(h)
    output = objective(student, None, views)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.logs["equivariance_gain"].item() == pytest.approx(gain, abs=1e-5)
    if form == "nt_xent":  # nothing is detached
        output.loss.backward()
        gradient = torch.cat([image.grad[:, 0], *tokens.grad[:, :, 0]])
        for entry in [(0, 3), (4, 20), (7, 5), (15, 30)]:
            step = np.zeros_like(h)
            step[entry] = 1e-5
            difference = (evaluate(h + step)[0] - evaluate(h - step)[0]) / 2e-5
            assert gradient[entry].item() == pytest.approx(difference, rel=1e-3, abs=1e-6)
            assert abs(difference) > 1e-4


def test_parameters_are_standardised_as_the_pipeline_draws_them():
    objective = tiny()
    views = make_views(objective.needs, batch=400)
    p = objective._standardize(augmentation_parameters(views.crop_boxes, views.photometric)).flatten(0, 1)
    assert p.shape == (800, 18)
    moving = [number for number, name in enumerate(PARAMETERS) if not name.startswith("order")]
    moving.remove(PARAMETERS.index("blur_applied"))  # every view is blurred
    still = sorted(set(range(18)) - set(moving))
    assert p[:, still].abs().max() == 0
    # The second half repeats the draws of the first, and the pictures are not square, which moves the boxes.
    means = p[:, moving].mean(dim=0).abs()
    assert means[4:].max() < 0.25
    assert means[:4].max() < 0.4
    torch.testing.assert_close(p[:, moving].std(dim=0), torch.ones(len(moving)), rtol=0.25, atol=0)


def test_without_solarization_there_are_17_components():
    plain = PipelineSpec(PIPELINES["vicreg"].views[:1] * 2)
    assert tiny(facts=ViewFacts.of(plain, None)).parameter_encoder[0].in_features == 17
    objective = tiny(facts=ViewFacts.of(PIPELINES["vicreg"], None))
    assert objective.parameter_names == PARAMETERS
    assert objective.parameter_encoder[0].in_features == 18
    assert dict(zip(PARAMETERS, objective.means.tolist(), strict=True))["solarize"] == pytest.approx(0.1, abs=0.02)


def test_heads_have_the_published_layers():
    objective = EquiModObjective(tiny_config(), FACTS)
    widths = [(m.in_features, m.out_features) for m in objective.modules() if isinstance(m, nn.Linear)]
    assert widths == [(32, 32), (32, 32), (32, 128), (18, 128), (256, 128)]
    assert all(m.bias is None for m in objective.modules() if isinstance(m, nn.Linear))
    norms = [m.affine for m in objective.modules() if isinstance(m, nn.BatchNorm1d)]
    assert norms == [True, True, False, True, False]
    assert not any(isinstance(m, nn.ReLU) for m in objective.predictor)
    with torch.device("meta"):  # SER's table: 43.27 M parameters, 42.89 M without EquiMod
        large = EquiModObjective(tiny_config(hidden_size=384), FACTS)
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(0.38e6, abs=0.01e6)


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_layer_and_its_norm(layer):
    objective, encoder = tiny(layer=layer), tiny_encoder()
    stops = 1 if layer == 1 else None
    assert objective.needs.hidden_layers == ((1,) if stops else ())
    assert objective.needs.extra[0].last_layer == stops
    passes = []
    for block in encoder.encoder.layer:
        block.register_forward_hook(lambda *_: passes.append(1))
    views = make_views(objective.needs)
    student = encode(encoder, views, objective.needs)
    assert len(passes) == (3 if stops else 4)  # both blocks for the crops, and for the image as far as needed
    assert student.extra["unaugmented"][0].tokens.shape == (6, 1, 32)
    objective(student, None, views).loss.backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("encoder.layer.0") for name in reached)
    assert any(name.startswith("encoder.layer.1") for name in reached) == (stops is None)
    assert any(name.startswith("layernorm") for name in reached) == (stops is None)
    assert not any("stem" in name for name in reached)
    assert len([name for name, _ in objective.named_parameters() if name.startswith("norm.")]) == (2 if stops else 0)
    assert all(p.grad.any() for p in objective.parameters())


def test_the_image_is_the_centre_without_augmentation():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    maker = UnaugmentedImage(ViewSettings(32, 8, PipelineSpec()))
    own = [maker.crop(Item((Image.fromarray(pixels),)), np.random.default_rng(n)) for n in range(2)]
    (view,), facts = maker(maker.collate(own, [], np.random.default_rng(0)))
    assert facts is None
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.equal(view, torch.stack([expected, expected]))
    with pytest.raises(ValueError, match="the data set gives 2 at a time"):
        maker.crop(Item((Image.fromarray(pixels),) * 2), np.random.default_rng(0))


def recipe(pipeline: str, equimod: dict[str, Any], **model: Any) -> Recipe:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return Recipe.from_dict({
        "model": {**sizes, **model},
        "objectives": {"invariance": {"name": "vicreg", "expander_sizes": [8, 8]},
                       "equivariance": [{"name": "equimod", **SMALL, **equimod}]},
        "views": {"pipeline": {"name": pipeline}},
        "training": {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 4},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("pipeline", "equimod", "model", "message"),
    [
        ("center", {}, {}, "does the same to all images"),
        ("vicreg", {"temperature": 0}, {}, "`temperature` is 0.*above 0"),
        ("vicreg", {"contrast": "info"}, {}, "contrast.*nt_xent.*info_nce"),
        ("vicreg", {"layer": 3}, {}, "blocks 1 to 2"),
        ("vicreg", {"layer": 1}, {"cls_insertion_layer": 1}, "inserts it after block 1"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_the_first_step(pipeline, equimod, model, message):
    with pytest.raises(RecipeError, match=message):
        prepare(recipe(pipeline, equimod, **model), None, dry=True)


def test_a_run_knows_its_pipeline_and_wrong_views_are_refused():
    run = prepare(recipe("vicreg", {"layer": 1}), None, dry=True)
    assert run.config.facts["deviations"]["flip"] == pytest.approx(0.5, abs=0.01)
    assert run.cost().view_bytes > 0
    objective = tiny()
    views = make_views(objective.needs)
    with pytest.raises(ValueError, match="do not say how they were cropped"):
        objective(encode(tiny_encoder(), views, objective.needs), None, make_views(Needs()))
