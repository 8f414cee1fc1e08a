"""The plan against the thing: parameters, FLOPs and activations of a real step, and arithmetic by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hf_equissl.planning import build_without_weights, checkpoint_bytes, measure
from hf_equissl.planning.arithmetic import milestones, schedule
from hf_equissl.planning.optimizer_memory import OptimizerMemory, optimizer_memory
from hf_equissl.planning.optimizer_table import fold_names, optimizer_rows
from hf_equissl.planning.step import smallest_batch
from hf_equissl.planning.storages import StepMemory
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.model import EquiSSLForPreTraining
from hf_equissl.pretraining.optimizer import parameter_rules
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import Run, prepare

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes"
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


def arguments(optim: str) -> EquiSSLTrainingArguments:
    return EquiSSLTrainingArguments(output_dir="unused", optim=optim, use_cpu=True)


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
    for optim, states in {"adamw_torch_fused": 2, "lars": 1, "sgd": 0}.items():
        assert checkpoint_bytes(run.config, arguments(optim)) == 4 * weights + states * 4 * cost.trainable


@pytest.mark.parametrize(
    ("optim", "expected"),
    {
        "adamw_torch_fused": OptimizerMemory("AdamW", 2.0, fused=True),
        "adamw_torch": OptimizerMemory("AdamW", 2.0, fused=False),
        "lars": OptimizerMemory("LARS", 1.0, fused=True),
        "sgd": OptimizerMemory("SGD", 0.0, fused=False),
        "adamw_bnb_8bit": OptimizerMemory("adamw_bnb_8bit", 2.0, fused=False),  # not installed: as AdamW
    }.items(),
)
def test_memory_is_that_of_the_optimizer(optim: str, expected: OptimizerMemory) -> None:
    assert optimizer_memory(arguments(optim)) == expected


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
    assert measure(run.config, run.first, args, size).activation_bytes == pytest.approx(real, rel=0.001)


def test_precision_and_checkpointing_save_activations() -> None:
    plain, half, again = (plan(**kw).cost() for kw in ({}, {"bf16": True}, {"activation_checkpointing": True}))
    assert half.activation_bytes < plain.activation_bytes
    assert again.activation_bytes < plain.activation_bytes
    assert again.flops > plain.flops  # blocks are computed a second time
    assert half.flops == pytest.approx(plain.flops)


def test_recomputed_activations_live_for_one_block() -> None:
    """The backward pass with checkpointing holds less than without, and no more for more blocks."""

    def backward(blocks: int, again: bool) -> tuple[int, int]:
        run = plan(activation_checkpointing=again)
        run.config.encoder_config.num_hidden_layers = blocks
        cost = run.cost(batch=64)
        return max(moment.other for moment in cost.moments if moment.phase == "backward"), len(cost.trained_layers)

    plain, few, many = backward(8, again=False), backward(4, again=True), backward(8, again=True)
    assert (plain[1], few[1], many[1]) == (8, 4, 8)
    assert many[0] < 0.5 * plain[0]
    # What grows are the inputs of blocks, two views each.
    assert many[0] - few[0] == pytest.approx(4 * 4 * 2 * 64 * TOKENS * WIDTH, rel=0.1)


@pytest.mark.parametrize("again", [False, True])
def test_passes_through_layers_are_counted(again: bool) -> None:
    assert plan(activation_checkpointing=again).cost().trained_calls == (1,) * BLOCKS
    recipe = teacher_student()
    recipe.training["activation_checkpointing"] = again
    cost = prepare(recipe, None, dry=True).cost()
    assert (cost.trained_calls, cost.frozen_calls) == ((1,) * BLOCKS, (1,) * BLOCKS)  # local crops go along
    inside = sum(cost.trained_layers) + sum(cost.frozen_layers)
    assert sum(rows * width for rows, width, _ in cost.root) == cost.parameters - inside
    assert sum(rows * width for rows, width, learns in cost.root if learns) == cost.trainable - sum(cost.trained_layers)


def test_objectives_say_the_smallest_batch() -> None:
    config = plan().config
    assert smallest_batch(config, processes=8, most=32) == 1  # VICReg gathers the batches
    config.invariance["gather"] = False
    assert [smallest_batch(config, processes=8, most=most) for most in (1, 2, 32)] == [1, 2, 2]


LOCAL_CROPS, LOCAL_TOKENS, PROTOTYPES, HIDDEN, BOTTLENECK = 3, 5, 24, 16, 8


def teacher_student(**raw: object) -> Recipe:
    return Recipe.from_dict(
        {
            "model": {
                "hidden_size": WIDTH,
                "num_hidden_layers": BLOCKS,
                "num_attention_heads": 2,
                "patch_size": PATCH,
                "image_size": 32,
            },
            "objectives": {
                "invariance": {
                    "name": "ibot",
                    "num_prototypes": PROTOTYPES,
                    "head_hidden_size": HIDDEN,
                    "bottleneck_size": BOTTLENECK,
                    "teacher_temperature_warmup_epochs": 4,
                },
            },
            "views": {"pipeline": {"name": "ibot", "local": {"count": LOCAL_CROPS, "size": 16}}},
            "training": {
                "per_device_train_batch_size": BATCH,
                "use_cpu": True,
                "max_steps": 100,
                "epoch_steps": 10,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-5},
                "warmup_steps": 20,
                "weight_decay": 0.04,
                "weight_decay_end": 0.4,
                "teacher_momentum": 0.9,
                "freeze_last_layer_epochs": 1,
            },
            **raw,
        }
    )


def test_a_teacher_costs_weights_and_forward_passes() -> None:
    run = prepare(teacher_student(), None, dry=True)
    cost, model = run.cost(), EquiSSLForPreTraining(run.config)
    parts = {part.name: part for part in cost.parts}
    assert list(parts) == [
        "encoder: embeddings", "encoder: blocks", "ibot: heads", "teacher: encoder", "teacher: heads", "loss",
    ]  # fmt: skip
    assert model.teacher is not None
    assert parts["teacher: encoder"].parameters == sum(p.numel() for p in model.teacher.parameters())
    assert parts["teacher: heads"].parameters == parts["ibot: heads"].parameters > 0
    assert parts["teacher: encoder"].trainable == parts["teacher: heads"].trainable == 0

    def forward(tokens: int) -> float:
        return BLOCKS * (2 * tokens * WIDTH**2 * (4 + 8) + 2 * 2 * tokens**2 * WIDTH)

    patches = 2 * (TOKENS - 1) * WIDTH * 3 * PATCH**2
    assert parts["teacher: encoder"].flops == pytest.approx(2 * (forward(TOKENS) + patches))

    def step(tokens: int, queries: int) -> float:
        """Forward and backward of one block that gives ``queries`` tokens: they alone pass o, q and the MLP."""
        linear, attention = 2 * WIDTH**2 * (2 * tokens + 10 * queries), 2 * 2 * queries * tokens * WIDTH
        return 3 * linear + 3.5 * attention

    crops = [(TOKENS, TOKENS)] * 2 + [(LOCAL_TOKENS, 1)] * LOCAL_CROPS  # of local crops the last block gives CLS alone
    expected = sum((BLOCKS - 1) * step(tokens, tokens) + step(tokens, queries) for tokens, queries in crops)
    # Not exact: products outside of layers, in part the teacher's, take their share of the backward pass.
    assert parts["encoder: blocks"].flops == pytest.approx(expected, rel=0.01)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.trainable == trained
    assert len(cost.trained_layers) == len(cost.frozen_layers) == BLOCKS
    assert sum(cost.trained_layers) == parts["encoder: blocks"].parameters - 2 * WIDTH  # the final norm is of the root
    phases = [moment.phase for moment in cost.moments]
    assert phases[:2] == ["teacher", "forward"]
    assert set(phases[2:]) == {"backward"}
    teacher, forward = cost.moments[:2]
    assert 0 < teacher.other < cost.activation_bytes < forward.other
    assert "teacher" not in [moment.phase for moment in plan().cost().moments]


def test_gradients_grow_while_activations_shrink() -> None:
    cost = plan(bf16=True).cost()
    forward, *backward = cost.moments
    gradients = [moment.layer_gradients + moment.root_gradients for moment in backward]
    assert gradients == sorted(gradients)
    assert (gradients[0], gradients[-1]) == (0, 4 * cost.trainable)
    assert backward[-1].layer_gradients == 4 * sum(cost.trained_layers)
    # Copies in bf16 of everything that is multiplied, kept until backward has used them.
    matrices = sum(p.numel() for p in EquiSSLForPreTraining(plan().config).parameters() if p.ndim > 1)
    assert 0.8 * 2 * matrices < forward.casts < 1.1 * 2 * matrices
    assert (backward[-1].casts, backward[-1].other) == (0, pytest.approx(0, abs=100))
    assert all(moment.casts == 0 for moment in plan().cost().moments)


def test_storages_count_while_they_live() -> None:
    with StepMemory() as live:
        first = torch.zeros(100)
        view = first.view(10, 10)
        del first
        assert live.peak == 400
        view.add_(1)
        del view
        second = torch.zeros(60)
        assert live.peak == 400
        third = second + 1
        assert live.peak == 480
    assert third.sum() == 60
    live.begin("")
    assert [(moment.phase, moment.other) for moment in live.moments] == [("forward", 480)]


def test_objectives_exchange_what_the_processes_see() -> None:
    run = plan()
    views = run.pipeline.blank(BATCH, device="meta")
    alone, one_of_four = (measure(run.config, views, run.args, BATCH, processes=n) for n in (1, 4))
    assert alone.exchanged_bytes == 0
    # Projections of two views are gathered, their gradients reduced to all (on CPUs), on a ring of four.
    gathered = 4 * (4 * BATCH * 2 * 40)
    # Batch normalisation of one hidden layer, two views: mean, variance and count.
    statistics = 2 * 4 * (4 * (2 * 48 + 1))
    assert one_of_four.exchanged_bytes == (gathered + statistics) * 3 // 4 * 3
    assert one_of_four.activation_bytes > alone.activation_bytes
    assert not torch.distributed.is_initialized()


def test_masked_patches_are_those_of_many_batches() -> None:
    run = prepare(teacher_student(), None, dry=True)
    views = run.pipeline.blank(BATCH)
    assert views.mask_indices is not None
    per_crop = len(views.mask_indices) / (2 * BATCH)
    assert 0.1 * 16 / 2 < per_crop < 0.5 * 16 / 2  # half of the crops, 10 to 50 % of 16 patches


def test_processes_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = teacher_student(num_processes=16, data={"num_images": 1000})
    written = prepare(recipe, None, dry=True)
    assert (written.plan.processes, written.plan.batch, written.plan.images) == (16, 16 * BATCH, 1000)
    assert prepare(recipe, None, dry=True, processes=2).plan.processes == 2
    monkeypatch.setenv("WORLD_SIZE", "1")  # a launcher has decided
    assert prepare(recipe, None, dry=True).plan.processes == 1


def test_hours_and_milestones_by_hand() -> None:
    run = prepare(teacher_student(), None, dry=True)
    # 100 steps x 6 images x 3e12 operations at half of 10 TFLOP/s: 360 s.
    assert run.plan.hours(3e12, utilisation=0.5, device_tflops=10) == pytest.approx(0.1)
    _, model = build_without_weights(run.config)
    rows = {row.name: row for row in milestones(run.args, run.plan, model)}
    assert [row.step for row in rows.values()] == [0, 20, 50, 99]

    def half_cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    assert rows["start"].learning_rate == 0
    assert rows["end of warm-up"].learning_rate == pytest.approx(1e-3)
    assert rows["middle"].learning_rate == pytest.approx(half_cosine(1e-3, 1e-5, 30 / 80))
    assert rows["middle"].weight_decay == pytest.approx(0.22)
    assert rows["middle"].teacher_momentum == pytest.approx(0.95)
    assert rows["end"].teacher_momentum == pytest.approx(half_cosine(0.9, 1.0, 0.99))
    # iBOT's temperature changes between epochs of 10 steps: 0.04, 0.05, 0.06, 0.07.
    temperatures = [row.scheduled["teacher_temperature"] for row in rows.values()]
    assert temperatures == pytest.approx([0.04, 0.06, 0.07, 0.07])


def unfold(text: str) -> list[str]:
    """Names with braces expanded as a shell does it."""
    depth, items = 0, [""]
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        items = [*items, ""] if letter == "," and depth == 0 else [*items[:-1], items[-1] + letter]
    if len(items) > 1:
        return [name for item in items for name in unfold(item)]
    before, brace, rest = text.partition("{")
    if not brace:
        return [text]
    end = next(i for i, letter in enumerate(rest) if letter == "}" and rest[:i].count("{") == rest[:i].count("}"))
    return [before + middle + tail for middle in unfold(rest[:end]) for tail in unfold(rest[end + 1 :])]


def test_names_fold() -> None:
    names = ["a.0.w", "a.0.b", "a.1.w", "a.1.b", "c"]
    assert fold_names(names) == "{a.{0,1}.{w,b},c}"
    assert fold_names(["a.b.c"]) == "a.b.c"
    assert unfold(fold_names(names)) == names


def test_optimizer_table_of_vitl16_dinov2_has_every_parameter() -> None:
    recipe = Recipe.load(RECIPES / "vitl16_dinov2_se2.yaml")
    _, model = build_without_weights(recipe.build_pretraining_config())
    args = recipe.build_training_arguments("unused", bf16=False, use_cpu=True)
    rows = optimizer_rows(parameter_rules(model, args))[1:]
    treated: dict[str, tuple[str, str]] = {}
    for multiplier, decay, count, _, folded in rows:
        names = unfold(folded)
        assert len(names) == int(count)
        assert not treated.keys() & set(names)
        treated |= {name: (multiplier, decay) for name in names}
    assert treated.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        "student.embeddings.patch_embeddings.projection.weight": (0.2 * 0.9**25, "yes"),
        "student.embeddings.patch_embeddings.projection.bias": (0.2 * 0.9**25, "no"),
        "student.embeddings.cls_token": (0.9**25, "yes"),
        "student.encoder.layer.0.attention.q_proj.weight": (0.9**24, "yes"),
        "student.encoder.layer.0.layer_scale1.lambda1": (0.9**24, "no"),
        "student.encoder.layer.23.mlp.fc2.bias": (0.9, "no"),
        "student.layernorm.weight": (1, "no"),
        "student.stem.weight": (1, "yes"),
        "invariance.head.prototypes.direction": (1, "yes, held first"),
        "equivariance.0.decoder.projection.weight": (1, "yes"),
    }
    for name, (multiplier, decay) in expected.items():
        assert treated[name] == (f"{multiplier:.4g}", decay)


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
    assert (paper.steps_per_epoch, paper.steps, paper.epochs) == (625, 500_000, 800)  # whole batches
    assert paper.warmup_steps == 6250
    assert paper.learning_rate == pytest.approx(rate)
    stream = schedule(args, processes=16, images=None)
    assert (stream.steps, stream.warmup_steps) == (None, None)
