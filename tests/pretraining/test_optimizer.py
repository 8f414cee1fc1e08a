"""Optimizer groups and gradient clipping, against rules and arithmetic written once more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from hf_equissl.modeling import EquiSSLConfig
from hf_equissl.planning import build_without_weights
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.pretraining.optimizer import (
    clip_gradients,
    clipping_parts,
    keep_own_settings,
    module_of,
    optimizer_groups,
    own_settings,
    parameter_rules,
)
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.training.pretrain import RECIPES
from tests.objectives.helpers import run_processes


def tiny_model(**config: Any) -> EquiSSLForPreTraining:
    encoder = EquiSSLConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        feature_size=16,
        equivariant_size=8,
        num_register_tokens=1,
        layerscale_value=0.1,
    )
    invariance = {"name": "ibot", "num_prototypes": 12, "head_hidden_size": 8, "bottleneck_size": 4, **config}
    equivariance = [{"name": "reconstruction", "weight": 1.0, "decoder_widths": [4, 4, 4]}]
    torch.manual_seed(0)
    return EquiSSLForPreTraining(
        EquiSSLPreTrainingConfig(encoder=encoder, invariance=invariance, equivariance=equivariance)
    )


def arguments(folder: Path, **values: Any) -> EquiSSLTrainingArguments:
    return EquiSSLTrainingArguments(output_dir=str(folder), use_cpu=True, **values)


# ---- groups ----


def expected_multipliers() -> dict[str, float]:
    """Prefix -> multiplier for 24 blocks and a decay of 0.9, walking down from the output; most specific first."""
    multipliers: dict[str, float] = {}
    value = 1.0
    for block in reversed(range(24)):
        value *= 0.9
        multipliers[f"student.encoder.layer.{block}."] = value
    value *= 0.9
    multipliers["student.embeddings.patch_embeddings."] = value * 0.2
    multipliers["student.embeddings."] = value
    return {**multipliers, "student.layernorm.": 1.0, "student.stem.": 1.0, "invariance.": 1.0, "equivariance.": 1.0}


def test_every_parameter_of_dinov2_vitl16(tmp_path: Path) -> None:
    recipe = Recipe.load(RECIPES / "vitl16_dinov2_se2.yaml", search=[RECIPES])
    _, model = build_without_weights(recipe.build_pretraining_config())
    args = recipe.build_training_arguments(tmp_path, use_cpu=True, bf16=False)
    rules = parameter_rules(model, args)
    multipliers = expected_multipliers()
    assert multipliers["student.encoder.layer.23."] == 0.9
    assert multipliers["student.encoder.layer.0."] == pytest.approx(0.0797664431)
    assert multipliers["student.embeddings."] == pytest.approx(0.0717897988)

    names = [rule.name for rule in rules]
    everything = [name for name, _ in model.named_parameters()]
    followers = ("teacher.", "invariance.teacher_head.")
    assert names == [name for name in everything if not name.startswith(followers)]
    assert any(name.startswith(followers) for name in everything)
    assert "student.embeddings.mask_token" in names
    for rule in rules:
        multiplier = next(value for prefix, value in multipliers.items() if rule.name.startswith(prefix))
        assert rule.group.lr_multiplier == pytest.approx(multiplier, rel=1e-12), rule.name
        spared = rule.name.endswith(("bias", "lambda1")) or "norm" in rule.name
        assert rule.group.decayed is not spared, rule.name
        held = rule.name in ("invariance.head.prototypes.direction", "invariance.head.prototypes.gain")
        assert rule.group.last_layer is held, rule.name
        assert rule.shape == tuple(model.get_parameter(rule.name).shape)

    groups = optimizer_groups(model, args)
    # Blocks 24 x 2 (decay or not), embeddings 1 (none has one dimension), patches 2, all above 2, prototypes 1.
    assert len(groups) == 24 * 2 + 1 + 2 + 2 + 1
    numbers = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    assert len(numbers) == sum(len(group["params"]) for group in groups) == len(rules)
    for rule in rules:
        group = groups[numbers[id(model.get_parameter(rule.name))]]
        assert rule.number == numbers[id(model.get_parameter(rule.name))]
        assert group["lr"] == pytest.approx(args.learning_rate * rule.group.lr_multiplier)
        assert group["weight_decay"] == (0.04 if rule.group.decayed else 0.0)
    assert (groups[0]["lr_multiplier"], groups[0]["decayed"], groups[0]["last_layer"]) == (1.0, True, False)


def test_without_rules_there_are_two_groups(tmp_path: Path) -> None:
    model = tiny_model()
    decayed, spared = optimizer_groups(model, arguments(tmp_path, weight_decay=0.1))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in spared["params"])
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(p) for group in (decayed, spared) for p in group["params"]} == trained


def test_separate_heads_hold_both_prototypes(tmp_path: Path) -> None:
    rules = parameter_rules(tiny_model(shared_head=False), arguments(tmp_path, freeze_last_layer_epochs=1))
    held = {rule.name for rule in rules if rule.group.last_layer}
    layers = ("prototypes", "patch_prototypes")
    assert held == {f"invariance.head.{layer}.{part}" for layer in layers for part in ("direction", "gain")}


def test_a_resumed_optimizer_keeps_its_state_and_takes_new_settings() -> None:
    """Optimizers without a schedule keep state in their groups, as ``schedulefree`` does."""

    def build(lr: float, decay: float) -> Any:
        group = {"params": [torch.nn.Parameter(torch.zeros(2))], "lr_multiplier": lr, "decayed": decay > 0}
        optimizer = torch.optim.AdamW([group], lr=torch.tensor(lr), betas=(lr, 0.9), weight_decay=decay, foreach=False)
        optimizer.param_groups[0].update(k=0, weight_sum=0.0, lr_max=-1.0, train_mode=False)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    (before, _), (resumed, scheduler) = build(0.25, 0.0), build(0.5, 0.125)
    state = {"k": 7, "weight_sum": 3.0, "lr_max": 0.25, "train_mode": True}
    before.param_groups[0].update(state)
    own = own_settings(resumed)
    resumed.load_state_dict(before.state_dict())
    keep_own_settings(resumed, scheduler, own)
    (group,) = resumed.param_groups
    assert {key: group[key] for key in state} == state
    assert (group["betas"], group["weight_decay"], group["lr_multiplier"], group["decayed"]) == (
        (0.5, 0.9),
        0.125,
        0.5,
        True,
    )
    assert [(type(group[key]), group[key]) for key in ("lr", "initial_lr")] == [(float, 0.5)] * 2


def test_names_within_wrappers() -> None:
    """Activation checkpointing and compilation put words into names."""
    model = tiny_model()
    expected = {
        "_orig_mod.student.stem.weight": "student.stem",
        "student.layernorm.weight": "student",
        "invariance.head.mlp.0.weight": "invariance",
        "invariance.head.prototypes.gain": "invariance",
        "invariance.head.patch_mlp.0.weight": "invariance.patches",
        "invariance.head.patch_prototypes.direction": "invariance.patches",
        "equivariance.0.decoder._checkpoint_wrapped_module.projection.weight": "equivariance.0",
    }
    assert {name: module_of(model, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay must be > 0, got 0"),
        ({"layer_decay": 1.1}, "<= 1, got 1.1"),
        ({"teacher_momentum": 1.5}, r"teacher_momentum must be between 0 and 1, got 1\.5"),
        ({"epoch_steps": 0}, "epoch_steps must be >= 1, got 0"),
        ({"freeze_last_layer_by": "rate"}, "learning_rate, gradient, got 'rate'"),
        ({"grad_clipping": "tensor"}, "global, parameter, module, got 'tensor'"),
        ({"weight_decay_end": -0.1}, "weight_decay_end must be >= 0"),
        ({"freeze_last_layer_epochs": -1}, "freeze_last_layer_epochs must be >= 0"),
    ],
)
def test_mistakes(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **values)


# ---- clipping ----


def fill_gradients(model: EquiSSLForPreTraining) -> dict[str, np.ndarray]:
    """Random gradients of very different sizes on all trained parameters but one; the same as NumPy, float64."""
    rng = np.random.default_rng(0)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name != "student.embeddings.cls_token":
            parameter.grad = torch.from_numpy(10 ** rng.uniform(-3, 1) * rng.standard_normal(parameter.shape)).float()
            gradients[name] = parameter.grad.numpy().astype(np.float64)
    return gradients


def norm_of(arrays: list[np.ndarray]) -> float:
    return float(np.sqrt(sum((array**2).sum() for array in arrays)))


def test_clipping_each_tensor() -> None:
    model = tiny_model()
    before = fill_gradients(model)
    norm = clip_gradients(clipping_parts(model, "parameter"), 3.0)
    assert float(norm) == pytest.approx(norm_of(list(before.values())), rel=1e-5)
    clipped = 0
    fused: dict[str, list[np.ndarray]] = {}  # iBOT's query, key and value are rows of one tensor
    for name, gradient in before.items():
        fused.setdefault(re.sub(r"[qkv]_proj", "qkv", name), []).append(gradient)
    assert sorted({len(parts) for parts in fused.values()}) == [1, 3]
    for name, gradient in before.items():
        size = norm_of(fused[re.sub(r"[qkv]_proj", "qkv", name)])
        expected = gradient * min(1.0, 3.0 / (size + 1e-6))
        np.testing.assert_allclose(model.get_parameter(name).grad.numpy(), expected, rtol=2e-6, err_msg=name)
        clipped += size > 3
    assert 0 < clipped < len(before)
    assert model.student.embeddings.cls_token.grad is None


def test_clipping_each_module() -> None:
    model = tiny_model()
    before = fill_gradients(model)
    stem = [name for name in before if name.startswith("student.stem")]
    decoder = [name for name in before if name.startswith("equivariance.0.")]
    head = [name for name in before if name.startswith("invariance.")]
    backbone = [name for name in before if name.startswith("student.") and name not in stem]
    assert len(before) == len(stem) + len(decoder) + len(head) + len(backbone)
    with torch.no_grad():  # one part within the bound
        for name in stem:
            model.get_parameter(name).grad.mul_(1e-4)
            before[name] = model.get_parameter(name).grad.numpy().astype(np.float64)
    norm = clip_gradients(clipping_parts(model, "module"), 3.0)
    assert float(norm) == pytest.approx(norm_of(list(before.values())), rel=1e-5)
    factors = [min(1.0, 3.0 / (norm_of([before[n] for n in part]) + 1e-6)) for part in (stem, decoder, head, backbone)]
    assert factors[0] == 1.0
    assert max(factors[1:]) < 1.0
    for part, factor in zip((stem, decoder, head, backbone), factors, strict=True):
        for name in part:
            found = model.get_parameter(name).grad.numpy()
            np.testing.assert_allclose(found, factor * before[name], rtol=2e-6, err_msg=name)


def test_clipping_without_gradients_and_by_an_unknown_rule() -> None:
    model = tiny_model()
    assert float(clip_gradients(clipping_parts(model, "module"), 3.0)) == 0.0
    with pytest.raises(ValueError, match="parameter or module, got 'global'"):
        clipping_parts(model, "global")


def shard(tensor: torch.Tensor, mesh: DeviceMesh, rank: int) -> DTensor:
    """This process's rows, as FSDP2 holds them: none where there are fewer rows than processes."""
    parts = tensor.chunk(mesh.size())
    own = parts[rank] if rank < len(parts) else tensor[:0]
    return DTensor.from_local(own.clone(), mesh, [Shard(0)], shape=tensor.shape, stride=tensor.stride())


def sharded(rank: int, processes: int) -> dict[str, Any]:
    """Norm and this process's part of the gradients after clipping; some gradients are split, some whole."""
    mesh = init_device_mesh("cpu", (processes,))
    results: dict[str, Any] = {}
    for rule in ("parameter", "module"):
        model = tiny_model()
        fill_gradients(model)
        names = [name for name, _ in model.named_parameters()]
        parts, parameters = [], []
        for index, (part, parameter) in enumerate(clipping_parts(model, rule)):
            if parameter.grad is not None and index % 5:
                split = torch.nn.Parameter(shard(parameter.detach(), mesh, rank))
                split.grad = shard(parameter.grad, mesh, rank)
                parameter = split
            parts.append(part)
            parameters.append(parameter)
        norm = clip_gradients(zip(parts, parameters, strict=True), 3.0)
        gradients = {name: p.grad for name, p in zip(names, parameters, strict=True) if p.grad is not None}
        results[rule] = norm, {n: g.to_local() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    return results


def test_clipping_sharded_gradients(tmp_path: Path) -> None:
    outcomes = run_processes(sharded, tmp_path)
    for rule in ("parameter", "module"):
        model = tiny_model()
        fill_gradients(model)
        norm = clip_gradients(clipping_parts(model, rule), 3.0)
        for rank, (found_norm, found) in enumerate(outcome[rule] for outcome in outcomes):
            assert float(found_norm) == pytest.approx(float(norm), rel=1e-6)
            shapes = set()
            for name, gradient in found.items():
                whole = model.get_parameter(name).grad
                if gradient.shape != whole.shape:
                    shapes.add(gradient.shape)
                    parts = whole.chunk(2)
                    whole = parts[rank] if rank < len(parts) else whole[:0]
                torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=0, msg=name)
            assert len(shapes) > 5
