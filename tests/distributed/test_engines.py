"""Every engine trains the same: losses, final encoder, buffers and precision against one process; what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from hf_equissl.distributed.engines import Engine, find_asked_engine
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.optimizer import clip_gradients

from .equality import IDLE, Measured, curve_difference, encoder_difference, read, weight_difference
from .launching import CONFIGS, ENGINES, ROOT, run

STEPS = 3
# Two layers, and everything that engines do differently: two micro-batches a step, clipping that bites, prototypes that
# are held for the first step, weight normalisation, masks, a teacher, local crops, activation checkpointing.
IBOT = {
    "training.bf16": "false", "training.max_steps": str(STEPS), "training.save_steps": str(STEPS),
    "training.logging_steps": "1", "training.warmup_steps": "1", "model.hidden_size": "32",
    "model.num_hidden_layers": "2", "training.gradient_accumulation_steps": "2", "training.max_grad_norm": "0.5",
    "training.freeze_last_layer_by": "learning_rate", "training.freeze_last_layer_epochs": "0.01",
    "training.activation_checkpointing": "true", "objectives.invariance.freeze_gain": "false",
    "monitor.every_steps": "null",
}  # fmt: skip
VICREG = dict(list(IBOT.items())[:7])


def words_of(recipe: str, settings: dict[str, str]) -> list[str]:
    return ["--recipe", recipe, *(word for key, value in settings.items() for word in (f"--{key}", value))]


@dataclass
class Finished:
    """A run, and what each of its processes knows."""

    measured: Measured
    facts: list[dict[str, Any]]
    folder: Path


@pytest.fixture(scope="module")
def pretrain(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run an engine on 16 images a micro-batch, over all processes."""

    def start(
        engine: str, recipe: str, settings: dict[str, str], folder: Path | None = None, **kwargs: Any
    ) -> Finished:
        folder = folder or tmp_path_factory.mktemp(engine)
        each = "16" if engine == "single" else "8"
        words = ["--data", str(photo_folder), "--output_dir", str(folder), *words_of(recipe, settings)]
        words += ["--training.per_device_train_batch_size", each]
        result = run(engine, *words, variables={"EQUISSL_FACTS": str(folder)}, **kwargs)
        assert result.returncode == 0, result.stderr[-4000:]
        facts = [json.loads(path.read_text()) for path in sorted(folder.glob("facts-*.json"))]
        assert len(facts) == (1 if engine == "single" else 2)
        last = max(int(path.name[11:]) for path in folder.glob("checkpoint-*"))
        return Finished(read(folder, last, result.stdout), facts, folder)

    return start


@pytest.fixture(scope="module")
def alone(pretrain: Any) -> Measured:
    """iBOT on one process."""
    return pretrain("single", "cifar10_ibot_rot", IBOT).measured


@pytest.fixture(scope="module")
def vicreg_alone(pretrain: Any) -> Finished:
    """VICReg on one process."""
    return pretrain("single", "cifar10_vicreg_rot", VICREG)


SHARDED = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "single"])
def test_two_processes_train_as_one(engine: str, alone: Measured, pretrain: Any) -> None:
    by_accelerate = {"launcher": SHARDED, "really": True} if engine == "fsdp2" else {}
    other = pretrain(engine, "cifar10_ibot_rot", IBOT, **by_accelerate)
    name, sharded = other.measured.wrapped.split(", ")
    assert name == ENGINES[engine][1]
    assert (sharded == "0 sharded") == (engine not in ("fsdp2", "zero3", "zero3+offload"))
    assert len(alone.curve) == STEPS
    assert alone.curve[1] != alone.curve[STEPS]
    assert curve_difference(alone, other.measured) < 1e-4
    assert encoder_difference(alone, other.measured) < 1e-4
    assert len(alone.norms) == STEPS
    assert other.measured.norms == pytest.approx(alone.norms, rel=1e-4)
    assert weight_difference(alone, other.measured, but=IDLE["cifar10_ibot_rot"])[0] < 1e-4
    assert all((other.folder / name).is_file() for name in ("reconstructions.png", "report.md"))
    one, two = other.facts
    assert one["buffers"]  # centers
    assert one["buffers"] == two["buffers"]
    assert set(one["weights"].values()) == {"torch.float32"}
    if engine in ("ddp", "fsdp2"):
        for trained, has_gradient, kind in one["gradients"].values():
            assert trained == has_gradient
            assert kind == ("torch.float32" if trained else "")
    if engine == "fsdp2":
        assert one["held"] < 0.6 * one["whole"]
        assert one["held"] + two["held"] == one["whole"]


def test_bf16_is_the_same_under_fsdp2_as_under_ddp(pretrain: Any, vicreg_alone: Finished) -> None:
    bf16 = VICREG | {"training.bf16": "true"}
    ddp, fsdp2 = (pretrain(engine, "cifar10_vicreg_rot", bf16) for engine in ("ddp", "fsdp2"))
    assert fsdp2.measured.wrapped.startswith("FSDPEquiSSLForPreTraining, ")
    assert curve_difference(ddp.measured, fsdp2.measured) < 1e-4
    for facts in (*ddp.facts, *fsdp2.facts):
        assert set(facts["weights"].values()) == {"torch.float32"}
        assert {kind for trained, _, kind in facts["gradients"].values() if trained} == {"torch.float32"}
    assert fsdp2.facts[0]["buffers"] == fsdp2.facts[1]["buffers"]  # statistics of the batch normalisation
    assert 1e-4 < curve_difference(vicreg_alone.measured, fsdp2.measured) < 0.2  # bf16 computes, and not much else


def test_compiled_layers_leave_no_trace(pretrain: Any, vicreg_alone: Finished) -> None:
    plain, run = vicreg_alone, pretrain("single", "cifar10_vicreg_rot", VICREG | {"training.torch_compile": "true"})
    assert plain.facts[0]["compiled"] == 0
    assert run.facts[0]["compiled"] > 0
    assert curve_difference(plain.measured, run.measured) < 1e-4
    assert run.facts[0]["weights"].keys() == plain.facts[0]["weights"].keys()
    assert run.measured.encoder.keys() == plain.measured.encoder.keys()


def test_compiled_fsdp2_goes_on_without(pretrain: Any) -> None:
    shorter = VICREG | {"training.max_steps": "2", "training.save_steps": "2"}
    compiled = shorter | {"training.torch_compile": "true", "training.torch_compile_backend": "aot_eager"}
    first = pretrain("fsdp2", "cifar10_vicreg_rot", compiled)
    assert all(facts["compiled"] > 0 for facts in first.facts)
    second = pretrain("fsdp2", "cifar10_vicreg_rot", VICREG, first.folder)
    assert second.facts[0]["compiled"] == 0
    assert list(second.measured.curve) == [1, 2, 3]
    assert second.measured.curve[2] == first.measured.curve[2]


def test_every_configuration_serves_several_machines() -> None:
    """The command of ddp_multi_node.yaml with any of the files: torchrun on each machine, and no ssh between them."""
    words = ["--num_machines", "2", "--num_processes", "16", "--machine_rank", "1"]
    words += ["--main_process_ip", "host", "--main_process_port", "29500", "pretrain.py"]
    for config in sorted(CONFIGS.glob("*.yaml")):
        if config.stem in ("cpu", "single_gpu"):
            continue
        given = launch_command_parser().parse_args(["--config_file", str(config), *words])
        args, *_ = _validate_launch_command(given)
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ""
            assert prepare_deepspeed_cmd_env(args)[0] is None  # accelerate starts torchrun itself
        else:
            prepare_multi_gpu_env(args)
        assert (int(args.nnodes), int(args.nproc_per_node), int(args.node_rank)) == (2, 8, 1), config.name
        direct = f"{args.master_addr}:{args.master_port}" if args.same_network else args.rdzv_endpoint
        assert direct == "host:29500", config.name


def test_fsdp2_is_not_quietly_ddp(photo_folder: Path, tmp_path: Path) -> None:
    words = ["--data", str(photo_folder), "--output_dir", str(tmp_path / "run"), *words_of("cifar10_ibot_rot", IBOT)]
    words += ["--training.per_device_train_batch_size", "8"]
    result = run("fsdp2", *words, script=ROOT / "training" / "pretrain.py")
    assert result.returncode != 0
    assert "FSDP2 is asked for on CPUs, where accelerate gives ddp instead" in result.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))


REFUSED = {
    "version 1": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "only version 2 is supported"),
    "version 1 by default": ({"ACCELERATE_USE_FSDP": "true"}, {}, "only version 2 is supported"),
    "version 1 in arguments": ({}, {"fsdp": True, "fsdp_config": {"version": 1}}, "only version 2 is supported"),
    "fp16": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"fp16": True}, "fp16 is not supported under FSDP2"),
    "loading": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
        {},
        "fsdp_cpu_ram_efficient_loading must be false",
    ),
    "checkpointing": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
        {},
        "--training.activation_checkpointing true",
    ),
    "precision": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "the arguments for 'no'"),
    "compilation": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "--training.torch_compile true"),
    "offload in arguments": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
        {"fsdp": True, "fsdp_config": {"version": 2, "cpu_offload": True}},
        "has to come from the launcher",
    ),
    "an optimizer of DeepSpeed's": (
        {},
        {"deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}},
        "has a block 'optimizer'",
    ),
    "a schedule of DeepSpeed's": (
        {},
        {"deepspeed": {"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}},
        "has a block 'scheduler'",
    ),
    "stage 0": (
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
        {},
        "stages 1, 2 and 3 are supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, fields, message = REFUSED[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        EquiSSLTrainingArguments(output_dir=str(tmp_path), **fields)


def test_the_arguments_decide_the_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert EquiSSLTrainingArguments(output_dir=str(tmp_path), bf16=True).mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert EquiSSLTrainingArguments(output_dir=str(tmp_path), bf16=True).mixed_precision == "bf16"


def test_what_a_launch_asks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_asked_engine() is Engine.SINGLE
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_asked_engine() is Engine.DDP
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert find_asked_engine() is Engine.FSDP2
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for stage in (1, 2, 3):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
        assert find_asked_engine() is Engine(f"zero{stage}")
    config = tmp_path / "zero.json"
    config.write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(config))
    assert find_asked_engine() is Engine.ZERO1


def test_clipping_without_shards_is_what_it_was() -> None:
    weights = {name: torch.nn.Parameter(torch.zeros(3)) for name in ("a", "b")}
    for factor, weight in enumerate(weights.values(), start=1):
        weight.grad = factor * torch.tensor([2.0, 0.0, 0.0])
    total = clip_gradients(weights.items(), max_norm=1.0)
    torch.testing.assert_close(total, torch.tensor(20.0).sqrt())
    torch.testing.assert_close(torch.stack([w.grad.norm() for w in weights.values()]), torch.ones(2))  # type: ignore[union-attr]
