"""What DINO, iBOT and DINOv2 share: pairs, masks, temperatures, the logit split, wrong input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES
from hf_equissl.objectives.masked_patches import masked_patches
from hf_equissl.objectives.progress import TeacherTemperature, TrainingProgress
from hf_equissl.objectives.self_distillation import cls_loss
from hf_equissl.views.needs import Needs

from . import distillation_reference as reference
from .helpers import encode, make_views, tiny_config, tiny_encoder, tiny_objective

NAMES = ("dino", "dinov2", "ibot")
MASKED = ("dinov2", "ibot")


def setup(name: str, config=None, seed: int = 3, **kwargs):
    config = config or tiny_config()
    objective = tiny_objective("invariance", name, config, **kwargs)
    views = make_views(objective.needs, batch=4)
    return objective, *(reference.make_features(config, views, seed + i, locals_=2 - 2 * i) for i in (0, 1)), views


# ---- CLS loss ----


@pytest.mark.parametrize(("locals_", "pairs"), [(10, 22), (8, 18), (0, 2), (3, 8)])
def test_cls_loss_is_the_mean_over_all_pairs_but_equal_crops(locals_, pairs):
    g = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn((2 + locals_) * 3, 4, generator=g, dtype=torch.float64), dim=1)
    weight = torch.randn(5, 4, generator=g, dtype=torch.float64)
    targets = torch.softmax(3 * torch.randn(2, 3, 5, generator=g, dtype=torch.float64), dim=-1)
    student = (rows @ weight.T).unflatten(0, (-1, 3)).numpy()
    expected, counted = reference.cls_loss(student, targets.numpy(), 0.1)
    assert counted == pairs
    assert cls_loss(rows, weight, targets, 0.1).item() == pytest.approx(expected, rel=1e-12)


def test_each_pair_has_the_same_share():
    # Prototypes that no row can tell apart: every pair's cross-entropy is log K, and so is their mean.
    rows = F.normalize(torch.randn(12 * 3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    targets = torch.eye(5)[torch.tensor([[0, 1, 2], [3, 4, 0]])]
    assert cls_loss(rows, torch.ones(5, 4), targets, 0.1).item() == pytest.approx(np.log(5), rel=1e-5)


def test_with_three_global_crops_each_meets_the_two_others():
    g = torch.Generator().manual_seed(1)
    rows, weight = torch.randn(4 * 2, 4, generator=g).double(), torch.randn(5, 4, generator=g).double()
    targets = torch.softmax(3 * torch.randn(3, 2, 5, generator=g).double(), dim=-1)
    expected, counted = reference.cls_loss((rows @ weight.T).unflatten(0, (4, 2)).numpy(), targets.numpy(), 0.1)
    assert counted == 9
    assert cls_loss(rows, weight, targets, 0.1).item() == pytest.approx(expected, rel=1e-12)


# ---- precision ----


@pytest.mark.parametrize("centering", ["centering", "sinkhorn"])
@pytest.mark.parametrize("name", NAMES)
def test_products_with_prototypes_follow_bf16_where_they_are_told_to(name, centering):
    def run(precision: str, half: torch.dtype | None) -> Tensor:
        torch.manual_seed(0)
        objective, student, teacher, views = setup(name, centering=centering, prototype_precision=precision)
        with torch.autocast("cpu", half, enabled=half is not None):
            loss = objective(student, teacher, views).loss
        assert loss.dtype == torch.float32
        loss.backward()
        return torch.cat([loss.detach()[None], objective.head.prototypes.direction.grad.flatten()])

    # fp16 would lose the gradients, which are made before the loss is scaled.
    for half in (None, torch.float16):
        assert torch.equal(run("autocast", half), run("fp32", half))
    ours, exact = run("autocast", torch.bfloat16), run("fp32", torch.bfloat16)
    assert not torch.equal(ours, exact)
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=0.01)
    assert F.cosine_similarity(ours[1:], exact[1:], dim=0) > 0.999


# ---- masks ----


@pytest.mark.parametrize("registers", [0, 3])
def test_masked_patches_by_hand(registers):
    config = tiny_config(num_register_tokens=registers)
    views = make_views(Needs(), batch=2)
    masks = torch.zeros(2, 2, 16, dtype=torch.bool)
    masks[0, 1, [2, 5]] = True
    masks[1, 0, 15] = True
    masked = masked_patches(replace(views, masks=masks), reference.make_features(config, views, 0))
    prefix, crop = 1 + registers, 17 + registers
    assert masked.patches.tolist() == [16 + 2, 16 + 5, 32 + 15]
    assert masked.tokens.tolist() == [crop + prefix + 2, crop + prefix + 5, 2 * crop + prefix + 15]
    assert masked.weights.tolist() == [1 / 8, 1 / 8, 1 / 4]  # 1 / (2 views x 2 images x masked in the crop)


def test_given_indices_are_used_as_they_are():
    views = make_views(Needs(masks=True), batch=2)
    features = reference.make_features(tiny_config(), views, 0)
    counted = masked_patches(replace(views, mask_indices=None), features)
    given = masked_patches(views, features)
    assert all(torch.equal(a, b) for a, b in zip(counted, given, strict=True))
    assert len(given.patches) == views.masks.sum()


@pytest.mark.parametrize("name", MASKED)
def test_without_a_single_masked_patch_the_patch_loss_is_zero(name):
    objective, student, teacher, views = setup(name)
    views.masks[:] = False
    center = objective.patch_center.clone()
    output = objective(student, teacher, replace(views, mask_indices=torch.zeros(0, dtype=torch.long)))
    # iBOT's center averages all patches; where it averages masked ones it has nothing to follow.
    assert torch.equal(objective.patch_center, center) == (name == "dinov2")
    assert output.logs["loss_patch"] == 0
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(buffer).all() for buffer in objective.buffers())


# ---- temperatures ----


def test_temperatures_per_epoch_by_hand():
    temperature = TeacherTemperature(0.07, 0.04, 4, clock="epoch")
    # numpy.linspace(0.04, 0.07, 4), one value per epoch of 10 steps
    expected = {0: 0.04, 9: 0.04, 10: 0.05, 19: 0.05, 20: 0.06, 30: 0.07, 39: 0.07, 40: 0.07, 400: 0.07}
    for step, value in expected.items():
        assert temperature.at(TrainingProgress(step, 1000, 10)) == pytest.approx(value), step


def test_temperatures_per_step_by_hand():
    temperature = TeacherTemperature(0.07, 0.04, 2, clock="step")
    # numpy.linspace(0.04, 0.07, 2 epochs x 8 steps): steps of 0.002
    for step, value in {0: 0.04, 1: 0.042, 7: 0.054, 8: 0.056, 14: 0.068, 15: 0.07, 16: 0.07, 99: 0.07}.items():
        assert temperature.at(TrainingProgress(step, 100, 8)) == pytest.approx(value), step


def test_a_warm_up_of_at_most_one_epoch_is_that_epoch():
    for length in (0.5, 1):
        temperature = TeacherTemperature(0.07, 0.04, length, clock="epoch")
        assert [temperature.at(TrainingProgress(step, 100, 10)) for step in (0, 9, 10)] == [0.04, 0.04, 0.07]


def test_official_warm_up_of_thirty_epochs():
    steps = 1250
    per_epoch, per_step = (TeacherTemperature(0.07, 0.04, 30, clock) for clock in ("epoch", "step"))
    at = TrainingProgress(10 * steps + 1, 100 * steps, steps)
    assert per_epoch.at(at) == pytest.approx(0.04 + 0.03 * 10 / 29)
    assert per_step.at(at) == pytest.approx(0.04 + 0.03 * 12501 / 37499)


def test_a_constant_temperature_needs_no_epochs():
    temperature = TeacherTemperature(0.05, 0.04, 0, clock="epoch")
    assert temperature.start == temperature.at(TrainingProgress(3, 10)) == 0.05
    with pytest.raises(ValueError, match="epoch"):
        TeacherTemperature(0.05, 0.04, 1, clock="epoch").at(TrainingProgress(3, 10))


@pytest.mark.parametrize(("name", "clock"), [("dino", "epoch"), ("ibot", "epoch"), ("dinov2", "step")])
def test_begin_step_sets_the_temperatures_that_the_loss_uses(name, clock):
    kwargs = {"teacher_temperature": 0.1, "warmup_teacher_temperature": 0.02, "teacher_temperature_warmup_epochs": 3}
    objective, student, teacher, views = setup(name, **kwargs)
    objective.eval()  # centers stay
    at = TrainingProgress(15, 100, 10)
    expected = TeacherTemperature(0.1, 0.02, 3, clock=clock).at(at)
    before = objective(student, teacher, views).logs
    objective.begin_step(at)
    after = objective(student, teacher, views).logs
    assert before["teacher_temperature"].item() == pytest.approx(0.02)
    assert after["teacher_temperature"].item() == pytest.approx(expected)
    assert after["teacher_entropy"] > before["teacher_entropy"] + 0.01
    constant = setup(name, **{**kwargs, "warmup_teacher_temperature": expected, "teacher_temperature": expected})[0]
    if name != "ibot":  # whose patches have temperatures of their own
        torch.testing.assert_close(after["teacher_entropy"], constant(student, teacher, views).logs["teacher_entropy"])


def test_ibot_patches_have_their_own_temperature():
    objective, *_ = setup("ibot", patch_teacher_temperature=0.09, warmup_patch_teacher_temperature=0.03)
    assert (objective.cls_temperature, objective.patch_temperature) == (0.04, 0.03)
    objective.begin_step(TrainingProgress(29, 100, 1))
    assert (objective.cls_temperature, objective.patch_temperature) == pytest.approx((0.07, 0.09))


# ---- centers ----


@pytest.mark.parametrize("name", NAMES)
def test_centers_after_several_steps(name):
    objective, student, _, views = setup(name, teacher_temperature_warmup_epochs=0)
    with torch.no_grad():
        objective.teacher_head.prototypes.gain.mul_(1.5)
    center, patch_center = np.zeros(24), np.zeros(24)
    for step in range(3):
        teacher = reference.make_features(tiny_config(), views, seed=20 + step)
        teacher.stem = student.stem
        objective(student, teacher, views)
        weight = reference.prototypes(objective.teacher_head)
        cls = reference.bottleneck(objective.teacher_head, teacher, teacher.cls) @ weight.T  # (V, B, K)
        patches = reference.bottleneck(objective.teacher_head, teacher, teacher.patches) @ weight.T  # (V, B, N, K)
        if name == "dinov2":
            patches = patches[views.masks.numpy()]
        center = 0.9 * center + 0.1 * cls.reshape(-1, 24).mean(0)
        patch_center = 0.9 * patch_center + 0.1 * patches.reshape(-1, 24).mean(0)
    np.testing.assert_allclose(objective.cls_center, center, rtol=1e-4, atol=1e-6)
    assert np.abs(center).max() > 0.01
    if name != "dino":
        np.testing.assert_allclose(objective.patch_center, patch_center, rtol=1e-4, atol=1e-6)
        assert np.abs(patch_center - center).max() > 0.001


@pytest.mark.parametrize("name", NAMES)
def test_centers_move_after_the_loss_and_in_training_only(name):
    objective, student, teacher, views = setup(name)
    first = objective.eval()(student, teacher, views).loss
    assert not objective.cls_center.any()
    torch.testing.assert_close(objective.train()(student, teacher, views).loss, first, rtol=0, atol=0)
    assert objective.cls_center.any()
    assert (objective(student, teacher, views).loss - first).abs() > 1e-4


# ---- logit split ----


def logit_split(name: str):
    config = tiny_config(feature_size=None, equivariant_size=None)
    objective = tiny_objective("invariance", name, config, equivariant_logits=8)
    return objective, *setup(name, config, equivariant_logits=8)[1:]


@pytest.mark.parametrize("name", NAMES)
def test_logit_split_leaves_the_last_logits_to_others(name):
    objective, student, teacher, views = logit_split(name)
    assert (objective.feature_config.feature_size, objective.feature_config.equivariant_size) == (24, 8)
    assert objective.config.feature_size is None
    loss = objective(student, teacher, views).loss
    loss.backward()
    gradient = objective.head.prototypes.direction.grad
    assert gradient[:16].abs().sum(dim=1).min() > 0
    assert not gradient[16:].any()
    assert objective.cls_center.shape == (16,)
    # Sixteen prototypes without a split make the same loss.
    other = setup(name, objective.config, num_prototypes=16)[0]
    state = objective.state_dict()
    other.load_state_dict({k: v[:16] if "prototypes" in k else v for k, v in state.items() if "center" not in k}, False)
    torch.testing.assert_close(other(student, teacher, views).loss, loss)


@pytest.mark.parametrize("name", NAMES)
def test_logit_split_gives_decoders_the_last_logits(name):
    objective, student, _, _ = logit_split(name)
    student.stem = objective.split(None)
    given = student.equivariant(student.patches)
    rows = reference.bottleneck(objective.head, replace(student, stem=None), student.patches)
    expected = (rows @ reference.prototypes(objective.head).T)[..., 16:]
    np.testing.assert_allclose(given.detach(), expected, rtol=1e-4, atol=1e-5)
    assert student.invariant(student.cls) is not None
    assert torch.equal(student.invariant(student.cls), student.cls)


@pytest.mark.parametrize("equivariance", sorted(EQUIVARIANCE_OBJECTIVES))
def test_logit_split_beside_every_equivariance_objective(equivariance):
    objective = tiny_objective(
        "invariance", "ibot", tiny_config(feature_size=None, equivariant_size=None), equivariant_logits=8
    )
    without_teacher = {"form": "student"} if equivariance == "ser" else {}
    other = tiny_objective("equivariance", equivariance, objective.feature_config, **without_teacher)
    encoder = tiny_encoder(objective.config)
    views = make_views(other.needs)
    student = encode(encoder, views, other.needs)
    student.stem = objective.split(student.stem)
    other(student, None, views).loss.backward()
    gradient = objective.head.prototypes.direction.grad
    if not other.trains.stem:  # it reads the encoder's own features, which no split touches
        assert gradient is None or not gradient.any()
        return
    assert gradient[16:].abs().sum(dim=1).min() > 0
    assert not gradient[:16].any()


def test_without_a_split_the_stem_stays():
    objective, student, *_ = setup("dino")
    assert objective.split(student.stem) is student.stem
    assert objective.feature_config is objective.config


# ---- logs and wrong input ----


@pytest.mark.parametrize("name", NAMES)
def test_monitors(name):
    objective, student, teacher, views = setup(name, teacher_temperature_warmup_epochs=0)
    weight = reference.prototypes(objective.teacher_head)
    logits = reference.bottleneck(objective.teacher_head, teacher, teacher.cls) @ weight.T
    targets = reference.centered(logits, np.zeros(24), 0.07).reshape(-1, 24)
    logs = objective(student, teacher, views).logs
    entropy = -(targets * np.log(targets)).sum(1).mean()
    assert logs["teacher_entropy"].item() == pytest.approx(entropy, rel=1e-4)
    assert logs["cls_divergence"].item() == pytest.approx(logs["loss_cls"].item() - entropy, rel=1e-3)
    assert logs["cls_divergence"] > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"student_temperature": 0}, "`student_temperature` is 0"),
        ({"teacher_temperature": 0.0}, "Teacher temperatures must be above 0"),
        ({"teacher_temperature_warmup_epochs": -1}, "0 epochs or more"),
        ({"center_momentum": 1.0}, "`center_momentum` is 1.0"),
        ({"prototype_precision": "bf16"}, "prototype_precision: expected one of 'fp32', 'autocast', got 'bf16'"),
        ({"equivariant_logits": 24}, "fewer than the 24 prototypes"),
        ({"equivariant_logits": 4}, "has a stem that is split already"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_objective("invariance", "dino", **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_input(name):
    objective, student, teacher, views = setup(name)
    with pytest.raises(ValueError, match="2 crops and no teacher"):
        objective(student, None, views)
    with pytest.raises(ValueError, match="1 crops and a teacher"):
        objective(replace(student, tokens=student.tokens[:1]), teacher, views)
    if name in MASKED:
        with pytest.raises(ValueError, match=r"needs masks of shape \(2, 4, 16\).*carry None"):
            objective(student, teacher, replace(views, masks=None))
        with pytest.raises(ValueError, match=r"carry \(2, 4, 9\)"):
            objective(student, teacher, replace(views, masks=views.masks[..., :9]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("local_crops", [True, False])
def test_needs(name, local_crops):
    objective = tiny_objective("invariance", name, local_crops=local_crops)
    assert objective.needs == Needs(teacher=True, local_crops=local_crops, masks=name in MASKED)


def test_the_teachers_head_starts_as_a_frozen_copy():
    objective = tiny_objective("invariance", "ibot")
    ((leader, follower),) = objective.ema_pairs()
    pairs: list[tuple[Tensor, Tensor]] = list(zip(leader.parameters(), follower.parameters(), strict=True))
    assert all(torch.equal(a, b) and a is not b and a.requires_grad and not b.requires_grad for a, b in pairs)
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"head", "teacher_head"}
