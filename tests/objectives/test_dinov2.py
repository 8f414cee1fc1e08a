from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_equissl.objectives.dinov2 import DINOv2Objective

from . import distillation_reference as reference
from .helpers import make_views, tiny_config, tiny_objective

# What the battery builds it with: neighbours from the whole batch, so that two processes can equal one.
SMALL = {"num_prototypes": 24, "head_hidden_size": 16, "bottleneck_size": 8, "gather_koleo": True}


def setup(**kwargs):
    """An objective, features of student and teacher with 8 local crops, views."""
    config = tiny_config()
    objective = tiny_objective("invariance", "dinov2", config, teacher_temperature_warmup_epochs=0, **kwargs)
    if objective.centering == "centering":
        objective.cls_center += torch.linspace(-0.2, 0.2, 24)
        objective.patch_center += torch.linspace(0.3, -0.3, 24)
    views = make_views(objective.needs, batch=4)
    student = reference.make_features(config, views, seed=1, locals_=8)
    return objective, student, reference.make_features(config, views, seed=2), views


@pytest.mark.parametrize("centering", ["centering", "sinkhorn"])
@pytest.mark.parametrize("separate_head", [False, True])
def test_losses_equal_the_reference(separate_head, centering):
    objective, student, teacher, views = setup(
        separate_head=separate_head, centering=centering, cls_weight=0.5, patch_weight=2.0, koleo_weight=0.3
    )
    names = ("patch_mlp", "patch_prototypes") if separate_head else ("mlp", "prototypes")
    masks = views.masks.numpy()
    cls, patches = reference.student_logits(objective.head, student, *names)
    taught_cls, taught_patches = reference.student_logits(objective.teacher_head, teacher, *names)
    patch_targets = np.zeros_like(taught_patches)
    if centering == "centering":
        cls_targets = reference.centered(taught_cls, np.linspace(-0.2, 0.2, 24), 0.07)
        patch_targets[masks] = reference.centered(taught_patches[masks], np.linspace(0.3, -0.3, 24), 0.07)
    else:  # over both views together, and over masked patches only
        cls_targets = reference.sinkhorn(taught_cls.reshape(-1, 24), 0.07).reshape(taught_cls.shape)
        patch_targets[masks] = reference.sinkhorn(taught_patches[masks], 0.07)
    expected_cls, pairs = reference.cls_loss(cls, cls_targets, 0.1)
    logs = objective(student, teacher, views).logs
    assert pairs == 18
    assert logs["loss_cls"].item() == pytest.approx(0.5 * expected_cls, rel=1e-4)
    expected = 2.0 * reference.dinov2_patch_loss(patches, patch_targets, masks, 0.1)
    assert logs["loss_patch"].item() == pytest.approx(expected, rel=1e-4)
    # Before stem and head: on the representation itself.
    assert logs["loss_koleo"].item() == pytest.approx(0.3 * reference.koleo(reference.array(student.cls)), rel=1e-4)


def test_sinkhorn_keeps_no_centers():
    objective, student, teacher, views = setup(centering="sinkhorn")
    objective(student, teacher, views)
    assert not list(objective.buffers())


def test_koleo_can_be_left_out():
    objective, student, teacher, views = setup(koleo_weight=0)
    single = [reference.make_features(tiny_config(), make_views(objective.needs, batch=1), seed) for seed in (1, 2)]
    assert "loss_koleo" not in objective(*single, make_views(objective.needs, batch=1)).logs
    assert "loss_koleo" not in objective(student, teacher, views).logs


def test_defaults_are_those_of_the_short_configuration():
    objective = DINOv2Objective(tiny_config(), bottleneck_size=2, head_hidden_size=2)
    assert objective.head.prototypes.direction.shape == (65536, 2)
    assert objective.head.patch_mlp is None
    assert objective.head.prototypes.gain.requires_grad
    for schedule in (objective.cls_schedule, objective.patch_schedule):
        assert (schedule.warmup, schedule.final, schedule.warmup_epochs, schedule.clock) == (0.04, 0.07, 30, "step")
    weights = (objective.cls_weight, objective.patch_weight, objective.koleo_weight)
    assert weights == (1, 1, 0.1)
    assert not objective.gather_koleo
    assert objective.centering == "centering"


@pytest.mark.parametrize("kwargs", [{"centering": "sinkhorn_knopp"}, {"koleo_weight": -1}, {"patch_weight": -1}])
def test_wrong_arguments(kwargs):
    with pytest.raises(ValueError, match=r"one of 'centering', 'sinkhorn'|koleo_weight|Weights must be 0 or more"):
        tiny_objective("invariance", "dinov2", **kwargs)
