from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_equissl.objectives.ibot import IBOTObjective

from . import distillation_reference as reference
from .helpers import make_views, tiny_config, tiny_objective

# What the battery builds it with.
SMALL = {"num_prototypes": 24, "head_hidden_size": 16, "bottleneck_size": 8}


def setup(**kwargs):
    """An objective with centers other than 0, features of student and teacher with 10 local crops, views."""
    config = tiny_config()
    objective = tiny_objective("invariance", "ibot", config, teacher_temperature_warmup_epochs=0, **kwargs)
    objective.cls_center += torch.linspace(-0.2, 0.2, 24)
    objective.patch_center += torch.linspace(0.3, -0.3, 24)
    views = make_views(objective.needs, batch=4)
    student = reference.make_features(config, views, seed=1, locals_=10)
    return objective, student, reference.make_features(config, views, seed=2), views


@pytest.mark.parametrize("shared_head", [True, False])
def test_losses_equal_the_reference(shared_head):
    objective, student, teacher, views = setup(
        shared_head=shared_head, teacher_temperature=0.06, cls_weight=0.5, patch_weight=2.0
    )
    name = "prototypes" if shared_head else "patch_prototypes"
    cls, patches = reference.student_logits(objective.head, student, patch_prototypes=name)
    taught_cls, taught_patches = reference.student_logits(objective.teacher_head, teacher, patch_prototypes=name)
    cls_targets = reference.centered(taught_cls, np.linspace(-0.2, 0.2, 24), 0.06)
    patch_targets = reference.centered(taught_patches, np.linspace(0.3, -0.3, 24), 0.07)
    expected_cls, pairs = reference.cls_loss(cls, cls_targets, 0.1)
    expected_patch = reference.ibot_patch_loss(patches, patch_targets, views.masks.numpy(), 0.1)
    logs = objective(student, teacher, views).logs
    assert pairs == 22
    assert logs["loss_cls"].item() == pytest.approx(0.5 * expected_cls, rel=1e-5)
    assert logs["loss_patch"].item() == pytest.approx(2.0 * expected_patch, rel=1e-5)
    assert expected_patch > 0.1


def test_its_patch_loss_is_dinov2s_masked_form():
    objective, student, teacher, views = setup()
    _, patches = reference.student_logits(objective.head, student)
    _, taught = reference.student_logits(objective.teacher_head, teacher)
    targets, masks = reference.centered(taught, np.zeros(24), 0.07), views.masks.numpy()
    expected = reference.ibot_patch_loss(patches, targets, masks, 0.1)
    assert reference.dinov2_patch_loss(patches, targets, masks, 0.1) == pytest.approx(expected, rel=1e-12)
    other = tiny_objective("invariance", "dinov2", teacher_temperature_warmup_epochs=0)
    other.load_state_dict(objective.state_dict())
    objective.patch_center.zero_()
    other.patch_center.zero_()
    losses = [o(student, teacher, views).logs["loss_patch"].item() for o in (objective, other)]
    assert losses == pytest.approx([expected, expected], rel=1e-5)
    # From here their centers differ: all patches, masked patches.
    assert (objective.patch_center - other.patch_center).abs().max() > 1e-4
    torch.testing.assert_close(objective.cls_center, other.cls_center)


def test_crops_without_a_mask_count_as_zero():
    objective, student, teacher, views = setup()
    objective.eval()
    whole = objective(student, teacher, views).logs["loss_patch"]
    views.masks[1] = False
    views.mask_indices = None
    first = objective(student, teacher, views).logs["loss_patch"]
    views.masks[0] = False
    assert objective(student, teacher, views).logs["loss_patch"] == 0
    assert 0 < first < whole


def test_unmasked_patches_of_the_student_do_not_matter_to_the_patch_loss():
    objective, student, teacher, views = setup()
    student.tokens.requires_grad_(True)
    objective(student, teacher, views).loss.backward()
    touched = student.tokens.grad[:, :, 1:].abs().amax(dim=-1) > 0
    assert torch.equal(touched, views.masks)
    assert student.tokens.grad[:, :, 0].abs().amax(dim=-1).min() > 0


def test_defaults_are_those_of_the_paper():
    objective = IBOTObjective(tiny_config(), bottleneck_size=2, head_hidden_size=2)
    assert objective.head.prototypes.direction.shape == (8192, 2)
    assert objective.head.patch_prototypes is None
    assert objective.head.prototypes.gain.requires_grad
    for schedule in (objective.cls_schedule, objective.patch_schedule):
        assert (schedule.warmup, schedule.final, schedule.warmup_epochs, schedule.clock) == (0.04, 0.07, 30, "epoch")
    assert (objective.cls_weight, objective.patch_weight, objective.student_temperature) == (1, 1, 0.1)


def test_with_sinkhorn_it_equals_dinov2s_and_keeps_no_centers():
    plain, student, teacher, views = setup()
    ibot, other = (
        tiny_objective("invariance", name, centering="sinkhorn", teacher_temperature_warmup_epochs=0)
        for name in ("ibot", "dinov2")
    )
    weights = {key: value for key, value in plain.state_dict().items() if "center" not in key}
    for objective in (ibot, other):
        objective.load_state_dict(weights)  # strict: no center is missed
    mine, theirs = (o(student, teacher, views).logs for o in (ibot, other))
    for part in ("loss_cls", "loss_patch"):
        assert mine[part].item() == pytest.approx(theirs[part].item(), rel=1e-6)
        assert mine[part].item() != pytest.approx(plain(student, teacher, views).logs[part].item(), rel=1e-5)
