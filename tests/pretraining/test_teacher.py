"""The teacher inside EquiSSLForPreTraining: its average, what it is not, and what is published."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_equissl.objectives import INVARIANCE_OBJECTIVES
from hf_equissl.objectives.progress import TrainingProgress
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from tests.objectives.helpers import make_views, tiny_config

HEAD = {"num_prototypes": 24, "head_hidden_size": 16, "bottleneck_size": 8}
NAMES = ("dino", "dinov2", "ibot")
every_base = pytest.mark.parametrize("name", NAMES)


def make_model(name: str, reconstruction: bool = True, **encoder) -> EquiSSLForPreTraining:
    torch.manual_seed(0)
    config = EquiSSLPreTrainingConfig(
        encoder=tiny_config(**encoder),
        invariance={"name": name, **HEAD},
        equivariance=[{"name": "reconstruction", "decoder_widths": [16, 16, 16]}] if reconstruction else [],
    )
    return EquiSSLForPreTraining(config).train()


def train(model: EquiSSLForPreTraining, steps: int, momentum: float = 0.8, learning_rate: float = 1e-2):
    """Steps as the Trainer makes them; yields each step's logs."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for step in range(steps):
        model.begin_step(TrainingProgress(step, steps, 2))
        output = model(make_views(model.needs, batch=4, seed=step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.update_teacher(momentum)
        yield output


def state(model: EquiSSLForPreTraining, prefix: str) -> dict[str, np.ndarray]:
    """A copy, in double precision, of what ``prefix`` holds."""
    tensors = model.state_dict()
    return {k.removeprefix(prefix): v.double().numpy().copy() for k, v in tensors.items() if k.startswith(prefix)}


PAIRS = (("student.", "teacher."), ("invariance.head.", "invariance.teacher_head."))


@every_base
def test_teacher_is_the_moving_average_of_student_and_head(name):
    model = make_model(name)
    averages = [state(model, follower) for _, follower in PAIRS]
    for (leader, _), average in zip(PAIRS, averages, strict=True):
        assert all(np.array_equal(average[key], value) for key, value in state(model, leader).items())
    start = [dict(average) for average in averages]
    for output in train(model, steps=3):
        assert torch.isfinite(output.loss)
        for (leader, _), average in zip(PAIRS, averages, strict=True):
            average |= {key: 0.8 * average[key] + 0.2 * value for key, value in state(model, leader).items()}
    for (leader, follower), average, first in zip(PAIRS, averages, start, strict=True):
        given, student = state(model, follower), state(model, leader)
        assert given.keys() == student.keys()
        for key, value in average.items():
            np.testing.assert_allclose(given[key], value, rtol=1e-5, atol=1e-7, err_msg=key)
        moved = max(np.abs(given[key] - first[key]).max() for key in given)
        behind = max(np.abs(given[key] - student[key]).max() for key in given)
        assert min(moved, behind) > 1e-3


@every_base
def test_teacher_has_no_gradient_and_stays_in_evaluation_mode(name):
    model = make_model(name, drop_path_rate=0.5).train()
    followers = [follower for _, follower in model.ema_pairs()]
    assert len(followers) == 2
    next(train(model, steps=1))
    for follower in followers:
        assert not follower.training
        assert not any(module.training for module in follower.modules())
        assert all(p.grad is None and not p.requires_grad for p in follower.parameters())
    assert model.student.training
    views = make_views(model.needs, batch=4)
    assert torch.equal(model.encode_teacher(views).tokens, model.encode_teacher(views).tokens)
    assert not torch.equal(model.encode(views).tokens, model.encode(views).tokens)


@every_base
@pytest.mark.parametrize("reconstruction", [True, False])
def test_what_trains_gets_a_gradient(name, reconstruction):
    model = make_model(name, reconstruction)
    model(make_views(model.needs, batch=4)).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, key


@every_base
def test_parts_add_up_beside_the_reconstruction(name):
    model = make_model(name)
    output = model(make_views(model.needs, batch=4))
    torch.testing.assert_close(
        output.logs["loss_ssl"] + output.logs["loss_reconstruction"], output.loss.detach(), rtol=1e-5, atol=1e-5
    )
    parts = [value for key, value in output.logs.items() if key.startswith(f"{name}/loss_")]
    torch.testing.assert_close(sum(parts), output.logs["loss_ssl"])


def test_student_sees_masked_crops_and_the_teacher_whole_ones():
    model = make_model("ibot").eval()
    views = make_views(model.needs, batch=4)
    student, teacher = model.encode(views), model.encode_teacher(views)
    masked = views.masks.any(dim=2)
    same = (student.tokens - teacher.tokens).abs().amax(dim=(2, 3)) < 1e-5
    assert masked.any()
    assert torch.equal(same, ~masked)
    assert student.local_tokens.shape == (2, 4, 1, 32)


def test_momentum_one_keeps_and_zero_copies():
    model = make_model("ibot")
    before = state(model, "teacher.")
    with torch.no_grad():
        for parameter in (*model.student.parameters(), *model.invariance.head.parameters()):
            parameter.add_(1)
    model.update_teacher(1.0)
    assert all(np.array_equal(value, before[key]) for key, value in state(model, "teacher.").items())
    model.update_teacher(0.0)
    for leader, follower in PAIRS:
        expected = state(model, leader)
        assert all(np.allclose(value, expected[key], rtol=1e-6) for key, value in state(model, follower).items())


@every_base
def test_export_gives_the_teacher_and_on_demand_the_student(name):
    model = make_model(name)
    for _ in train(model, steps=2):
        pass
    model.eval()
    crops = make_views(model.needs, batch=4).global_crops[0]
    for weights_of, encoder in ((None, model.teacher), ("teacher", model.teacher), ("student", model.student)):
        with torch.no_grad():
            given = model.export_encoder(weights_of=weights_of)(crops).last_hidden_state
            assert torch.equal(given, encoder(crops).last_hidden_state), weights_of
    assert not torch.equal(
        *(model.export_encoder(weights_of=w)(crops).last_hidden_state for w in ("teacher", "student"))
    )
    assert model.export_encoder().decoder is not None
    with pytest.raises(ValueError, match="'pupil', this model has: student, teacher"):
        model.export_encoder(weights_of="pupil")


@every_base
def test_state_round_trip_with_teacher_heads_and_centers(name, tmp_path):
    model = make_model(name)
    for _ in train(model, steps=2):
        pass
    model.save_pretrained(tmp_path)
    loaded = EquiSSLForPreTraining.from_pretrained(tmp_path).train()
    assert loaded.invariance.cls_center.any()
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    assert not any(p.requires_grad for _, follower in loaded.ema_pairs() for p in follower.parameters())
    for module in (model, loaded):  # temperatures are not state: they follow from the step
        module.begin_step(TrainingProgress(2, 4, 2))
    views = make_views(model.needs, batch=4)
    assert torch.equal(model(views).loss, loaded(views).loss)


def test_masks_need_a_mask_token_and_local_crops_have_to_be_there():
    with pytest.raises(ValueError, match="use_mask_token"):
        make_model("ibot", use_mask_token=False)
    make_model("dino", use_mask_token=False)
    model = make_model("dino")
    views = make_views(model.needs, batch=4)
    views.local_crops = None
    with pytest.raises(ValueError, match="dino needs local crops"):
        model(views)


def test_bases_without_a_teacher_have_nothing_to_follow():
    assert set(NAMES) <= set(INVARIANCE_OBJECTIVES)
    config = EquiSSLPreTrainingConfig(encoder=tiny_config(), invariance={"name": "vicreg", "expander_sizes": [8, 8]})
    model = EquiSSLForPreTraining(config)
    assert model.teacher is None
    assert not list(model.ema_pairs())
    model.update_teacher(0.9)
    with pytest.raises(ValueError, match="this model has: student"):
        model.export_encoder(weights_of="teacher")
