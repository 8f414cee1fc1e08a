"""The command: it plans, trains, resumes and exports, and it refuses bad input before the first step."""

from __future__ import annotations

import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hf_equissl.hub import repository
from hf_equissl.hub.publishable import PublishError
from hf_equissl.pretraining.trainer import EquiSSLTrainer
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.training import pretrain
from tests import processes
from tests.hub.loopback_hub import LoopbackHub

pytest_plugins = ["tests.hub.fixtures"]
ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "training" / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TINY = """
description: A tiny one.
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, image_size: 32,
        feature_size: 32, equivariant_size: 16}
objectives:
  invariance: {name: vicreg, expander_sizes: [32, 32]}
  equivariance: [{name: reconstruction, decoder_widths: [8, 8, 8]}]
views:
  pipeline: {name: vicreg}
  transformation: {name: rotation}
training: {max_steps: 2, per_device_train_batch_size: 4, save_steps: 1, disable_tqdm: true, use_cpu: true}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that must end with code 2."""
    capsys.readouterr()
    assert pretrain.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    *_, message = err.strip().splitlines()  # progress bars may stand before it; it is one paragraph
    assert message.startswith("error: ")
    return message


def test_what_is_left_out_is_said_before_the_first_step(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for index in range(8):
        Image.fromarray(np.full((32, 32), 4000 + index, np.uint16)).save(data / f"{index}.png")
        (data / f"{index}.ARW").write_bytes(b"raw")
    words = ["--recipe", str(recipe), "--data", str(data)]
    for more in (["--dry_run"], ["--output_dir", str(tmp_path / "run")]):
        assert pretrain.main([*words, *more]) == 0
        out = capsys.readouterr().out
        assert "note: 8 files of other types (.ARW) are left out" in out
        assert "use only 4000 to 4007 of 0 to 65535" in out
    assert pretrain.main([*words, "--dry_run", "--data.value_range", "[0, 4095]"]) == 0
    assert "use only" not in capsys.readouterr().out


def test_train_export_resume(images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    words = ["--recipe", str(recipe), "--data", str(images), "--output_dir", str(output)]
    assert pretrain.main(words) == 0
    assert Recipe.load(output / "recipe.yaml").data["source"] == str(images)
    encoder = AutoModel.from_pretrained(output / "encoder")
    processor = AutoImageProcessor.from_pretrained(output / "encoder")
    pixels = processor(Image.new("RGB", (64, 50)), return_tensors="pt")["pixel_values"]
    assert encoder(pixels).last_hidden_state.shape == (1, 17, 32)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]

    capsys.readouterr()
    assert pretrain.main([*words, "--training.max_steps", "3"]) == 0
    assert f"resuming from {output / 'checkpoint-2'}" in capsys.readouterr().out
    assert (output / "checkpoint-3").is_dir()

    assert "model.num_hidden_layers = 2" in fails(capsys, *words, "--model.num_hidden_layers", "3")
    assert "holds checkpoint-3 already" in fails(capsys, *words, "--resume", "never")
    assert "no complete checkpoint" in fails(capsys, *words, "--resume", output / "encoder")


def test_a_finished_run_is_only_exported(
    images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    weights = output / "encoder" / "model.safetensors"
    words = ["--recipe", str(recipe), "--data", str(images), "--output_dir", str(output)]
    words += ["--training.lr_scheduler_type", "constant"]  # step 2 of 3 in the epoch: the Trainer would go on
    assert pretrain.main(words) == 0
    before = sorted(path.name for path in output.glob("checkpoint-*")), weights.read_bytes()
    shutil.rmtree(output / "encoder")
    assert pretrain.main(words) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert (sorted(path.name for path in output.glob("checkpoint-*")), weights.read_bytes()) == before
    assert "is at step 2, and this run ends at step 1" in fails(capsys, *words, "--training.max_steps", 1)


def test_weights_that_are_not_finite_are_not_exported(
    images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last update spoils them: no loss, log or checkpoint comes after it."""
    words = ["--recipe", str(recipe), "--data", str(images), "--output_dir", str(tmp_path / "run")]
    words += ["--training.save_strategy", "no", "--training.learning_rate", "1e39", "--training.max_steps", "1"]
    assert pretrain.main([*words, "--training.warmup_steps", "0"]) == 1
    assert "is not finite after step 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "encoder").exists()


def test_another_run_does_not_continue_or_overwrite(
    images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--recipe", recipe, "--data", images, "--output_dir", tmp_path / "run", "--training.save_strategy", "no"]
    assert pretrain.main(list(map(str, words))) == 0
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    for key, old, new in (
        ("training.seed", 42, 1),
        ("training.data_seed", 42, 1),
        ("training.epoch_steps", None, 3),
        ("training.layer_decay", 1.0, 0.9),
        ("data.split", "'train'", "test"),
        ("objectives.equivariance.0.weight", 1.0, 2.0),
    ):
        assert f"holds a run with {key} = {old}, and" in fails(capsys, *words, f"--{key}", new)
    said = fails(capsys, *words, "--training.per_device_train_batch_size", 2)
    assert "holds a run with a global batch of 4 images" in said
    assert "--training.per_device_train_batch_size 2 --training.gradient_accumulation_steps 2" in said


def test_publishing(
    images: Path,
    recipe: Path,
    tmp_path: Path,
    hub_here: LoopbackHub,
    api: HfApi,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The card's code runs in a new process, which takes seconds and is tested with the card.
    monkeypatch.setattr(repository, "run_snippets", lambda chosen: None)
    output = tmp_path / "run"
    words = ["--recipe", recipe, "--data", images, "--output_dir", output, "--training.push_to_hub", "true"]
    words += ["--training.hub_model_id", "tiny", "--training.hub_strategy", "end", "--training.max_steps", "1"]
    assert "The licence is yours to say" in fails(capsys, *words)
    (tmp_path / "text").write_text("Only on Sundays.")
    words += ["--training.hub_license", "other"]
    assert "--training.hub_license_link or --training.hub_license_file" in fails(capsys, *words)
    words += ["--training.hub_license_name", "sundays", "--training.hub_license_file", tmp_path / "text"]
    with monkeypatch.context() as context:
        context.setenv("HF_TOKEN", hub_here.read_token)
        assert "has no right to write there" in fails(capsys, *words)
    assert not list(output.glob("checkpoint-*"))
    with monkeypatch.context() as context:
        context.setattr(EquiSSLTrainer, "_start_push", refuse)
        assert pretrain.main([str(word) for word in words]) == 1
    assert "The run is finished" in capsys.readouterr().err.splitlines()[-1]
    assert (output / "encoder" / "model.safetensors").is_file()
    assert pretrain.main([str(word) for word in words]) == 0
    assert "nothing to train" in capsys.readouterr().out
    files = api.list_repo_files("maker/tiny")
    assert {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "LICENSE.md",
        "pretraining/recipe.yaml",
    } <= set(files)
    published = api.hf_hub_download("maker/tiny", "model.safetensors")
    assert Path(published).read_bytes() == (output / "encoder" / "model.safetensors").read_bytes()
    start = ["--init_from", "maker/tiny", "--model.init_subfolder", "pretraining"]
    assert pretrain.main(["--recipe", str(recipe), *start, "--dry_run"]) == 0
    report = capsys.readouterr().out
    assert "starting from maker/tiny (subfolder pretraining, revision " in report
    for line in ("vicreg          taken", "reconstruction  taken", "std [0.229, 0.224, 0.225]: the encoder's"):
        assert line in report


def refuse(self: EquiSSLTrainer, *args: object, **kwargs: object) -> None:
    raise PublishError("The Hub has trouble of its own (status 503).")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar10_vicreg", ["vicreg: heads", "128 per device x 1 processes"]),
        ("cifar10_vicreg_rot", ["vicreg: heads", "reconstruction: decoders", "intermediate_images"]),
        ("cifar10_ibot_rot", ["ibot: heads", "teacher: encoder", "block masks", "held for 1 epoch = 100 steps"]),
        ("cifar10_dinov2", ["dinov2: heads", "teacher: heads", "dinov2/loss_koleo"]),
        (
            "vits16_vicreg_rot",
            ["128 per device x 16 processes x accumulation 1 = 2048", "0.0001 x 2048/256 = 0.0008", "625 steps"],
        ),
        (
            "vits16_ibot_se2",
            ["64 per device x 16 processes x accumulation 1 = 1024", "0.0005 x 1024/256 = 0.002", "10 local crops"],
        ),
        (
            "vitl16_dinov2_se2",
            [
                "32 per device x 64 processes x accumulation 1 = 2048",
                "0.004 x sqrt(2048/1024) = 0.005657",
                "125000 = 100 epochs of 1250 steps = 200 passes over the data, the first 12500 warm up",
                "planned for the recipe's processes: --num_processes 1 plans for one",
                "end of warm-up   12500     0.00565685",
                "at 40 % of 312 TFLOP/s per device (A100, bf16)",
                "hours on 64 devices",
                "stem 2048 = 1536 invariant + 512 equivariant",
                "student.encoder.layer.2.{attention.{q_proj,k_proj,v_proj,o_proj}.weight,mlp.{fc1,fc2}.weight}",
                "teacher: encoder",
                "optimizer state (AdamW)",
            ],
        ),
    ],
)
def test_dry_run_of_shipped_recipes(
    name: str, expected: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    fewer = ["--model.num_hidden_layers", "3"] if name.startswith("vit") else []  # each costs a third of a second
    assert pretrain.main(["--recipe", name, "--dry_run", *fewer]) == 0
    report = capsys.readouterr().out
    for text in ("encoder: blocks", "GFLOP/image", "activations", "lr x", *expected):
        assert text in report


def test_assumptions_about_time(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", str(recipe), "--dry_run", "--utilisation"]
    assert pretrain.main([*words, "0.25", "--device_tflops", "989"]) == 0
    report = capsys.readouterr().out
    assert "at 25 % of 989 TFLOP/s per device; others: --utilisation, --device_tflops" in report
    assert "--utilisation 2: expected a share above 0, at most 1" in fails(capsys, *words, "2")
    assert "--device_tflops 0: expected a number above 0" in fails(capsys, *words, "1", "--device_tflops", "0")
    assert "--utilisation belongs to --dry_run" in fails(capsys, "--recipe", recipe, "--utilisation", "1")


def test_a_sweep_has_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "--recipe", "vits16_ibot_sweep", "--dry_run")
    assert "python training/sweep.py --recipe vits16_ibot_sweep --list" in message


def test_launched_by_path(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, str(ROOT / "training" / "pretrain.py"), "--recipe", "cifar10_vicreg_rot"]
    command += ["--data", str(images), "--output_dir", str(output), "--dry_run"]
    command += ["--training.per_device_train_batch_size", "4"]
    done = processes.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 images / 4 = 3 steps" in done.stdout
    with Image.open(output / "views.png") as picture:
        assert picture.size == (4 * 98, 14 + 6 * 98)  # two views and two targets, six images
    assert not list(output.glob("checkpoint-*"))


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--list_recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in SHIPPED)
    assert re.search(r"vits16_ibot_sweep +\[sweep\.py\] 22 runs", listed)


def test_mistakes_on_the_command_line(
    images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--recipe", recipe, "--data", images, "--output_dir", tmp_path / "out"]
    assert "'vits16_vicreg_rot'" in fails(capsys, "--recipe", "vits16_vicreg_rto", "--dry_run")
    assert "cannot be read" in fails(capsys, "--recipe", tmp_path / "none.yaml", "--dry_run")
    assert "'vits16_vicreg_rot'" in fails(capsys, "--recipe", "vits16_vicreg_rto.yaml", "--dry_run")
    assert "--recipe is missing" in fails(capsys, "--dry_run")
    assert "--output_dir is missing" in fails(capsys, *run[:4])
    assert "Did you mean --output_dir" in fails(capsys, *run[:4], "--output_di", "x")
    assert "Did you mean 'max_steps'" in fails(capsys, *run, "--training.max_step", 3)
    assert "give one of them" in fails(capsys, *run, "--data.source", images)
    assert "accelerate launch" in fails(capsys, *run, "--num_processes", 2)
    assert not (tmp_path / "out").exists()


def test_output_folder(
    images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--recipe", recipe, "--data", images, "--output_dir"]
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file" in fails(capsys, *run, tmp_path / "file")
    assert f"{tmp_path / 'file'} is a file" in fails(capsys, *run, tmp_path / "file" / "below")
    (tmp_path / "mine" / "encoder").mkdir(parents=True)
    (tmp_path / "mine" / "encoder" / "notes.txt").touch()
    assert "encoder holds notes.txt, which is no part of a saved encoder" in fails(capsys, *run, tmp_path / "mine")
    assert "cannot be written" in fails(capsys, *run, "/proc/hf_equissl")  # no process may write there, root neither
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    message = fails(capsys, *run, tmp_path / "full")
    assert "0 bytes are free" in message
    assert "save_total_limit" in message


def test_data(images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--recipe", recipe, "--output_dir", tmp_path / "out", "--data"]
    assert str(tmp_path / "nowhere") in fails(capsys, *run, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(capsys, *run, tmp_path / "empty")
    assert "data.source" in fails(capsys, *run[:-1])
    batch = ["--training.per_device_train_batch_size", 16]
    assert "12 images are fewer than one batch of 16 x 1" in fails(capsys, *run, images, *batch)

    broken = tmp_path / "broken"
    broken.mkdir()
    for index in range(8):
        (broken / f"{index}.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    assert "did not decode" in fails(capsys, *run, broken)

    table = tmp_path / "table.parquet"
    rows = {"photo": [str(path) for path in sorted(images.iterdir())], "size": list(range(12))}
    datasets.Dataset.from_dict(rows).to_parquet(table)
    run = [*run[:-1], "--data.cache_dir", tmp_path / "cache", "--data"]
    message = fails(capsys, *run, table, "--data.column", "foto")
    assert "'photo'" in message
    assert "holds no images" in fails(capsys, *run, table, "--data.column", "size")
    stream = ["--data.streaming", "true", "--training.max_steps", "-1"]
    assert "training.max_steps: a stream has no length" in fails(capsys, *run, table, *stream)


def test_a_step_that_cannot_work_is_refused_before_training(
    images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--recipe", recipe, "--data", images, "--output_dir", tmp_path / "out"]
    assert "at least 2 images" in fails(capsys, *run, "--training.per_device_train_batch_size", 1)
    assert "names no transformation" in fails(capsys, *run, "--views.transformation", "null")
    assert "decoder_widths" in fails(capsys, *run, "--objectives.equivariance.0.decoder_widths", "[8]")
    held = ["--training.freeze_last_layer_epochs", "1"]
    assert "this model has no prototypes" in fails(capsys, *run, *held)
    assert "this model has no prototypes" in fails(capsys, "--recipe", recipe, "--dry_run", *held)
    stemless = ["--model.feature_size", "null", "--model.equivariant_size", "null"]
    assert "equivariant part" in fails(capsys, *run, *stemless)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--training.max_steps -1 --training.num_train_epochs 0", "training.num_train_epochs: expected more than 0"),
        ("--training.max_steps -1 --training.num_train_epochs -1", "training: num_train_epochs must be >= 0"),
        ("--training.max_steps 0", "training.max_steps: expected 1 or more"),
        ("--dry_run --num_processes 0", "--num_processes 0: expected 1 or more"),
        ("--training.per_device_train_batch_size 0", "training: per_device_train_batch_size must be >= 1, got 0"),
        ("--training.gradient_accumulation_steps 0", "training: gradient_accumulation_steps must be >= 1, got 0"),
        ("--training.save_steps 0", "training: save_steps must be > 0"),
        ("--training.learning_rate -1", "training: learning_rate must be >= 0"),
        ("--training.dataloader_num_workers -1", "training: dataloader_num_workers must be >= 0"),
        ("--training.remove_unused_columns true", "training: remove_unused_columns must stay false"),
        ("--training.logging_nan_inf_filter true", "training: logging_nan_inf_filter must stay false"),
        ("--training.hub_token secret", "'hub_token' does not belong into a recipe"),
        ("--init_from nowhere/there --model.init_from x", "--init_from and --model.init_from say the same"),
        ("--init_from ./nowhere", "model.init_from (--init_from): No encoder at './nowhere'"),
        ("--training.report_to nowhere", "training: "),
        ("--model.hidden_act gelo", "model.hidden_act: there is no 'gelo'. Did you mean 'gelu'"),
        ("--data.shuffle_buffer -1", "data.shuffle_buffer: expected 0"),
    ],
)
def test_values_that_cannot_work_are_refused_before_training(
    words: str, message: str, images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--recipe", recipe, "--data", images, "--output_dir", tmp_path / "out"]
    assert message in fails(capsys, *run, *words.split())
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_an_unreadable_image_is_named(
    images: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    words = ["--recipe", str(recipe), "--data", str(folder), "--output_dir", str(tmp_path / "out"), "--dry_run"]
    assert pretrain.main(words) == 0
    assert "03.png" in capsys.readouterr().out
