"""The plan against the thing: parameters, FLOPs and activations of a real step, and arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_equissl.launch import Run, prepare
from hf_equissl.planning import checkpoint_bytes, measure, schedule
from hf_equissl.pretraining import EquiSSLForPreTraining
from hf_equissl.recipes import Recipe
from hf_equissl.training_arguments import EquiSSLTrainingArguments

WIDTH, BLOCKS, TOKENS, PATCH, STEM = 32, 2, 17, 8, 24
BATCH = 6


def plan(**training: object) -> Run:
    recipe = Recipe.from_dict(
        {
            "model": {
                "hidden_size": WIDTH,
                "num_hidden_layers": BLOCKS,
                "num_attention_heads": 2,
                "patch_size": PATCH,
                "image_size": 32,
                "feature_size": STEM,
                "equivariant_size": 8,
            },
            "objectives": {
                "invariance": {"name": "vicreg", "expander_sizes": [48, 40]},
                "equivariance": [{"name": "reconstruction", "decoder_widths": [8, 8, 8]}],
            },
            "views": {"pipeline": {"name": "vicreg"}, "transformation": {"name": "rotation"}},
            "training": {"per_device_train_batch_size": BATCH, "use_cpu": True, **training},
        }
    )
    return prepare(recipe, None, dry=True)


def test_parameters_are_those_of_the_real_model() -> None:
    run = plan()
    cost, model = run.cost(), EquiSSLForPreTraining(run.config)
    parameters = sum(p.numel() for p in model.parameters())
    assert cost.parameters == parameters
    assert cost.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    by_name = {part.name: part for part in cost.parts}
    assert by_name["encoder: stem"].parameters == sum(p.numel() for p in model.student.stem.parameters())
    assert by_name["vicreg: heads"].parameters == sum(p.numel() for p in model.invariance.parameters())
    assert by_name["reconstruction: decoders"].parameters == sum(p.numel() for p in model.equivariance.parameters())
    weights = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    assert checkpoint_bytes(run.config) == 4 * weights + 8 * cost.trainable


def test_flops_by_hand() -> None:
    flops = {part.name: part.flops for part in plan().cost().parts}
    # One view, forward, two per product: q, k, v, o and an MLP of ratio 4; q k^T and (q k^T) v.
    linear = 2 * TOKENS * WIDTH**2 * (4 + 8)
    attention = 2 * 2 * TOKENS**2 * WIDTH
    # Two views. Backward: twice a linear layer; flash attention computes q k^T once more, so 5 products for 2.
    assert flops["encoder: blocks"] == pytest.approx(2 * BLOCKS * (3 * linear + 3.5 * attention))
    # Pixels need no gradient.
    assert flops["encoder: embeddings"] == pytest.approx(2 * 2 * 2 * (TOKENS - 1) * WIDTH * 3 * PATCH**2)
    # Two views: the invariant part of CLS, the equivariant part of the patches.
    assert flops["encoder: stem"] == pytest.approx(2 * 3 * 2 * WIDTH * (16 * 1 + 8 * (TOKENS - 1)))
    assert flops["vicreg: heads"] == pytest.approx(2 * 3 * 2 * (16 * 48 + 48 * 40))
    # What is left: each view's covariance, from the smaller matrix (6 x 6 for 40 x 40), forward and both factors.
    assert flops["loss"] == pytest.approx(2 * 3 * 2 * BATCH * 40)


def test_activations_are_what_a_real_step_keeps() -> None:
    run = plan()
    model = EquiSSLForPreTraining(run.config).train()
    size = run.first.batch_size
    args = EquiSSLTrainingArguments(output_dir="unused", per_device_train_batch_size=size, use_cpu=True)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    own |= {t.untyped_storage().data_ptr() for t in (run.first.global_crops, run.first.intermediate_images)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(run.first)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert measure(run.config, run.first, args).activation_bytes == pytest.approx(real, rel=0.001)


def test_precision_and_checkpointing_save_activations() -> None:
    plain, half, again = (plan(**kw).cost() for kw in ({}, {"bf16": True}, {"activation_checkpointing": True}))
    assert half.activation_bytes < plain.activation_bytes
    assert again.activation_bytes < plain.activation_bytes
    assert again.flops > plain.flops  # blocks are computed a second time
    assert half.flops == pytest.approx(plain.flops)


@pytest.mark.parametrize(("rule", "rate"), [("linear", 8e-4), ("sqrt", 1e-4 * 8**0.5), ("none", 1e-4)])
def test_schedule_of_more_processes_than_there_are(rule: str, rate: float, tmp_path: Path) -> None:
    args = EquiSSLTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        num_train_epochs=800,
        base_learning_rate=1e-4,
        learning_rate_scaling=rule,
        warmup_steps=0.0125,
        use_cpu=True,
    )
    paper = schedule(args, processes=16, images=1_281_167)
    assert paper.batch == 2048
    assert (paper.steps_per_epoch, paper.steps, paper.epochs) == (626, 500_800, 800)  # 1251 half batches, rounded up
    assert paper.warmup_steps == 6260
    assert paper.learning_rate == pytest.approx(rate)
    stream = schedule(args, processes=16, images=None)
    assert (stream.steps, stream.warmup_steps) == (None, None)
