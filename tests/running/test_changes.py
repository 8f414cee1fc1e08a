"""A run that goes on with other settings: they take effect and are recorded, or one sentence refuses them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_equissl.checkpoints import Manifest
from hf_equissl.data.jpeg import name_decoder
from hf_equissl.hub.repository import build_repository
from hf_equissl.pretraining.run_record import RunRecord
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.changes import KEPT, TAKE_EFFECT, describe_changes, find_changes
from hf_equissl.running.resume import Launch, find_checkpoint
from hf_equissl.training import pretrain
from hf_equissl.utils.suggestions import RecipeError
from tests.hub.tiny_run import copy_of, run

__all__ = ["run"]  # a fixture
OTHERS: dict[str, Any] = {
    "seed": 1,
    "data_seed": 1,
    "dataloader_drop_last": False,
    "bf16": True,
    "fp16": True,
    "optim": "sgd",
    "optim_args": "momentum=0.5",
    "optim_target_modules": ["q_proj"],
    "decay_one_dimensional": True,
    "freeze_patch_embedding": True,
    "epoch_steps": 2,
    "layer_decay": 0.5,
    "patch_embedding_lr_multiplier": 0.5,
    "freeze_last_layer_epochs": 1.0,
    "freeze_last_layer_by": "gradient",
    "teacher_momentum": 0.9,
    "teacher_momentum_end": 0.9,
}
CHANGED = {
    "learning_rate": 0.004,
    "weight_decay": 0.2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "grad_clipping": "parameter",
    "warmup_steps": 1,
    "lr_scheduler_type": "linear",
}


def half_way(run: Path, target: Path) -> Path:
    """The run as it was after two of its four steps."""
    return copy_of(run, target, "checkpoint-4", "encoder")


def go_on(output: Path, run: Path, *words: str) -> int:
    recipe = run.parent / "tiny.yaml"
    source = Recipe.load(run / "recipe.yaml").data["source"]
    return pretrain.main(["--recipe", str(recipe), "--data", source, "--output_dir", str(output), *words])


def test_the_same_settings_change_nothing(run: Path, tmp_path: Path) -> None:
    """Neither a bit of the weights nor of the optimizer's state."""
    output = half_way(run, tmp_path / "run")
    assert go_on(output, run) == 0
    for name in ("model.safetensors", "scheduler.pt"):
        assert (output / "checkpoint-4" / name).read_bytes() == (run / "checkpoint-4" / name).read_bytes()
    ours, theirs = (torch.load(folder / "checkpoint-4" / "optimizer.pt") for folder in (output, run))
    assert ours["param_groups"] == theirs["param_groups"]
    assert RunRecord.load(output).changes == ()


def test_crops_that_another_library_resized_are_told(run: Path, tmp_path: Path) -> None:
    output = half_way(run, tmp_path / "run")
    recipe = Recipe.load(run.parent / "tiny.yaml", {"data.source": Recipe.load(run / "recipe.yaml").data["source"]})
    checkpoint, args = str(output / "checkpoint-2"), recipe.build_training_arguments(str(output))
    record = RunRecord.load(run)
    assert record.resizer == "torch"
    assert record.decoder == name_decoder()
    assert find_changes(checkpoint, args, 4) == ()
    replace(record, resizer="", decoder="").save(output)  # of a version that resized with Pillow
    (change,) = changes = find_changes(checkpoint, args, 4)
    assert change.text == 'after step 2 resizer is "torch" instead of "Pillow"'
    assert f"note: {change.text}" in describe_changes(changes, checkpoint, args)
    replace(record, changes=changes).save(output)  # it was stopped before the next checkpoint
    assert find_changes(checkpoint, args, 4) == changes
    replace(record, changes=(replace(change, step=3),)).save(output)  # it goes on from an earlier one
    assert find_changes(checkpoint, args, 4) == changes


def test_other_settings_take_effect_and_are_recorded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_equissl.hub.repository.run_snippets", lambda *_: None)  # a new interpreter
    output = half_way(run, tmp_path / "run")
    words = [word for name, value in CHANGED.items() for word in (f"--training.{name}", str(value))]
    capsys.readouterr()
    assert go_on(output, run, *words, "--training.max_steps", "5", "--training.save_steps", "3") == 0
    said = capsys.readouterr().out
    assert "note: after step 2 learning_rate is 0.004 instead of 5e-05" in said
    assert "note: after step 2 steps is 5 instead of 4" in said
    # Linear from step 1, the end of the warm-up, to 5; the cosine of four steps stands at half.
    assert "note: the learning rate goes on at 0.003; it would have been 2.5e-05" in said

    groups = torch.load(output / "checkpoint-3" / "optimizer.pt")["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
    assert all((group["betas"], group["eps"], group["initial_lr"]) == ((0.8, 0.9), 1e-6, 0.004) for group in groups)
    assert groups[0]["lr"] == pytest.approx(0.002)  # of step 4
    state = json.loads((output / "checkpoint-5" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    assert [rates[step] for step in (3, 4, 5)] == pytest.approx([0.003, 0.002, 0.001])
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-5"]

    record = RunRecord.load(output)
    assert {change.setting: change.after for change in record.changes} == {**CHANGED, "steps": 5}
    assert (
        "# Not all steps ran so: after step 2 learning_rate is 0.004 instead of 5e-05."
        in (output / "recipe.yaml").read_text()
    )
    build_repository(output, tmp_path / "published", repo_id="me/tiny", parts=["encoder", "card"])
    card = (tmp_path / "published" / "README.md").read_text().replace("\\", "")
    assert "| changed on the way | after step 2 learning_rate is 0.004 instead of 5e-05; " in card
    assert "as its last steps ran" in card

    # What went on from step 5 changes nothing of it, and a branch from step 2 knows nothing of later changes.
    assert go_on(output, run, *words, "--training.max_steps", "6") == 0
    assert [change.step for change in RunRecord.load(output).changes] == [2] * len(record.changes) + [5]
    branch = tmp_path / "branch"
    assert go_on(branch, run, "--resume", str(output / "checkpoint-2")) == 0
    assert RunRecord.load(branch).changes == ()
    assert (branch / "checkpoint-4" / "model.safetensors").read_bytes() == (
        run / "checkpoint-4" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", KEPT)
def test_kept_settings_are_refused(name: str, run: Path) -> None:
    assert set(OTHERS) == set(KEPT)
    assert not set(KEPT) & set(TAKE_EFFECT)
    recipe = Recipe.load(run.parent / "tiny.yaml", {f"training.{name}": OTHERS[name]})
    batch = Manifest.read(run / "checkpoint-4").global_batch
    with pytest.raises(RecipeError, match=rf"holds a run with training\.{name}(\.0)? = .* Name a new --output_dir"):
        find_checkpoint(recipe, run, "auto", Launch(batch, 1, 1))


def test_another_optimizer_ends_in_one_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert go_on(run, run, "--training.optim", "sgd", "--training.max_steps", "6") == 2
    assert "training.optim" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.fp16", "true", "--training.bf16", "false"], "training.fp16: fp16 needs a GPU"),
        (["--training.deepspeed", "{}"], "deepspeed is {}, which asks for nothing"),
    ],
)
def test_settings_that_could_do_nothing_here(
    words: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert go_on(tmp_path / "new", run, *words) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
