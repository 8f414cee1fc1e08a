"""The command: it trains, resumes, merges and compares, and says what is wrong before the first step."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_equissl.encoders import save_encoder
from hf_equissl.evaluation.results import load_records, save_records
from hf_equissl.finetuning import TASKS, FineTuningSettings, adapters, cli, load_finetuned
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from tests import processes
from tests.distributed import launching

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--batch_size", "8", "--epochs", "2", "--learning_rate", "3e-3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``encoder`` and ``data`` with two classes that differ in brightness."""
    root = tmp_path_factory.mktemp("command")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    save_encoder(EquiSSLModel(EquiSSLConfig(**small)), root / "encoder", [0.5] * 3, [0.25] * 3)
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for low, name in ((0, "dark"), (128, "light")):
            (root / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                picture = rng.integers(low, low + 128, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(picture).save(root / "data" / split / name / f"{index}.png")
    return root


def words(folder: Path, output: Path, *more: str) -> list[str]:
    return ["--encoder", str(folder / "encoder"), "--data", str(folder / "data"), "--output_dir", str(output), *more]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The message of a command that must end with ``code``."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    *_, message = captured.err.strip().splitlines()
    _, found, message = message.partition("error: ")  # a progress bar may stand before it
    assert found
    return message


def test_options_give_settings() -> None:
    known = {item.name for item in fields(FineTuningSettings)}
    assert {option.key for option in (*cli.RUN, *chain.from_iterable(cli.OPTIONS.values()))} - known == {
        "resume",
        "compare",
        "imports",
    }
    assert cli.read_arguments([]) == {"resume": "auto", "bf16": "auto"}
    words = "--no_flip --bf16 --crop_scale 0.5 1 --value_range 0,4095 --image_column x --set a=1 b=2 --resume never"
    given = cli.read_arguments(words.split())
    assert given == {
        "flip": False,
        "bf16": True,
        "crop_scale": [0.5, 1.0],
        "value_range": (0.0, 4095.0),
        "image_column": "x",
        "task_options": ["a=1", "b=2"],
        "resume": "never",
    }
    assert cli.read_arguments(["--bf16", "false", "--value_range", "[1, 2]"]) == {
        "bf16": False,
        "value_range": (1.0, 2.0),
        "resume": "auto",
    }


def test_the_script_trains_merges_and_resumes(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    script = [sys.executable, str(ROOT / "training" / "finetune.py"), *words(folder, output, *QUICK, "--merge")]
    done = processes.run(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lora: LoRA adapters" in done.stdout
    assert "| encoder | lora r=8 | cls_patches |" in done.stdout
    names = {path.name for path in output.iterdir()}
    assert {"adapter", "merged", "checkpoint-6", "results.json", "results.md", "run.json", "finetune.json"} <= names
    (record,) = load_records(output / "results.json")
    assert record.command.startswith("python training/finetune.py --encoder")
    assert record.protocol["learning_rate"] == 3e-3
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        merged = AutoModelForImageClassification.from_pretrained(output / "merged")(pixels).logits
        adapted = load_finetuned(output / "adapter")(pixel_values=pixels).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)

    # Again: nothing is trained; the numbers are the same.
    assert cli.main(words(folder, output, *QUICK)) == 0
    (again,) = load_records(output / "results.json")
    assert again.values == record.values
    assert (output / "checkpoint-6").is_dir()


def test_compare(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [*QUICK[:2], "--epochs", "1"]
    assert cli.main(words(folder, tmp_path / "linear", *quick, "--method", "linear")) == 0
    assert cli.main(words(folder, tmp_path / "full", *quick, "--method", "full", "--eval_steps", "2")) == 0
    # Beside them a linear probe with two seeds, as probe.py records it.
    (record,) = load_records(tmp_path / "full" / "results.json")
    probe = replace(
        record, evaluator="linear", features="cls", values=(0.5, 0.75), seeds=(0, 1), protocol={}, details={}
    )
    save_records([probe], tmp_path / "probe" / "results.json")
    capsys.readouterr()
    assert cli.main(["--compare", *(str(tmp_path / name) for name in ("probe", "linear", "full"))]) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("| encoder | method | reads | top-1 %")
    assert [row.split(" | ")[1] for row in rows] == ["linear (frozen features)", "linear", "full"]
    assert "| cls | 62.50 +- 17.68 |" in rows[0]
    assert "no results.json" in fails(capsys, "--compare", str(tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "loar"], "Did you mean 'lora'"),
        (["--encoder", "/no/such/encoder"], "/no/such/encoder"),
        (["--data", "/no/such/data"], "/no/such/data"),
        (["--pooling", "invariant"], "reads the stem"),
        (["--batch_size", "64"], "more than the 24 training images"),
        (["--label_column", "klass"], "klass"),
        (["--test_split", "tset"], "tset"),
        (["--method", "full", "--merge"], "leaves a plain model already"),
        (["--repo_id", "me/model"], "--repo_id belongs to --push_to_hub"),
        (["--base_id", "encoder"], "--base_id encoder: expected a Hub id"),
        (["--push_to_hub"], "say where with --repo_id"),
        (["--push_to_hub", "--repo_id", "me/model"], "--base_id OWNER/NAME, or publish one plain model with --merge"),
    ],
)
def test_mistakes_end_in_one_line_before_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    output = tmp_path / "run"
    assert message in fails(capsys, *words(folder, output, "--batch_size", "8", *more))
    assert not output.exists() or not list(output.iterdir())


def test_without_peft(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    assert "pip install 'hf-equissl[peft]'" in fails(capsys, *words(folder, tmp_path / "run", "--method", "dora"))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = [*QUICK[:4], "--method", "full", "--learning_rate", "1e30", "--warmup", "0"]
    message = fails(capsys, *words(folder, tmp_path / "run", *quick), code=1)
    assert "not finite" in message
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_an_encoder_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--encoder is missing" in fails(capsys, "--data", "x")


def test_cifar10(shared_data: Path, folder: Path, tmp_path: Path) -> None:
    arguments = ["--encoder", str(folder / "encoder"), "--data", str(shared_data / "cifar10")]
    limits = ["--train_images", "32", "--test_images", "20", "--batch_size", "16", "--epochs", "1", "--method", "dora"]
    assert cli.main([*arguments, *limits, "--output_dir", str(tmp_path / "run")]) == 0
    top1, top5 = load_records(tmp_path / "run" / "results.json")
    assert 0 <= top1.value <= top5.value <= 1
    assert (top1.split, top1.protocol["test_images"]) == ("test", 20)
    assert load_finetuned(tmp_path / "run" / "adapter").config.id2label[9] == "truck"


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path, tmp_path: Path) -> None:
    """Batch 8 on one process, 2 x 4 on two: the same images, steps and weights, and one judgement of all images."""
    same = ["--epochs", "1", "--learning_rate", "3e-3", "--method", "full", "--label_smoothing", "0"]
    same += ["--bf16", "false"]  # where a device has bf16, its rounding would hide what is compared
    assert cli.main(words(folder, tmp_path / "one", *same, "--batch_size", "8")) == 0
    two = words(folder, tmp_path / "two", *same, "--batch_size", "4")
    done = launching.run("ddp", *two, script=ROOT / "training" / "finetune.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch 4 x 2 x 1 = 8") == 1  # one process speaks
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=2e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    first, second = (load_records(tmp_path / name / "results.json")[0] for name in ("one", "two"))
    assert second.values == first.values
    assert second.details["loss"][0] == pytest.approx(first.details["loss"][0], abs=1e-3)


def test_the_help_names_every_task() -> None:
    names = {line.split()[0] for line in cli._TASKS.splitlines()[1:] if line.startswith("  ") and line[2] != " "}
    assert names - {"Others"} == set(TASKS)
