from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hf_equissl.objectives.contrast import token_contrast
from hf_equissl.objectives.ser import Geometry, SERObjective, TransformedPairs, act, transform
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views.base import Item, Views
from hf_equissl.views.collator import ViewCollator
from hf_equissl.views.makers import ViewSettings
from hf_equissl.views.needs import Needs
from hf_equissl.views.pipelines import LocalSpec, PipelineSpec, ViewPipeline, ViewSpec

from .helpers import encode, make_views, run_processes, teacher_features, tiny_config, tiny_encoder

SIZES = {"layer": 1, "share": 0.5, "hidden_size": 24, "projection_size": 16}
# What the battery builds it with: half of 6, and 2 of 3 images.
SMALL = SIZES
BESIDE_LOCAL_CROPS = {"form": "symmetric", "num_local_crops": 2}
LATE = {"num_hidden_layers": 3, "cls_insertion_layer": 1}
UNCHANGED = ViewSpec(
    crop_scale=None, flip_probability=0, jitter_probability=0, grayscale_probability=0, blur_probability=0
)


def tiny(config: Any = None, **kwargs: Any) -> SERObjective:
    torch.manual_seed(0)
    return SERObjective(config or tiny_config(), **{**SIZES, **kwargs})


# ---- a reference with loops in float64, from the formulas ----


def bicubic(old: int, new: int) -> np.ndarray:
    """Cubic convolution with a = -0.75, pixels as areas, borders repeated: (new, old)."""

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    weights = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for near in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[row, min(max(near, 0), old - 1)] += kernel(centre - near)
    return weights


def rho(tokens: np.ndarray, source: list[int], target: list[int]) -> np.ndarray:
    """One image's map (a, b, E) from the grid of one view to that of the other."""
    upright = np.flip(np.rot90(tokens, (2 - source[2]) % 4), axis=1)
    resized = np.einsum("ra,cb,abe->rce", bicubic(source[0], target[0]), bicubic(source[1], target[1]), upright)
    return np.rot90(resized, target[2])


def project(objective: SERObjective, tokens: np.ndarray, grid: tuple[int, int], norm: bool = True) -> np.ndarray:
    """Tokens of one image (N, D) as a map (a, b, E)."""
    first, second = (weight.detach().double().numpy() for weight in objective.projector.parameters())
    rows = []
    for x in tokens:
        if norm:  # weight 1 and bias 0, as at the start
            x = (x - x.mean()) / math.sqrt(x.var() + 1e-6)
        hidden = first @ x
        hidden = np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in hidden])
        rows.append(second @ hidden)
    return np.stack(rows).reshape(*grid, -1)


def unit(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt(float(x @ x))


def contrast(pairs: list[tuple[Any, np.ndarray, np.ndarray]], tau: float) -> float:
    """Forms "teacher" and "student": (image, key, query) of all tokens."""
    total = 0.0
    for b, (image, key, query) in enumerate(pairs):
        score = float(unit(key) @ unit(query)) / tau
        among = math.exp(score)
        for a, (other, another, _) in enumerate(pairs):
            if a != b and other != image:
                among += math.exp(float(unit(another) @ unit(query)) / tau)
        total += math.log(among) - score
    return total / len(pairs)


def nt_xent(pairs: list[tuple[Any, np.ndarray, np.ndarray]], tau: float) -> float:
    """The form "symmetric": (image, z, z') of all tokens."""
    total = 0.0
    for image, z, other_z in pairs:
        for anchor, positive in ((z, other_z), (other_z, z)):
            score = math.exp(float(unit(anchor) @ unit(positive)) / tau)
            among = score
            for other, *both in pairs:
                if other != image:
                    among += sum(math.exp(float(unit(anchor) @ unit(each)) / tau) for each in both)
            total -= math.log(score / among)
    return total / (2 * len(pairs))


def tokens_of(one: np.ndarray, other: np.ndarray, image: int) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """Pairs of tokens at the same places of two maps."""
    return [
        (image, a, b) for a, b in zip(one.reshape(-1, one.shape[-1]), other.reshape(-1, one.shape[-1]), strict=True)
    ]


def reference(
    objective: SERObjective, student: Any, teacher: Any, views: Views, of_keys: SERObjective | None = None
) -> float:
    """The loss; keys of the form "teacher" are made by the heads of ``of_keys``, by default the objective's own."""
    facts, total = views.facts["ser"], 0.0
    for pair in range(len(facts["most_tokens"])):
        numbers = (2 * pair, 2 * pair + 1)
        lie = [facts["geometries"][number] for number in numbers]

        def maps(
            features: Any, numbers: tuple[int, int] = numbers, heads: SERObjective = objective
        ) -> list[list[np.ndarray]]:
            found = []
            for number in numbers:
                view = features.extra["ser"][number]
                tokens = (view if objective.is_last else view.hidden[objective.layer]).patches.detach().double().numpy()
                found.append([project(heads, image, view.grid, norm=not objective.is_last) for image in tokens])
            return found

        own = maps(student)
        images = range(len(own[0]))
        if objective.form == "symmetric":
            moved = [rho(own[1][i], lie[1], lie[0]) for i in images]
            total += nt_xent([t for i in images for t in tokens_of(own[0][i], moved[i], i)], objective.temperature)
            continue
        keys = maps(teacher, heads=of_keys or objective) if objective.form == "teacher" else own
        directions = [(0, 1), (1, 0)] if objective.form == "teacher" else [(0, 1)]
        for source, target in directions:
            moved = [rho(keys[source][i], lie[source], lie[target]) for i in images]
            tokens = [t for i in images for t in tokens_of(moved[i], own[target][i], i)]
            total += contrast(tokens, objective.temperature) / len(directions)
    return total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.2, "layer": 2},
        {"form": "student"},
        {"form": "symmetric", "layer": 2},
        {"form": "symmetric", "num_local_crops": 2},
    ],
    ids=str,
)
def test_loss_equals_the_reference(options):
    objective = tiny(**options)
    needs = objective.needs | Needs(local_crops=bool(options.get("num_local_crops")))
    views = make_views(needs, seed=3)
    student, teacher = encode(tiny_encoder(), views, needs), teacher_features(needs, views)
    output = objective(student, teacher, views)
    assert output.loss.item() == pytest.approx(reference(objective, student, teacher, views), rel=2e-5)
    grids = {tuple(values[:2]) for values in views.facts["ser"]["geometries"]}
    assert len(grids) > 1  # something was resized
    assert -1 <= output.logs["cosine"] <= 1
    assert 0 <= output.logs["accuracy"] <= 1


def test_keys_of_the_teacher_train_no_projector():
    objective = tiny()
    views = make_views(objective.needs, seed=3)
    student, teacher = encode(tiny_encoder(), views, objective.needs), teacher_features(objective.needs, views)
    objective(student, teacher, views).loss.backward()
    for layer, entry in [(0, (3, 7)), (1, (2, 11))]:
        above, below = deepcopy(objective).double(), deepcopy(objective).double()
        for moved, step in ((above, 1e-4), (below, -1e-4)):
            list(moved.projector.parameters())[layer].data[entry] += step
        queries = [reference(moved, student, teacher, views, of_keys=objective) for moved in (above, below)]
        both = [reference(moved, student, teacher, views) for moved in (above, below)]
        expected = (queries[0] - queries[1]) / 2e-4
        assert list(objective.projector.parameters())[layer].grad[entry].item() == pytest.approx(expected, rel=1e-2)
        assert (both[0] - both[1]) / 2e-4 != pytest.approx(expected, rel=0.05)  # the two can be told apart


# ---- values that are known ----


@pytest.mark.parametrize(("variants", "negatives"), [(1, 1), (2, 2)])
def test_equal_tokens_give_the_known_value(variants, negatives):
    places, images = 7, 3
    same = torch.ones(places, images, variants, 4)
    loss, cosine, _ = token_contrast(same, same, 0.4, most_tokens=9)
    assert loss.item() == pytest.approx(math.log(1 + negatives * (images - 1) * places))
    assert cosine.item() == pytest.approx(1)


@pytest.mark.parametrize("variants", [1, 2])
def test_neither_the_order_of_images_nor_another_token_of_the_same_image_matters(variants):
    queries, keys = torch.randn(2, 5, 3, variants, 8, generator=torch.Generator().manual_seed(0))
    loss = token_contrast(queries, keys, 0.3, 5)[0]
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(token_contrast(queries[:, order], keys[:, order], 0.3, 5)[0], loss)
    # The query of place 0 of image 0 sees key 1 of its own image neither as positive nor as negative.
    alone = queries[:1, :, :1].clone().requires_grad_(True)

    def of_one_query(keys: Tensor) -> Tensor:
        every = torch.cat([alone, queries[:1, :, 1:]], dim=2)
        token_contrast(torch.cat([every, queries[1:]]), keys, 0.3, 5)[0].backward()
        gradient, alone.grad = alone.grad[0, 0], None
        return gradient

    corrupted, other = keys.clone(), keys.clone()
    corrupted[1, 0] = 9 * torch.randn(variants, 8)
    other[1, 1] = 9 * torch.randn(variants, 8)
    torch.testing.assert_close(of_one_query(corrupted), of_one_query(keys))
    assert (of_one_query(other) - of_one_query(keys)).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["teacher", "symmetric"])
@pytest.mark.parametrize("images", [0, 1])
def test_without_another_image_there_is_no_signal_and_nothing_breaks(images, form):
    objective, encoder = tiny(form=form, share=(0.05, 0.15)[images]), tiny_encoder()
    views = make_views(objective.needs)
    assert [len(view) for view in views.extra["ser"]] == [images] * 2
    assert (views.batch_size, objective.needs.extra[0].sizes_are_drawn) == (6 - images, True)
    # Kernels of attention refuse a batch of no images, as the run does before its first step.
    full = make_views(tiny(form=form, share=0.2).needs)
    student = encode(encoder, full, objective.needs)
    teacher = teacher_features(objective.needs, full)
    for features in (student, teacher) if teacher else (student,):
        for number, view in features.extra["ser"].items():
            features.extra["ser"][number] = view.map(lambda tensor: tensor[:images])
    output = objective(student, teacher, full)
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(math.isfinite(value) for value in output.logs.values())
    for parameter in (*encoder.encoder.layer[0].parameters(), *objective.projector.parameters()):
        assert not parameter.grad.any()  # 0, neither None nor NaN


# ---- rho ----

GRIDS = [((14, 14), (14, 14), 1e-6), ((14, 14), (16, 13), 5e-3), ((12, 16), (16, 12), 0.1)]


def picture(side: int = 224, channels: int = 8) -> Tensor:
    """Smooth, with every corner different."""
    coarse = torch.randn(2, channels, 9, 9, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (side, side), mode="bicubic")


@pytest.mark.parametrize(("first", "second", "tolerance"), GRIDS)
def test_rho_takes_the_features_of_an_equivariant_encoder_into_those_of_the_other_view(first, second, tolerance):
    images, flip, half = picture(), torch.tensor([True, False]), torch.tensor([False, False])
    for turns in range(16):
        lie = [Geometry(*first, turns // 4), Geometry(*second, turns % 4)]
        maps = [
            F.avg_pool2d(transform(images, flip ^ bool(view), half ^ bool(view), lie[view], 16), 16) for view in (0, 1)
        ]
        for source, target in ((0, 1), (1, 0)):
            moved = act(maps[source], lie[source], lie[target])
            assert moved.shape == maps[target].shape
            assert 1 - F.cosine_similarity(moved, maps[target], dim=1).mean() < tolerance, (turns, source)
        back = act(act(maps[0], lie[0], lie[1]), lie[1], lie[0])
        if first == second:
            assert torch.equal(back, maps[0])
    unmoved = F.cosine_similarity(maps[0], maps[0].flip(-1), dim=1).mean()
    assert 1 - unmoved > 0.5  # what a wrong rho would leave


# ---- views ----


def pipeline_of(needs: Needs, spec: PipelineSpec, size: int = 32, patch: int = 8) -> ViewPipeline:
    return ViewPipeline(
        spec,
        image_size=size,
        transformation=None,
        needs=needs,
        image_mean=(0.5,) * 3,
        image_std=(0.25,) * 3,
        patch_size=patch,
    )


def samples_of(pipeline: ViewPipeline, images: int = 6) -> list[dict[str, Any]]:
    found = []
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        rng = np.random.default_rng([7, number])
        found.append({**pipeline.crop(Item((Image.fromarray(pixels),)), rng), "index": number})
    return found


def test_one_map_takes_view_0_of_every_image_into_view_1():
    """Without colours, of images whose own patches are single pixels: all is exact."""
    needs = tiny(share=0.9, grid_scale=(1, 1), grid_ratio=(1, 1)).needs
    pipeline = pipeline_of(needs, PipelineSpec((UNCHANGED, UNCHANGED)), patch=1)
    samples = samples_of(pipeline, 20)
    views = pipeline(ViewCollator(pipeline)(samples))
    lie = [Geometry(*values) for values in views.facts["ser"]["geometries"]]
    first, second = views.extra["ser"]
    assert len(first) == 18
    assert torch.equal(act(first, lie[0], lie[1]), second)
    assert torch.equal(act(second, lie[1], lie[0]), first)
    # The last images of the batch, and all four mirror images of them.
    crops = pipeline.normalize(torch.stack([s["global_crops"][0] for s in samples[2:]]) / 255).rot90(
        lie[0].turns, (2, 3)
    )
    mirrored = [crops, crops.flip(2), crops.flip(3), crops.flip((2, 3))]
    found = torch.stack([(first == each).all(dim=(1, 2, 3)) for each in mirrored])
    assert found.sum(dim=0).eq(1).all()
    assert found.any(dim=1).all()


def test_views_of_a_pair_differ_in_colours_and_local_crops_make_pairs_of_their_own():
    objective = tiny(form="symmetric", num_local_crops=4)
    colored = ViewSpec(jitter_probability=1.0, crop_scale=None)
    spec = PipelineSpec((UNCHANGED, UNCHANGED), LocalSpec(4, 16, colored))
    pipeline = pipeline_of(objective.needs | Needs(local_crops=True), spec)
    samples = samples_of(pipeline)
    batch = ViewCollator(pipeline)(samples)
    assert torch.equal(batch["extra"]["ser"]["crops"][1], torch.stack([s["local_crops"][0] for s in samples[3:]]))
    assert torch.equal(batch["extra"]["ser"]["crops"][2], torch.stack([s["local_crops"][2] for s in samples[3:]]))
    views = pipeline(batch)
    for number, (view, (rows, columns, turns)) in enumerate(
        zip(views.extra["ser"], views.facts["ser"]["geometries"], strict=True)
    ):
        assert view.shape == (3, 3, *((8 * columns, 8 * rows) if turns % 2 else (8 * rows, 8 * columns)))
        assert rows * columns <= views.facts["ser"]["most_tokens"][number // 2]
    means = [view.mean(dim=(2, 3)) for view in views.extra["ser"]]
    for number in (0, 2, 4):
        assert (means[number] - means[number + 1]).abs().max() > 0.05


@pytest.mark.parametrize(("size", "sides", "tokens"), [(224, (10, 18), (130, 270)), (96, (4, 8), (24, 49))])
def test_grids_lie_in_the_published_ranges(size, sides, tokens):
    maker = TransformedPairs(ViewSettings(size, 16, PipelineSpec()), 0.01, 0, (0.7, 1.3), (3 / 4, 4 / 3))
    drawn = [maker.draw(size, np.random.default_rng(number)) for number in range(3000)]
    counts = [each.rows * each.columns for each in drawn]
    assert sides[0] <= min(min(each[:2]) for each in drawn) <= max(max(each[:2]) for each in drawn) <= sides[1]
    assert tokens[0] <= min(counts) <= max(counts) <= tokens[1] <= maker.most_tokens(size) <= 1.1 * tokens[1]
    assert np.mean(counts) == pytest.approx((size / 16) ** 2, rel=0.02)
    assert {each.turns for each in drawn} == {0, 1, 2, 3}
    assert maker.takes_from_batch(256) == 3


# ---- what it trains ----


def reached(objective: SERObjective, encoder: Any) -> tuple[set[str], dict[str, bool]]:
    needs = objective.needs
    views = make_views(needs)
    objective(encode(encoder, views, needs), teacher_features(needs, views, encoder.config), views).loss.backward()
    names = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    return names, {name: p.grad is not None and bool(p.grad.any()) for name, p in objective.named_parameters()}


@pytest.mark.parametrize("form", ["teacher", "student", "symmetric"])
def test_gradient_ends_at_the_layer_and_never_reaches_a_later_cls(form):
    config = tiny_config(**LATE)
    encoder = tiny_encoder(config).train()
    names, own = reached(tiny(config, form=form), encoder)
    assert {name for name in names if name.startswith("encoder.layer.")} == {
        f"encoder.layer.0.{name}" for name, _ in encoder.encoder.layer[0].named_parameters()
    }
    assert names - {n for n in names if n.startswith("encoder.")} == {
        "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.bias",
    }
    assert own == {
        "norm.weight": True,
        "norm.bias": True,
        "projector.0.weight": True,
        "projector.2.weight": True,
        **({"teacher_norm.weight": False, "teacher_norm.bias": False} if form == "teacher" else {}),
    }


def test_behind_the_last_block_the_encoders_own_norm_serves():
    config = tiny_config(num_hidden_layers=3, cls_insertion_layer=2)
    objective = tiny(config, layer=3)
    (extra,) = objective.needs.extra
    assert (extra.hidden_layers, extra.patches) == ((), True)
    names, own = reached(objective, tiny_encoder(config))
    assert {"layernorm.weight", "encoder.layer.2.mlp.fc2.weight", "embeddings.cls_token"} <= names
    assert not any("stem" in name for name in names)
    assert own == {"projector.0.weight": True, "projector.2.weight": True}
    middle = tiny(config, layer=1)
    ((leader, follower),) = middle.ema_pairs()  # the projector is shared: it follows nobody
    assert leader is middle.norm
    assert follower is middle.teacher_norm
    assert not any(parameter.requires_grad for parameter in follower.parameters())
    assert middle.needs.extra[0].hidden_layers == (1,)
    assert not tiny(config, form="student").needs.teacher


def test_head_has_the_published_size():
    with torch.device("meta"):
        objective = SERObjective(tiny_config(hidden_size=384, num_hidden_layers=12))
    assert sum(p.numel() for p in objective.projector.parameters()) == 458_752
    assert all(layer.bias is None for layer in objective.projector if isinstance(layer, torch.nn.Linear))
    assert (objective.form, objective.layer, objective.temperature, objective.share) == ("teacher", 3, 0.4, 0.01)
    assert objective.norm.eps == 1e-6


def model_of(invariance: dict[str, Any], **entry: Any) -> EquiSSLForPreTraining:
    torch.manual_seed(0)
    ser = {"name": "ser", **SIZES, **entry}
    return EquiSSLForPreTraining(
        EquiSSLPreTrainingConfig(encoder=tiny_config(**LATE), invariance=invariance, equivariance=[ser])
    )


def test_the_control_differs_in_this_loss_alone():
    moco = {"name": "moco_v3", "hidden_size": 16, "projection_size": 8, "local_crops": True}
    options = {"form": "symmetric", "num_local_crops": 2}
    trained, control = model_of(moco, **options), model_of(moco, **options, weight=0, views="keep")
    views, again = make_views(trained.needs), make_views(control.needs)
    assert all(map(torch.equal, views.extra["ser"], again.extra["ser"]))
    assert torch.equal(views.global_crops, again.global_crops)
    one, other = trained(views), control(again)
    assert torch.equal(one.logs["loss_ssl"], other.loss)
    assert one.logs["loss_ser"] > 0
    features = control.encode(again)
    assert features.cls.shape[:2] == features.local_cls.shape[:2] == (2, 6)
    assert control.encode_teacher(again).cls.shape[:2] == (2, 6)


# ---- several processes ----

RANKS = [[[2, 2, 1], [2, 3, 0]], [[3, 2, 2], [3, 3, 3]]]  # geometries: token counts differ between ranks and views


def maps_of(rank: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(rank)
    sides = [(c, r) if k % 2 else (r, c) for r, c, k in RANKS[rank]]
    return [torch.randn(2, 16, *side, generator=g) for side in sides]


def compare_on_a_process(rank: int, processes: int) -> dict[str, Any]:
    found = {}
    for form in ("teacher", "student", "symmetric"):
        objective, maps = tiny(form=form), [each.requires_grad_(True) for each in maps_of(rank)]
        taught = [each.detach() + 0.5 for each in maps] if form == "teacher" else maps
        loss, *_ = objective._compare(maps, taught, [Geometry(*values) for values in RANKS[rank]], 10)
        loss.backward()
        found[form] = (loss.item(), [each.grad if each.grad is not None else torch.zeros(()) for each in maps])
    return found


def loss_over_ranks(form: str, values: list[list[np.ndarray]], taught: list[list[np.ndarray]]) -> float:
    """The loss of the tokens of both ranks, (image, row, column, E) of each view, by the reference."""
    directions, total = [(0, 1), (1, 0)] if form == "teacher" else [(0, 1)], 0.0
    for source, target in directions:
        tokens = []
        for rank, lie in enumerate(RANKS):
            for image in (0, 1):
                if form == "symmetric":
                    one, other = values[rank][0][image], rho(values[rank][1][image], lie[1], lie[0])
                else:
                    one = rho(taught[rank][source][image], lie[source], lie[target])
                    other = values[rank][target][image]
                tokens += tokens_of(one, other, 2 * rank + image)
        total += (nt_xent if form == "symmetric" else contrast)(tokens, 0.4)
    return total / len(directions)


def test_processes_with_different_grids_share_their_tokens(tmp_path: Path):
    results = run_processes(compare_on_a_process, tmp_path)
    for form in ("teacher", "student", "symmetric"):

        def loss(rank: int = 0, view: int = 0, place: tuple[int, ...] = (0, 0, 0, 0), step: float = 0.0) -> float:
            values = [[each.permute(0, 2, 3, 1).double().numpy() for each in maps_of(rank)] for rank in (0, 1)]
            taught = [[each + 0.5 for each in maps] for maps in values] if form == "teacher" else values  # noqa: B023
            values[rank][view][place] += step
            return loss_over_ranks(form, values, taught)  # noqa: B023

        assert np.mean([result[form][0] for result in results]) == pytest.approx(loss(), rel=1e-5)
        for rank, view, place in ((0, 1, (1, 1, 1, 3)), (1, 0, (1, 0, 1, 7))):
            difference = (loss(rank, view, place, 1e-5) - loss(rank, view, place, -1e-5)) / 2e-5
            image, row, column, channel = place
            gradient = results[rank][form][1][view][image, channel, row, column].item() / 2  # as wrappers average
            assert gradient == pytest.approx(difference, rel=1e-3, abs=1e-7)
            assert abs(gradient) > 1e-6


# ---- refusals ----


@pytest.mark.parametrize(
    ("ser", "changes", "message"),
    [
        ({"share": 0.01}, {}, "a share of 0.01 of 8 images is 0 on each of 1 processes"),
        ({"share": 0.125}, {}, "at least 2 transformed images, .* 0.125 of 8 images is 1 on each of 1 processes"),
        ({"share": 0.125, "weight": 0, "views": "keep"}, {}, "0.125 of 8 images is 1 on each"),
        ({"share": 0.95}, {}, "beside others; a share of 0.95 of 8 images is 8"),
        ({"share": 1.0}, {}, "`share` of SER is 1.0, expected a value between 0 and 1"),
        ({"temperature": 0}, {}, "`temperature` is 0"),
        ({"form": "symetric"}, {}, "expected one of 'teacher', 'student', 'symmetric'"),
        ({"num_local_crops": 3}, {}, "expected an even number"),
        ({"num_local_crops": 4}, {}, "a teacher, which encodes no local crops"),
        ({"num_local_crops": 4, "form": "symmetric"}, {}, "this view pipeline has none"),
        ({"layer": 5}, {}, "ser reads the tokens after block 5, and this encoder has blocks 1 to 2"),
        ({"grid_ratio": [2, 1]}, {}, "`grid_ratio` of SER is .2, 1., expected two numbers above 0, lower first"),
        (
            {},
            {
                "views": {"pipeline": {"name": "dino", "local": {"count": 2, "size": 16}}},
                "objectives": {"invariance": {"name": "dino", "num_prototypes": 8}},
            },
            "2 of the further views 'ser' join the usual crops, and .* makes 4 for this invariance objective",
        ),
        (
            {"num_local_crops": 2, "form": "symmetric"},
            {"views": {"pipeline": {"name": "dino", "local": {"count": 2, "size": 16}}}},
            "4 of the further views 'ser' join the usual crops, and .* makes 2 for this invariance objective",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(ser, changes, message):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    own = {"hidden_size": 8, "projection_size": 8, "layer": 1, "share": 0.25, **ser}
    objectives = {"invariance": {"name": "vicreg", "expander_sizes": [8, 8]}, **changes.get("objectives", {})}
    raw = {
        "model": sizes,
        "objectives": {**objectives, "equivariance": [{"name": "ser", **own}]},
        "views": changes.get("views", {"pipeline": {"name": "vicreg"}}),
        "training": {"max_steps": 2, "use_cpu": True, "per_device_train_batch_size": 8},
    }
    with pytest.raises(RecipeError, match=message):
        prepare(Recipe.from_dict(raw), None, dry=True)
