"""EquiSSLTrainer with a teacher: schedules, the teacher's update, held prototypes, clipping."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_equissl.data import StreamingViewDataset, load_images
from hf_equissl.data.throughput import LOG_KEYS
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.trainer import EquiSSLTrainer
from tests.pretraining.test_trainer import assert_same, make_trainer, weights

# Every schedule moves within a few steps.
TEACHER = {
    "teacher_momentum": 0.9,
    "weight_decay_end": 0.4,
    "epoch_steps": 2,
    "freeze_last_layer_epochs": 1,
    "layer_decay": 0.9,
    "grad_clipping": "module",
    "max_grad_norm": 0.5,
}


@pytest.mark.parametrize("base", ["dino", "ibot", "dinov2"])
def test_resume_with_a_teacher_is_bit_for_bit(photo_folder: Path, tmp_path: Path, base: str) -> None:
    """Teacher, heads, centers; temperatures, momentum, weight decay; local crops and masks."""
    whole = make_trainer(photo_folder, tmp_path, base=base, **TEACHER)
    whole.train()
    resumed = make_trainer(photo_folder, tmp_path, base=base, **TEACHER)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(whole), weights(resumed))
    assert any("center" in name for name in weights(whole))
    assert not torch.equal(weights(whole)["teacher.layernorm.bias"], weights(whole)["student.layernorm.bias"])
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    logs = [[{key: entry[key] for key in entry.keys() - LOG_KEYS} for entry in log] for log in logs]
    assert logs[0] == logs[1]


def test_logs_name_what_is_scheduled(photo_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(photo_folder, tmp_path, base="ibot", save_strategy="no", **TEACHER)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    share = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert [entry["teacher_momentum"] for entry in logs] == pytest.approx([1 - 0.1 * s for s in share])
    assert [entry["weight_decay"] for entry in logs] == pytest.approx([0.4 - 0.35 * s for s in share])
    assert [entry["learning_rate"] for entry in logs][:3] == pytest.approx([0.0, 5e-4, 1e-3])


def test_the_teacher_follows_after_the_optimizer_step_only(photo_folder: Path, tmp_path: Path) -> None:
    """Three optimizer steps of two micro-batches: three updates, each with the momentum of its own step."""
    name = "encoder.layer.0.mlp.fc1.weight"
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    class Watch(TrainerCallback):
        """(teacher before the first micro-batch, teacher before the second, teacher after the step)"""

        def on_step_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            self.first = model.teacher.get_parameter(name).clone()

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            self.second = model.teacher.get_parameter(name).clone()

        def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            teacher, student = model.teacher.get_parameter(name), model.student.get_parameter(name)
            assert torch.equal(self.first, self.second)
            seen.append((self.first, teacher.clone(), student.detach().clone()))

    trainer = make_trainer(
        photo_folder,
        tmp_path,
        base="ibot",
        max_steps=3,
        gradient_accumulation_steps=2,
        save_strategy="no",
        warmup_steps=0,
        teacher_momentum=0.5,
    )
    trainer.add_callback(Watch())
    trainer.train()
    assert len(seen) == 3
    for step, (before, after, student) in enumerate(seen):
        momentum = 1 - 0.25 * (1 + math.cos(math.pi * step / 3))
        torch.testing.assert_close(after, momentum * before + (1 - momentum) * student)
        assert not torch.equal(after, before)


@pytest.mark.parametrize(("by", "moments"), [("learning_rate", 4), ("gradient", 2)])
def test_prototypes_wait_and_then_learn(photo_folder: Path, tmp_path: Path, by: str, moments: int) -> None:
    """Two epochs of two steps: held in the first, trained in the second; the rest of the head is trained in both.

    With a learning rate of 0 the optimizer counts all four steps, without a gradient the last two alone.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            head = model.invariance.head
            seen.append((head.prototypes.direction.detach().clone(), head.mlp[0].weight.detach().clone()))

    options = {"max_steps": 4, "save_strategy": "no", "warmup_steps": 0, "freeze_last_layer_by": by, **TEACHER}
    trainer = make_trainer(photo_folder, tmp_path, base="dinov2", **options)
    start = trainer.model.invariance.head.prototypes.direction.detach().clone()
    trainer.add_callback(Watch())
    trainer.train()
    prototypes = [start, *(prototype for prototype, _ in seen)]
    changed = [not torch.equal(before, after) for before, after in itertools.pairwise(prototypes)]
    assert changed == [False, False, True, True]
    states = trainer.optimizer.state
    assert int(states[trainer.model.invariance.head.prototypes.direction]["step"]) == moments
    assert int(states[trainer.model.invariance.head.mlp[0].weight]["step"]) == 4
    assert all(not torch.equal(before[1], after[1]) for before, after in itertools.pairwise(seen))


def test_gradients_are_clipped_by_the_chosen_rule(photo_folder: Path, tmp_path: Path) -> None:
    """And the logged norm is the one before it."""
    gradients: dict[str, torch.Tensor] = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def train(**clipping: Any) -> tuple[float, float, float, float]:
        """Logged norm; after clipping the largest tensor's, the head's, and that of everything."""
        trainer = make_trainer(photo_folder, tmp_path, base="ibot", max_steps=1, save_strategy="no", **clipping)
        trainer.add_callback(Catch())
        trainer.train()
        norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        head = math.hypot(*(norm for name, norm in norms.items() if name.startswith("invariance.")))
        return trainer.state.log_history[0]["grad_norm"], max(norms.values()), head, math.hypot(*norms.values())

    logged, tensor, _, whole = train()
    assert logged == pytest.approx(whole, rel=1e-4)
    assert tensor > 1
    bound = 1e-2
    found = train(grad_clipping="parameter", max_grad_norm=bound)
    assert found[:2] == pytest.approx((logged, bound), rel=1e-3)
    assert found[2] > 1.1 * bound
    found = train(grad_clipping="module", max_grad_norm=bound)
    assert (found[0], found[2]) == pytest.approx((logged, bound), rel=1e-3)
    assert found[3] == pytest.approx(2 * bound, rel=1e-3)  # backbone, head, stem, decoders
    found = train(grad_clipping="global", max_grad_norm=bound)
    assert (found[0], found[3]) == pytest.approx((logged, bound), rel=1e-3)


@pytest.mark.parametrize("base", ["ibot", "vicreg"])
def test_a_stream_with_schedules_in_epochs(photo_folder: Path, tmp_path: Path, base: str) -> None:
    """Whoever states something in epochs has to say how long they are: before training, not in its first step."""
    options = {"freeze_last_layer_epochs": 1} if base == "ibot" else {}
    args = {"base": base, "max_steps": 2, "save_strategy": "no", **options}
    model = make_trainer(photo_folder, tmp_path, **args).model
    pipeline = make_trainer(photo_folder, tmp_path, **args).pipeline
    stream = StreamingViewDataset(load_images(str(photo_folder), streaming=True), pipeline, seed=0)

    def build(**extra: Any) -> EquiSSLTrainer:
        arguments = EquiSSLTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=8, disable_tqdm=True, **options, **extra
        )
        return EquiSSLTrainer(model, arguments, pipeline, stream)

    if base == "vicreg":
        build()
        return
    with pytest.raises(ValueError, match=r"a stream has no length.*--training\.epoch_steps N"):
        build()
    trainer = build(epoch_steps=1, save_strategy="no", logging_steps=1)
    trainer.train()
    assert trainer.schedules.steps_per_epoch == 1


def test_settings_that_could_not_act(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no prototypes .* to hold"):
        make_trainer(photo_folder, tmp_path, freeze_last_layer_epochs=1)
    held = {"freeze_last_layer_epochs": 1, "freeze_last_layer_by": "gradient", "epoch_steps": 1}
    trainer = make_trainer(photo_folder, tmp_path, base="ibot", **held)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"DeepSpeed cannot: .*--training\.freeze_last_layer_by learning_rate"):
        trainer._check_settings(trainer.model, stream=False)


def test_optimizers_that_choose_their_own_groups(photo_folder: Path, tmp_path: Path) -> None:
    def build(**arguments: Any) -> EquiSSLTrainer:
        trainer = make_trainer(photo_folder, tmp_path, save_strategy="no", max_steps=1, **arguments)
        own = [{"params": [p for p in trainer.model.parameters() if p.requires_grad]}]
        trainer.optimizer_cls_and_kwargs = torch.optim.SGD, {"lr": 1e-3, "params": own}
        return trainer

    trainer = build()
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="chooses its parameter groups itself, which layer_decay cannot reach"):
        build(layer_decay=0.9).train()
