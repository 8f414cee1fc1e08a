from __future__ import annotations

import numpy as np
import pytest

from hf_equissl.objectives.dino import DINOObjective

from . import distillation_reference as reference
from .helpers import make_views, tiny_config, tiny_objective

# What the battery builds it with.
SMALL = {"num_prototypes": 24, "head_hidden_size": 16, "bottleneck_size": 8}


@pytest.mark.parametrize(("locals_", "pairs"), [(10, 22), (8, 18), (0, 2)])
def test_loss_equals_the_reference(locals_, pairs):
    config = tiny_config()
    objective = tiny_objective("invariance", "dino", config, teacher_temperature_warmup_epochs=0)
    center = np.linspace(-0.2, 0.2, 24)
    objective.cls_center += objective.cls_center.new_tensor(center)
    views = make_views(objective.needs, batch=3)
    student = reference.make_features(config, views, seed=1, locals_=locals_)
    teacher = reference.make_features(config, views, seed=2)
    logits = reference.bottleneck(objective.teacher_head, teacher, teacher.cls)
    targets = reference.centered(logits @ reference.prototypes(objective.teacher_head).T, center, 0.07)
    cls, _ = reference.student_logits(objective.head, student)
    expected, counted = reference.cls_loss(cls, targets, 0.1)
    output = objective(student, teacher, views)
    assert counted == pairs
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.logs["loss_cls"].item() == output.loss.item()


def test_defaults_are_those_of_the_paper():
    objective = DINOObjective(tiny_config(), bottleneck_size=2, head_hidden_size=2)
    assert objective.head.prototypes.direction.shape == (65536, 2)
    assert objective.head.prototypes.gain.requires_grad
    schedule = objective.cls_schedule
    assert (schedule.warmup, schedule.final, schedule.warmup_epochs, schedule.clock) == (0.04, 0.07, 30, "epoch")
    assert (objective.student_temperature, objective.center_momentum) == (0.1, 0.9)
