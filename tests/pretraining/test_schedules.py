"""Schedules: the formulas, and tables computed by hand against what a Trainer with the shipped recipes holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_equissl.data import ImageViewDataset
from hf_equissl.objectives.progress import TrainingProgress, cosine, linear_ramp
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.model import EquiSSLForPreTraining
from hf_equissl.pretraining.schedules import last_layer_is_held, teacher_momentum
from hf_equissl.pretraining.trainer import EquiSSLTrainer
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.training.pretrain import RECIPES

IMAGENET_IMAGES = 1_281_167
SMALL = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "objectives.invariance.num_prototypes": 8,
    "objectives.invariance.head_hidden_size": 8,
    "objectives.invariance.bottleneck_size": 4,
}


class SizeOfImageNet:
    """A source that is counted and never read."""

    streaming = False
    name = "imagenet (train)"
    num_rows = IMAGENET_IMAGES

    def __len__(self) -> int:
        return IMAGENET_IMAGES

    def fingerprint(self) -> str:
        return ""


class Run:
    """A Trainer as it stands right before the first step, and the means to put it before any other."""

    def __init__(self, recipe: Recipe, folder: Path, **arguments: Any) -> None:
        args = recipe.build_training_arguments(folder, disable_tqdm=True, use_cpu=True, bf16=False, **arguments)
        torch.manual_seed(0)
        model = EquiSSLForPreTraining(recipe.build_pretraining_config())
        pipeline = recipe.build_pipeline(model.needs)
        dataset = ImageViewDataset(SizeOfImageNet(), pipeline, seed=0)  # type: ignore[arg-type]
        self.trainer = EquiSSLTrainer(model, args, pipeline, dataset)
        loader = self.trainer.get_train_dataloader()
        *_, max_steps = self.trainer.set_initial_training_values(args, loader)
        self.trainer.create_optimizer_and_scheduler(max_steps)
        self.trainer.state.max_steps = max_steps
        handler = self.trainer.callback_handler
        handler.train_dataloader = loader
        handler.optimizer, handler.lr_scheduler = self.trainer.optimizer, self.trainer.lr_scheduler
        handler.on_train_begin(args, self.trainer.state, self.trainer.control)

    def begin(self, step: int) -> None:
        trainer = self.trainer
        trainer.state.global_step = step
        trainer.lr_scheduler.last_epoch = step - 1
        trainer.lr_scheduler.step()
        trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)

    def groups(self, key: str) -> dict[str, float]:
        """Parameter name -> its group's value."""
        names = {id(parameter): name for name, parameter in self.trainer.model.named_parameters()}
        return {names[id(p)]: group[key] for group in self.trainer.optimizer.param_groups for p in group["params"]}

    def momentum(self) -> float:
        """That of the update which ends this step, read off a weight that the teacher follows from 0 to 1."""
        model = self.trainer.model
        leader, follower = next(model.ema_pairs())
        with torch.no_grad():
            next(leader.parameters()).fill_(1.0)
            next(follower.parameters()).fill_(0.0)
        trainer = self.trainer
        trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        return 1.0 - float(next(follower.parameters()).flatten()[0])

    def table_row(self) -> tuple[float, float, float, float]:
        """(lr, weight decay, momentum, teacher temperature) of a stem or head weight in this step."""
        name = "invariance.head.mlp.0.weight"
        temperature = self.trainer.model.invariance.cls_temperature
        assert self.trainer.model.invariance.patch_temperature == temperature
        return self.groups("lr")[name], self.groups("weight_decay")[name], self.momentum(), temperature


def recipe(name: str, **overrides: Any) -> Recipe:
    return Recipe.load(RECIPES / f"{name}.yaml", {**SMALL, **overrides}, search=[RECIPES])


# ViT-S/16 iBOT, 800 epochs, batch 1024. An epoch has floor(1,281,167 / 1024) = 1251 steps: T = 800 x 1251 = 1,000,800
# steps and W = 10 x 1251 = 12,510 of warm-up.
#   lr           2e-3 i / W; then 1e-6 + (2e-3 - 1e-6) c((i - W) / (T - W)), c(x) = (1 + cos(pi x)) / 2, T - W = 988,290
#   weight decay 0.4 - 0.36 c(i / T)
#   momentum     1 - 0.004 c(i / T)
#   temperature  0.04 + 0.03 e / 29 in epoch e = floor(i / 1251) < 29, then 0.07
# c(0) = 1, c(1/3) = 0.75, c(1/2) = 0.5, c(2/3) = 0.25.
# In the warm-up x = i / T is small: c(0.00125) = 1 - 3.8553e-6, c(0.00625) = 1 - 9.6380e-5, c(0.0125) = 1 - 3.8548e-4.
IBOT_VITS16 = {
    0: (0.0, 0.04, 0.996, 0.04),
    # first step of epoch 1: 2e-3 / 10; 0.04 + 0.36 x 3.855e-6; 0.996 + 0.004 x 3.855e-6; 0.04 + 0.03 / 29
    1251: (2e-4, 0.0400013879, 0.9960000154, 0.0410344828),
    # half of the warm-up, first step of epoch 5: 0.36 x 9.638e-5 = 3.4697e-5; 0.004 x 9.638e-5 = 3.855e-7; 0.15 / 29
    6255: (1e-3, 0.0400346968, 0.9960003855, 0.0451724138),
    # the step before is in epoch 4: 2e-3 x 6254 / 12,510; 0.12 / 29
    6254: (9.998401279e-4, 0.0400346856, 0.9960003854, 0.0441379310),
    # end of the warm-up, epoch 10: 0.36 x 3.8548e-4 = 1.38772e-4; 0.004 x 3.8548e-4 = 1.5419e-6; 0.3 / 29
    12510: (2e-3, 0.0401387735, 0.9960015419, 0.0503448276),
    # T / 3, long after epoch 30; (333,600 - 12,510) / 988,290 = 0.3248945: c = 0.76139055; 1e-6 + 1.999e-3 c
    333_600: (1.523019703e-3, 0.13, 0.997, 0.07),
    # W + (T - W) / 3 = 341,940: 1e-6 + 1.999e-3 x 0.75; i / T = 0.3416667: c = 0.73857938
    341_940: (1.50025e-3, 0.1341114232, 0.9970456825, 0.07),
    # T / 2; (500,400 - 12,510) / 988,290 = 0.4936709: c = 0.50994109
    500_400: (1.020372247e-3, 0.22, 0.998, 0.07),
    # W + (T - W) / 2 = 506,655: 1e-6 + 1.999e-3 / 2; i / T = 0.50625: c = 0.49018315
    506_655: (1.0005e-3, 0.2235340646, 0.9980392674, 0.07),
    # 2 T / 3; (667,200 - 12,510) / 988,290 = 0.6624473: c = 0.25576167
    667_200: (5.122675725e-4, 0.31, 0.999, 0.07),
    # the last step: c = 3e-12
    1_000_799: (1e-6, 0.4, 1.0, 0.07),
}


@pytest.fixture(scope="module")
def ibot(tmp_path_factory: pytest.TempPathFactory) -> Run:
    # One process with the batch of all 16 that the recipe is written for.
    return Run(recipe("vits16_ibot"), tmp_path_factory.mktemp("ibot"), per_device_train_batch_size=1024)


@pytest.mark.parametrize("step", IBOT_VITS16)
def test_table_of_ibot_vits16(ibot: Run, step: int) -> None:
    assert ibot.trainer.state.max_steps == 1_000_800
    assert ibot.trainer.schedules.steps_per_epoch == 1251
    ibot.begin(step)
    assert ibot.table_row() == pytest.approx(IBOT_VITS16[step], rel=0, abs=1e-9)


def test_ibot_holds_its_prototypes_for_one_epoch(ibot: Run) -> None:
    """Their gradient is dropped before the optimizer sees it; the learning rate goes on."""
    trainer, name = ibot.trainer, "invariance.head.prototypes.direction"
    others = trainer.model.get_parameter("invariance.head.mlp.0.weight")
    for step, is_held in {0: True, 1: True, 1250: True, 1251: False, 12510: False}.items():
        ibot.begin(step)
        for parameter in (trainer.model.get_parameter(name), others):
            parameter.grad = torch.ones_like(parameter)
        trainer.callback_handler.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        assert (trainer.model.get_parameter(name).grad is None) == is_held
        assert others.grad is not None
        assert ibot.groups("lr")[name] == pytest.approx(2e-3 * step / 12510)
    trainer.model.zero_grad()


# ViT-L/16 DINOv2, the short configuration: 100 epochs of 1250 steps whatever the data, so T = 125,000; W = 12,500.
#   lr           peak p = 4e-3 sqrt(2048 / 1024) = 5.656854249e-3: p i / W; then 1e-6 + (p - 1e-6) c((i - W) / 112,500)
#   weight decay 0.4 - 0.36 c(i / T)
#   momentum     1 - 0.008 c(i / T)
#   temperature  0.04 + 0.03 i / 37,499 in the first 30 x 1250 = 37,500 steps, then 0.07
# c(1/5) = (1 + cos 36) / 2 = 0.904508497, c(2/5) = (1 + cos 72) / 2 = 0.654508497, c(0.1) = 0.975528258.
DINOV2_VITL16 = {
    0: (0.0, 0.04, 0.992, 0.04),
    # first step of the second epoch, 0.01 T: c = 0.999753280; 0.03 x 1250 / 37,499
    1250: (5.656854249e-4, 0.0400888191, 0.9920019738, 0.0410000267),
    # end of the warm-up, 0.1 T: 0.4 - 0.36 x 0.975528258; 0.03 x 12,500 / 37,499
    12_500: (5.656854249e-3, 0.0488098271, 0.9921957739, 0.0500002667),
    # T / 5; (25,000 - 12,500) / 112,500 = 1/9: cos 20 = 0.939692621, c = 0.969846310; 0.03 x 25,000 / 37,499
    25_000: (5.486309376e-3, 0.0743769410, 0.9927639320, 0.0600005333),
    # last step of the temperature's line, 0.299992 T: c = 0.793902792; 24,999 / 112,500 = 0.2222133: c = 0.883031196
    37_499: (4.995295745e-3, 0.1141949947, 0.9936487777, 0.07),
    # 2 T / 5, W + (T - W) / 3: 1e-6 + 5.655854249e-3 x 0.75
    50_000: (4.242890687e-3, 0.1643769410, 0.9947639320, 0.07),
    # T / 2; 50,000 / 112,500 = 4/9: cos 80 = 0.173648178, c = 0.586824089
    62_500: (3.319991517e-3, 0.22, 0.996, 0.07),
    # W + (T - W) / 2: 1e-6 + 5.655854249e-3 / 2; 0.55 T: cos 99 = -0.156434465, c = 0.421782767
    68_750: (2.828927125e-3, 0.2481582037, 0.9966257379, 0.07),
    # the last step: 1e-6 + 5.656e-3 x 1.95e-10
    124_999: (1.000001103e-6, 0.4, 1.0, 0.07),
}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(recipe("vitl16_dinov2"), tmp_path_factory.mktemp("dinov2"), per_device_train_batch_size=2048)


@pytest.mark.parametrize("step", DINOV2_VITL16)
def test_table_of_dinov2_vitl16(dinov2: Run, step: int) -> None:
    assert dinov2.trainer.state.max_steps == 125_000
    assert dinov2.trainer.schedules.steps_per_epoch == 1250  # a pass over ImageNet has 625
    dinov2.begin(step)
    assert dinov2.table_row() == pytest.approx(DINOV2_VITL16[step], rel=0, abs=1e-9)


def test_layer_decay_scales_the_whole_schedule_of_dinov2(dinov2: Run) -> None:
    """Two blocks: 0.9^2, 0.9, then 1; embeddings 0.9^3, patches 0.2 of that. The minimum is relative, too."""
    multipliers = {
        "student.embeddings.patch_embeddings.projection.weight": 0.1458,
        "student.embeddings.cls_token": 0.729,
        "student.encoder.layer.0.mlp.fc1.weight": 0.81,
        "student.encoder.layer.1.norm1.weight": 0.9,
        "student.layernorm.weight": 1.0,
    }
    for step, lr in {1250: 5.656854249e-4, 50_000: 4.242890687e-3, 124_999: 1.000001103e-6}.items():
        dinov2.begin(step)
        rates = dinov2.groups("lr")
        for name, multiplier in multipliers.items():
            assert rates[name] == pytest.approx(lr * multiplier, rel=1e-6), name
    dinov2.begin(50_000)
    decays = dinov2.groups("weight_decay")
    assert decays["student.embeddings.cls_token"] == pytest.approx(0.1643769411)
    assert decays["student.encoder.layer.1.norm1.weight"] == 0.0


def test_dinov2_holds_its_prototypes_for_1250_steps(dinov2: Run) -> None:
    name = "invariance.head.prototypes.direction"
    for step, expected in {0: 0.0, 1249: 0.0, 1250: 5.656854249e-4}.items():
        dinov2.begin(step)
        assert dinov2.groups("lr")[name] == pytest.approx(expected)


def test_the_logged_learning_rate_is_that_of_the_heads(dinov2: Run) -> None:
    dinov2.begin(12_500)
    assert dinov2.trainer._get_learning_rate() == pytest.approx(5.656854249e-3)


def test_cosine_and_line_against_numpy() -> None:
    steps = np.arange(50)
    expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * steps / 50))
    np.testing.assert_allclose([cosine(0.04, 0.4, int(step), 50) for step in steps], expected)
    assert cosine(0.04, 0.4, 50, 50) == cosine(0.04, 0.4, 99, 50) == cosine(0.04, 0.4, 0, 0) == 0.4
    line = [linear_ramp(0.04, 0.07, step, 30) for step in range(40)]
    np.testing.assert_allclose(line[:30], np.linspace(0.04, 0.07, 30))
    assert line[30:] == [0.07] * 10


def test_epochs_of_a_stream_need_a_length(tmp_path: Path) -> None:
    progress = TrainingProgress(step=10, max_steps=100)
    with pytest.raises(ValueError, match=r"--training\.epoch_steps N"):
        _ = progress.epoch
    args = EquiSSLTrainingArguments(output_dir=str(tmp_path), freeze_last_layer_epochs=0.5)
    with pytest.raises(ValueError, match="a stream has no length"):
        last_layer_is_held(args, progress)
    assert last_layer_is_held(args, TrainingProgress(9, 100, 20))
    assert not last_layer_is_held(args, TrainingProgress(10, 100, 20))
    assert teacher_momentum(args, progress) == pytest.approx(1 - 0.004 * (1 + np.cos(0.1 * np.pi)) / 2)
