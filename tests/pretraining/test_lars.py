"""LARS against its formula, in float64 and NumPy, and how a run comes to train with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.lars import LARS
from hf_equissl.pretraining.optimizer import choose_optimizer, freeze_parameters, parameter_rules
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import build_training, prepare
from hf_equissl.utils.suggestions import RecipeError
from tests.objectives.helpers import run_processes

SETTINGS = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.05, "trust_coefficient": 0.02}


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(4, 3, generator=g),
        "bias": torch.randn(5, generator=g),
        "zero": torch.zeros(2, 2),
        "still": torch.randn(2, 3, generator=g),
    }


def gradient(name: str, step: int, shape: torch.Size) -> torch.Tensor:
    if name == "still" and step == 0:
        return torch.zeros(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + len(name)))


def by_formula(steps: int) -> dict[str, np.ndarray]:
    results = {}
    for name, start in weights().items():
        w = start.double().numpy().copy()
        v = np.zeros_like(w)
        for step in range(steps):
            decay = 0.0 if w.ndim == 1 else SETTINGS["weight_decay"]
            u = gradient(name, step, start.shape).double().numpy() + decay * w
            norms = np.sqrt((w**2).sum()), np.sqrt((u**2).sum())
            scale = SETTINGS["trust_coefficient"] * norms[0] / norms[1] if w.ndim > 1 and min(norms) > 0 else 1.0
            v = SETTINGS["momentum"] * v + scale * u
            w = w - SETTINGS["lr"] * v
        results[name] = w
    return results


def train(parameters: dict[str, torch.nn.Parameter], wrap: Any, steps: int = 4) -> None:
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1]},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = LARS(groups, **SETTINGS)
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = wrap(gradient(name, step, parameter.shape))
        optimizer.step()


def test_steps_equal_the_formula() -> None:
    parameters = {name: torch.nn.Parameter(value) for name, value in weights().items()}
    train(parameters, lambda tensor: tensor)
    for name, expected in by_formula(4).items():
        np.testing.assert_allclose(parameters[name].detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


def sharded(rank: int, processes: int) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (processes,))

    def split(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    parameters = {name: torch.nn.Parameter(split(value)) for name, value in weights().items()}
    train(parameters, split)
    return {name: parameter.detach().full_tensor() for name, parameter in parameters.items()}


def test_norms_are_those_of_whole_parameters_where_they_are_sharded(tmp_path: Path) -> None:
    for found in run_processes(sharded, tmp_path):
        for name, expected in by_formula(4).items():
            np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"trust_coefficient": 0}])
def test_numbers_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="LARS needs lr"):
        LARS([torch.nn.Parameter(torch.zeros(2))], **wrong)


def recipe(folder: Path, **training: Any) -> Recipe:
    for index in range(8):
        Image.new("RGB", (40, 40), (20 * index, 90, 90)).save(folder / f"{index}.png")
    return Recipe.from_dict(
        {
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "objectives": {"invariance": {"name": "vicreg", "expander_sizes": [8, 8]}},
            "views": {"pipeline": {"name": "vicreg"}},
            "data": {"source": str(folder)},
            "training": {
                "max_steps": 2,
                "per_device_train_batch_size": 4,
                "use_cpu": True,
                "optim": "lars",
                **training,
            },
        }
    )


def test_a_run_trains_with_it_decays_everything_and_leaves_the_patch_embedding(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    settings = {
        "optim_args": "momentum=0.5, trust_coefficient=0.01",
        "decay_one_dimensional": True,
        "freeze_patch_embedding": True,
        "optim": "lars",
        "weight_decay": 0.1,
        "save_strategy": "no",
    }
    run = prepare(recipe(tmp_path / "images", **settings), tmp_path / "run")
    model, trainer = build_training(run)
    before = {name: value.clone() for name, value in model.student.state_dict().items()}
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, LARS)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["trust_coefficient"], group["weight_decay"]) == (0.5, 0.01, 0.1)
    after = model.student.state_dict()
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    embedding = {name for name in before if ".patch_embeddings." in name}
    assert embedding
    assert same - embedding <= {"embeddings.mask_token"}
    assert embedding <= same


def test_what_is_frozen_has_no_rule(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    run = prepare(recipe(tmp_path / "images", freeze_patch_embedding=True), None, dry=True)
    whole = prepare(recipe(tmp_path / "images"), None, dry=True)
    frozen, trained = run.cost().trainable, whole.cost().trainable
    assert trained - frozen == 3 * 8 * 8 * 32 + 32
    model, _ = build_training(run)
    freeze_parameters(model, run.args)
    assert not [rule.name for rule in parameter_rules(model, run.args) if ".patch_embeddings." in rule.name]


def test_names_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(RecipeError, match=r"training\.optim: expected one of 'adamw_torch'.* or one of 'lars', got"):
        recipe(tmp_path / "images", optim="larz")
    args = EquiSSLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim="lars", optim_args="momentun=0.9")
    with pytest.raises(RecipeError, match="Did you mean 'momentum'"):
        choose_optimizer(None, args)
    kind, _ = choose_optimizer(None, EquiSSLTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert kind is torch.optim.AdamW
