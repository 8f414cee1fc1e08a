"""Any value in any place: a sentence and exit code 2, or a run; never a traceback, a hang, or a full memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import threading
import typing
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from hf_equissl.data import load_images
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, FILLED_IN, INVARIANCE_OBJECTIVES
from hf_equissl.pretraining import argument_checks
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.recipes.monitor_settings import MonitorSettings
from hf_equissl.recipes.sections import encoder_fields
from hf_equissl.training import convert, plan, pretrain, probe, sweep
from hf_equissl.utils.coercion import parameters_of
from hf_equissl.views import TRANSFORMATIONS
from hf_equissl.views.view_specs import LocalSpec, MaskSpec, PipelineSpec, ViewSpec
from tests.processes import limit

DRAWS = 200
SECONDS = 10  # of one value
TINY = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, image_size: 32,
        feature_size: 32, equivariant_size: 16}
objectives:
  invariance: {name: vicreg, expander_sizes: [32, 32]}
  equivariance: [{name: reconstruction, decoder_widths: [8, 8, 8]}]
views:
  pipeline: {name: vicreg}
  transformation: {name: rotation}
training: {max_steps: 2, per_device_train_batch_size: 4, disable_tqdm: true, use_cpu: true, save_strategy: "no"}
"""
# What stands for "anything" in a command line: each kind of value, its borders, and what is none at all.
WORDS = r"""
0 1 -1 2 7 0.5 1.5 -0.1 1e-300 1e300 -1e300 1e400 .nan .inf -.inf -5 1000000000 2147483648 4294967296
9223372036854775808 100000000000000000000000 true false null ~ foo '' auto no 0x10 1_000 2001-01-01 @ é - [] {} [1,2]
[0.1,1] [1,0] [.nan,1,1] [0,0,0] [a] [[1]] {"foo":1} {"name":foo} [{"name":vicreg}] "\0" "\ud800" nowhere/there
/etc/passwd /dev/zero
"""
SENTENCES = ("!!int foo", "!foo 1", "!!python/name:os.system x", "&a [*a]", "{a: 1, a: 2}", "{1: 2}", "{<<: {a: 1}}")
VALUES = (*WORDS.split(), *SENTENCES, "1" * 5000, "a" * 3000, "[" * 3000)


def settings() -> list[str]:
    """Every key that a recipe can have, as on the command line."""
    keys = {f"model.{name}" for name in encoder_fields()} | {"model.preset", "model.init_from", "model.init_revision"}
    keys |= {f"training.{field.name}" for field in dataclasses.fields(EquiSSLTrainingArguments) if field.init}
    keys |= {f"data.{name}" for name in (*parameters_of(load_images), "max_bad_share", "shuffle_buffer", "num_images")}
    keys |= {f"monitor.{field.name}" for field in dataclasses.fields(MonitorSettings)}
    keys |= {f"views.pipeline.{field.name}" for field in dataclasses.fields(PipelineSpec)}
    keys |= {f"views.pipeline.local.{field.name}" for field in dataclasses.fields(LocalSpec)}
    keys |= {f"views.pipeline.view_1.{field.name}" for field in dataclasses.fields(ViewSpec)}
    keys |= {f"views.pipeline.masks.{field.name}" for field in dataclasses.fields(MaskSpec)}
    for place, registry in (("invariance", INVARIANCE_OBJECTIVES), ("equivariance.0", EQUIVARIANCE_OBJECTIVES)):
        names = {name for kind in registry.values() for name in parameters_of(kind, skip=FILLED_IN)}
        keys |= {f"objectives.{place}.{name}" for name in (*names, "weight", "views", "name")}
    names = {name for family in TRANSFORMATIONS.values() for name in parameters_of(family)}
    keys |= {f"views.transformation.{name}" for name in (*names, "name")}
    keys |= {"views.image_mean", "views.image_std", "model", "objectives", "views", "data", "training", "monitor"}
    return sorted(keys)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail what takes longer: a value that hangs or would fill the memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not answered in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(math.ceil(seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(command: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command; returns what it says if it refuses, "" if it runs. Anything else fails."""
    assert threading.current_thread() is threading.main_thread()
    capsys.readouterr()
    shown = " ".join(word if len(word) < 200 else f"{word[:50]}... ({len(word)})" for word in words)
    environment = dict(os.environ)
    try:
        with at_most(limit(SECONDS)):
            code = command.main(words)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        raise AssertionError(f"{shown}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err, shown
    assert code in (0, 2, None), f"{shown}: {code}: {err[-500:]}"
    if code != 2:
        return ""
    message = err.strip().splitlines()[-1]
    assert "error: " in message, f"{shown}: {err[-500:]}"
    assert len(message) < 2500, f"{shown}: {message}"
    return message


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_any_value_of_any_setting(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(20)
    keys = settings()
    assert len(keys) > 200
    draw.shuffle(keys)
    refused = 0
    for number in range(DRAWS):
        key, value = keys[number % len(keys)], draw.choice(VALUES)
        words = ["--recipe", str(recipe), "--dry_run", f"--{key}={value}"]
        refused += bool(answer(pretrain, words, capsys))
    assert DRAWS / 3 < refused < DRAWS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lr_scheduler_kwargs={foo:1}", "got an unexpected keyword argument 'foo'"),
        ("lr_scheduler_kwargs={num_cycles:-0.5} lr_scheduler_type=linear", "schedule"),
        ("lr_scheduler_type=warmup_stable_decay", "num_decay_steps"),
        ("lr_scheduler_type=reduce_lr_on_plateau", "follows a metric"),
        ("optim=adamw_bnb_8bit", "bitsandbytes"),
        ("optim=schedule_free_adamw", "schedulefree"),
        ("optim=sgd optim_args=foo", "name=value pairs"),
        ("optim=sgd optim_args=foo=1", "foo=1 changes nothing"),
        ("optim=sgd optim_args=momentum=nan", "momentum must be finite"),
        ("optim=lars optim_args=momentum=2", "LARS needs"),
        ("adam_beta1=1", ">= 0 and < 1, got 1"),
        ("adam_epsilon=.inf", "expected a finite number, got inf"),
        ("weight_decay=-1", "weight_decay must be >= 0, got -1"),
        ("save_steps=.nan", "expected a finite number, got nan"),
        ("save_steps=1.5", "a whole number of steps"),
        ("save_total_limit=0", "save_total_limit must be >= 1, got 0"),
        ("max_steps=-5", "max_steps must be >= -1, got -5"),
        ("max_steps=100000000000000000000000", "at most 64 bits"),
        ("seed=-1", "seed must be >= 0, got -1"),
        ("data_seed=4294967296", "<= 4294967295, got 4294967296"),
        ("use_liger_kernel=true", "language models"),
        ("eval_strategy=steps", "the section `monitor` measures"),
        ("label_smoothing_factor=0.1", "no labels to smooth"),
        ("dataloader_persistent_workers=true", "no processes that load"),
        ("dataloader_num_workers=1 dataloader_multiprocessing_context=spwan", "fork, spawn, forkserver, got 'spwan'"),
        ("dataloader_num_workers=1000000", "<= 1024"),
        ("torch_compile=true torch_compile_mode=foo", "max-autotune"),
        ("torch_compile_mode=default", "torch_compile is false"),
        ("log_level=foo", "log_level must be one of"),
    ],
)
def test_settings_that_training_alone_would_find(
    words: str, expected: str, recipe: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the first step, and nothing is left in the folder."""
    pairs = [f"--training.{word.replace(':', ': ')}" for word in words.split()]
    output = tmp_path / "run"
    said = answer(
        pretrain, ["--recipe", str(recipe), "--data", str(photo_folder), "--output_dir", str(output), *pairs], capsys
    )
    assert expected in said
    assert not list(output.glob("checkpoint-*"))
    assert not (output / "encoder").exists()
    assert expected in answer(pretrain, ["--recipe", str(recipe), "--dry_run", *pairs], capsys)


@pytest.mark.parametrize("words", ["optim_args=momentum=0.5", "optim_args=momentum=0.9", "optim_args=nesterov=1"])
def test_a_default_may_be_repeated(
    words: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an optimizer that fills in defaults, as transformers does for those of other packages."""

    def with_default(context: Any) -> Any:
        return torch.optim.SGD, {"lr": 0.1, "momentum": float(context.optim_args.get("momentum", 0.5))}

    monkeypatch.setitem(trainer_optimizer._OPTIMIZER_HANDLERS, OptimizerNames.SGD, with_default)
    expected = "nesterov=1 changes nothing" if "nesterov" in words else ""
    code = pretrain.main(["--recipe", str(recipe), "--dry_run", "--training.optim=sgd", f"--training.{words}"])
    assert (code, expected in capsys.readouterr().err) == (2 if expected else 0, True)


@pytest.mark.parametrize(("found", "named"), [("clang++", None), ("g++-14", "g++-14"), ("c++", None), (None, "g++-14")])
def test_any_compiler_compiles(
    found: str | None, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", named) if named else monkeypatch.delenv("CXX", raising=False)
    if found:
        (tmp_path / found).touch(mode=0o755)
    build: Any = EquiSSLTrainingArguments
    with nullcontext() if found else pytest.raises(ValueError, match="needs a C"):
        build(str(tmp_path), use_cpu=True, torch_compile=True)


def test_every_number_of_the_arguments_has_a_range() -> None:
    """A field that transformers adds has to be looked at: it gets a range, or a reason why it has no effect."""
    hints = typing.get_type_hints(EquiSSLTrainingArguments)
    numbers = {
        field.name
        for field in dataclasses.fields(EquiSSLTrainingArguments)
        if {int, float} & (set(typing.get_args(hints[field.name])) or {hints[field.name]})
    }
    assert numbers - argument_checks.RANGES.keys() - argument_checks.WITHOUT_EFFECT.keys() == set()


def test_an_attention_that_this_machine_lacks(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kernel, word in (("flash_attention_2", "FlashAttention2"), ("foo", "attn_implementation")):
        words = ["--recipe", str(recipe), "--dry_run", "--model.attn_implementation", kernel]
        assert word in answer(pretrain, words, capsys)


def test_a_recipe_that_is_another_file_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = tmp_path / "secret.yaml"
    secret.write_text("root:x:0:0:hunter2:/root:/bin/bash\nmore hunter2\n")
    (tmp_path / "plain").write_text(secret.read_text())
    os.mkfifo(tmp_path / "pipe.yaml")
    recipes = {"a": f"extends: {secret}", "b": f"extends: {tmp_path / 'plain'}", "c": f"extends: {tmp_path}/pipe.yaml"}
    for name, text in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    places = [secret, *(tmp_path / f"{name}.yaml" for name in recipes), tmp_path / "pipe.yaml", Path("/dev/zero")]
    for place in (*places, Path("/etc/passwd"), Path("/" + "a" * 300), tmp_path):
        for command, words in ((pretrain, ["--dry_run"]), (sweep, ["--list"])):
            said = answer(command, ["--recipe", str(place), *words], capsys)
            assert said
            assert "hunter2" not in said
            assert "root:" not in said


def test_sweeps_and_plans_of_millions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = list(range(2000))
    cross = {"training.seed": seeds, "training.data_seed": seeds}
    grid = {"name": "a-{seed}-{data_seed}", "extends": "vits16_vicreg.yaml", "cross": cross}
    (tmp_path / "many.yaml").write_text(json.dumps({"sweep": [grid]}))
    assert "4000000 runs" in answer(sweep, ["--recipe", str(tmp_path / "many.yaml"), "--list"], capsys)
    for words in (
        ["--gpus", "1000000000"],
        ["--gpus", "-1"],
        ["--memory", "nan"],
        ["--memory", "1e300"],
        ["--link", "0"],
        ["--memory", ""],
    ):
        assert answer(plan, ["--recipe", "cifar10_vicreg", *words], capsys), words


def test_files_and_options_of_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junk = tmp_path / "junk.pth"
    draw = random.Random(0)
    for content in (b"", b"junk", b"PK\x03\x04" + bytes(90), *(b"\x80\x02" + draw.randbytes(99) for _ in range(20))):
        junk.write_bytes(content)
        assert "cannot be read" in answer(convert, [str(junk), "--output_dir", str(tmp_path / "out")], capsys)
    for words in (["--image_size", "0"], ["--image_std", "nan", "1", "1"], ["--image_mean", "1e400", "0", "0"]):
        assert answer(convert, [str(tmp_path), "--output_dir", str(tmp_path / "out"), *words], capsys), words
    given = {"--encoder": str(tmp_path), "--data": str(tmp_path), "--output_dir": str(tmp_path / "out")}
    for words in (["--init_from="], ["--output_dir="], ["--data="], ["--num_processes", "1000000000"]):
        assert answer(pretrain, ["--recipe", "cifar10_vicreg", "--dry_run", *words], capsys), words
    for name, value in (("--data", ""), ("--encoder", ""), ("--image_size", "0"), ("--max_bad_share", "nan")):
        words = [word for pair in (given | {name: value}).items() for word in pair]
        assert answer(probe, words, capsys), name
