from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hf_equissl.objectives.stl import PairedViews, STLObjective, swap
from hf_equissl.planning.step import batch_multiple, smallest_batch
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views.base import Item
from hf_equissl.views.makers import ViewSettings
from hf_equissl.views.needs import Needs
from hf_equissl.views.view_specs import PipelineSpec, ViewSpec

from .helpers import FACTS, encode, make_views, random_features, reorder, tiny_config, tiny_encoder

# What the battery builds it with.
SMALL = {
    "contrast": "info_nce",
    "coder_sizes": [12, 6],
    "projector_sizes": [12, 8],
    "code_projector_sizes": [10, 8],
}
# Which images are pairs follows from the order; that of the pairs is free.
ORDER_DEPENDENT = True
FORMS = ["nt_xent", "info_nce"]


def tiny(config: Any = None, **kwargs: Any) -> STLObjective:
    torch.manual_seed(0)
    return STLObjective(config or tiny_config(), FACTS, **{**SMALL, **kwargs})


def mlp(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """Linear, batch normalisation, ReLU, linear, from the paper's description, in float64."""
    first, norm, _, last = module
    x = x @ first.weight.detach().numpy().T
    x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + norm.eps)  # weight 1 and bias 0, as at the start
    return np.maximum(x, 0) @ last.weight.detach().numpy().T


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def contrast(a: list[np.ndarray], b: list[np.ndarray], tau: float, form: str) -> float:
    """Loops: each row of one set looks for the row of the same place in the other."""
    losses = []
    for own, other in ((a, b), (b, a)):
        for i, row in enumerate(own):
            candidates = list(other)
            if form == "nt_xent":
                candidates += [z for j, z in enumerate(own) if j != i]
            total = sum(math.exp(similarity(row, z) / tau) for z in candidates)
            losses.append(math.log(total) - similarity(row, other[i]) / tau)
    # The mean over all rows; or for each direction 2 tau times the mean over its rows.
    return sum(losses) / len(losses) if form == "nt_xent" else 2 * tau * sum(losses) / len(a)


def reference(objective: STLObjective, h1: np.ndarray, h2: np.ndarray, form: str) -> tuple[float, float]:
    """Both terms with loops in float64, image by image as the paper describes it."""
    images, width = h1.shape
    maps = objective.transform.maps.weight.detach().numpy()  # (D, code * D): column k * D + j is entry j of matrix k
    t12 = mlp(objective.coder, np.concatenate([h1, h2], axis=1))
    t21 = mlp(objective.coder, np.concatenate([h2, h1], axis=1))

    def moved(h: np.ndarray, code: np.ndarray) -> np.ndarray:
        matrix = sum(c * maps[:, k * width : (k + 1) * width] for k, c in enumerate(code))
        return matrix @ h

    partner = [i + 1 if i % 2 == 0 else i - 1 for i in range(images)]
    predicted1 = np.stack([moved(h2[i], t21[partner[i]]) for i in range(images)])
    predicted2 = np.stack([moved(h1[i], t12[partner[i]]) for i in range(images)])
    z = [*mlp(objective.projector, h1), *mlp(objective.projector, h2)]
    z_predicted = [*mlp(objective.projector, predicted1), *mlp(objective.projector, predicted2)]
    even, odd = (np.stack([*t12[start::2], *t21[start::2]]) for start in (0, 1))
    codes = list(mlp(objective.code_projector, even)), list(mlp(objective.code_projector, odd))
    return contrast(z, z_predicted, 0.2, form), contrast(*codes, 0.2, form)


@pytest.mark.parametrize("form", FORMS)
def test_loss_equals_the_reference(form):
    objective = tiny(contrast=form, equivariance_weight=0.7, transformation_weight=0.3).double()
    views = make_views(Needs(), crops=3)
    student = random_features(tiny_config(), views)
    student.tokens = student.tokens.double().requires_grad_(True)
    student.joined = torch.randn(3, 1, 32)  # images that join the usual ones have no partner
    h = student.tokens[[0, -1], :, 0].detach().numpy()  # (2, B, D)
    equivariance, transformation = reference(objective, *h, form)
    output = objective(student, None, views)
    assert output.logs["loss_equivariance"].item() == pytest.approx(0.7 * equivariance, rel=1e-5)
    assert output.logs["loss_transformation"].item() == pytest.approx(0.3 * transformation, rel=1e-5)
    assert output.loss.item() == pytest.approx(0.7 * equivariance + 0.3 * transformation, rel=1e-5)
    if form == "nt_xent":  # nothing is detached
        output.loss.backward()
        gradient = student.tokens.grad[[0, -1], :, 0]
        for entry in [(0, 0, 3), (0, 3, 20), (1, 2, 5), (1, 5, 30)]:
            step = np.zeros_like(h)
            step[entry] = 1e-5
            above, below = (reference(objective, *(h + way * step), form) for way in (1, -1))
            difference = (0.7 * (above[0] - below[0]) + 0.3 * (above[1] - below[1])) / 2e-5
            assert gradient[entry].item() == pytest.approx(difference, rel=1e-3, abs=1e-6)
            assert abs(difference) > 1e-4


def test_heads_have_the_published_sizes():
    objective = STLObjective(tiny_config(), FACTS)
    widths = [(m.in_features, m.out_features) for m in objective.modules() if isinstance(m, nn.Linear)]
    assert widths == [(64, 128), (128, 128), (128 * 32, 32), (32, 512), (512, 128), (128, 128), (128, 128)]
    assert all(m.bias is None for m in objective.modules() if isinstance(m, nn.Linear))
    assert objective.transform.maps.weight.abs().max().item() == pytest.approx(128**-0.5, rel=0.01)
    with torch.device("meta"):  # SER's table: 62.18 M parameters, 42.89 M without STL
        large = STLObjective(tiny_config(hidden_size=384), FACTS)
    assert sum(p.numel() for p in large.parameters()) == pytest.approx(19.29e6, abs=0.01e6)


def test_an_image_is_predicted_with_the_code_of_its_partner_alone():
    """Sanity value of the method: with fixed statistics, image 2i depends on 2i and 2i + 1, its code on 2i + 1."""
    objective = tiny().eval()
    h1, h2 = torch.randn(2, 6, 32)

    def predictions(h1: torch.Tensor, h2: torch.Tensor) -> torch.Tensor:
        return objective.predict(h1, h2, objective.read_codes(h1, h2))[0]

    def changed(other1: torch.Tensor, other2: torch.Tensor) -> list[int]:
        difference = (predictions(other1, other2) - predictions(h1, h2)).abs().amax(dim=1)
        return (difference > 1e-6).nonzero().flatten().tolist()

    one = torch.zeros(6, 1)
    one[2] = 1.0
    assert changed(h1 + one, h2) == [3]  # view 1 of image 2 enters its code, and nothing but its partner is moved by it
    assert changed(h1, h2 + one) == [2, 3]  # its view 2 is moved, too
    assert swap(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_the_order_of_the_pairs_changes_nothing_and_that_of_the_images_does():
    objective, encoder = tiny(), tiny_encoder()
    views = make_views(objective.needs, batch=8)

    def loss(order: list[int]) -> torch.Tensor:
        student = encode(encoder, reorder(views, torch.tensor(order)), objective.needs)
        return objective(student, None, views).loss

    first = loss(list(range(8)))
    torch.testing.assert_close(loss([4, 5, 0, 1, 6, 7, 2, 3]), first)
    assert not torch.allclose(loss([0, 2, 1, 3, 4, 5, 6, 7]), first, rtol=1e-3)


SHARED = ViewSpec(crop_scale=(0.2, 0.8), flip_probability=0.0, blur_probability=0.0)


def made(spec: ViewSpec, pictures: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Two views of pictures of noise, which have sizes of their own."""
    maker = PairedViews(ViewSettings(32, 8, PipelineSpec((spec, spec))))
    own = []
    for place, number in enumerate(pictures):
        shape = (40 + 8 * number, 36, 3)
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        own.append(maker.crop(Item((Image.fromarray(pixels),)), np.random.default_rng([seed, place])))
    views, facts = maker(maker.collate(own, [], np.random.default_rng(9)))
    assert facts is None
    assert [view.shape for view in views] == [(len(pictures), 3, 32, 32)] * 2
    return list(views)


def test_pairs_share_box_and_colours_and_have_flip_and_blur_of_their_own():
    first, second = made(SHARED, [0, 0, 1, 1])
    for view in (first, second):
        assert torch.equal(view[0], view[1])
        assert torch.equal(view[2], view[3])
        assert not torch.equal(view[0], view[2])
    assert not torch.equal(first, second)
    flipping = replace(SHARED, flip_probability=0.5)
    views = torch.cat([made(flipping, [0, 0], seed=seed)[0] for seed in range(8)])
    same = [torch.equal(views[i], views[i + 1]) for i in range(0, 16, 2)]
    mirrored = [torch.allclose(views[i], views[i + 1].flip(-1)) for i in range(0, 16, 2)]
    assert any(same)
    assert any(mirrored)
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    blurred = made(replace(SHARED, blur_probability=1.0), [0, 0])[0]
    assert not torch.equal(blurred[0], blurred[1])


def test_views_of_a_pair_follow_from_its_images_alone():
    usual, other = made(SHARED, [0, 1, 2, 3]), made(SHARED, [0, 1, 5, 6])
    assert all(torch.equal(a[:2], b[:2]) for a, b in zip(usual, other, strict=True))
    alone = made(SHARED, [0, 1])
    assert all(torch.equal(a[:2], b) for a, b in zip(usual, alone, strict=True))


def recipe(pipeline: dict[str, Any], batch: int, **stl: Any) -> Recipe:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    equivariance = [{"name": "stl", **SMALL, **stl}]
    if stl.pop("beside", None):
        equivariance = [{"name": "stl", **SMALL, **stl}, {"name": "augself", "hidden_size": 8}]
    return Recipe.from_dict({
        "model": sizes,
        "objectives": {"invariance": {"name": "vicreg", "expander_sizes": [8, 8]}, "equivariance": equivariance},
        "views": {"pipeline": pipeline},
        "training": {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": batch},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("pipeline", "batch", "stl", "message"),
    [
        ("vicreg", 5, {}, r"per_device_train_batch_size: 5 images .* STL pairs the images .* an even number of them"),
        ("center", 4, {}, "this view pipeline does neither"),
        ("center, flipped", 4, {}, "this view pipeline does neither"),  # flips are each image's own
        ("vicreg", 4, {"equivariance_weight": 0, "transformation_weight": 0}, "one must be above 0"),
        ("vicreg", 4, {"transformation_weight": -1}, "may not be negative"),
        ("vicreg", 4, {"temperature": 0}, "`temperature` is 0.*above 0"),
        ("vicreg", 4, {"contrast": "info"}, "contrast.*nt_xent.*info_nce"),
        ("vicreg", 4, {"beside": True}, "'pairs' replaces the global crops, and another objective asks for how they"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(pipeline, batch, stl, message):
    name, _, flipped = pipeline.partition(", ")
    views = {"name": name} | ({"flip_probability": 0.5} if flipped else {})
    with pytest.raises(RecipeError, match=message):
        prepare(recipe(views, batch, **stl), None, dry=True)


def test_a_run_is_planned_and_wrong_inputs_are_refused():
    run = prepare(recipe({"name": "vicreg"}, 4), None, dry=True)
    assert run.cost().view_bytes > 0
    assert (smallest_batch(run.config, 1, 4), batch_multiple(run.config)) == (2, 2)
    control = prepare(recipe({"name": "vicreg"}, 4, weight=0, views="keep"), None, dry=True)
    assert (smallest_batch(control.config, 1, 4), batch_multiple(control.config)) == (2, 2)
    objective, views = tiny(), make_views(Needs(), batch=3)
    student = random_features(tiny_config(), views)
    with pytest.raises(ValueError, match="even number of them, got 3"):
        objective(student, None, views)
    with pytest.raises(ValueError, match="two global crops, got 1"):
        objective(replace(student, tokens=student.tokens[:1]), None, views)
    picture = Image.new("RGB", (32, 32))
    maker = PairedViews(ViewSettings(32, 8, PipelineSpec()))
    with pytest.raises(ValueError, match="all views of one image, and the data set gives 2"):
        maker.crop(Item((picture, picture)), np.random.default_rng(0))
