"""``--init_from``: a run that starts from an encoder, breaks off, goes on without it, and can be done again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoModel, BitImageProcessorPil, Dinov2Config, Dinov2Model, TrainerCallback

from hf_equissl.encoders.loading import read_image_settings
from hf_equissl.pretraining.trainer import EquiSSLTrainer
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running import run as launch
from hf_equissl.running.resume import is_finished
from hf_equissl.training import pretrain

pytest_plugins = ["tests.hub.fixtures"]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
RECIPE = """
model: {preset: vit_tiny_patch16, image_size: 32, feature_size: 24, equivariant_size: 8}
objectives:
  invariance: {name: dino, num_prototypes: 12, head_hidden_size: 16, bottleneck_size: 8}
  equivariance: [{name: reconstruction, decoder_widths: [8, 8, 8]}]
views: {pipeline: {name: dino, local: {count: 1, size: 16}}, transformation: {name: rotation}}
training: {max_steps: 3, per_device_train_batch_size: 4, save_steps: 1, epoch_steps: 2, layer_decay: 0.7,
           disable_tqdm: true, use_cpu: true, learning_rate: 0.01, logging_steps: 1}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A stock encoder of another size, with its image processor."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 40}
    folder = tmp_path / "stock"
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    BitImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


@pytest.fixture
def words(tmp_path: Path, photo_folder: Path) -> list[str]:
    """The command without its output folder and encoder."""
    (tmp_path / "small.yaml").write_text(RECIPE)
    return ["--recipe", str(tmp_path / "small.yaml"), "--data", str(photo_folder)]


def same_weights(left: Path, right: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (left, right))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killed(Exception):
    """The machine went away."""


class KillAfterSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        raise Killed


def test_broken_off_the_run_goes_on_without_its_source(
    source: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words += ["--init_from", str(source)]
    assert pretrain.main([*words, "--output_dir", str(whole)]) == 0
    said = capsys.readouterr().out
    assert f"starting from {source}\n" in said
    assert "encoder         taken, positions resampled from 5 x 5 to 4 x 4 patches" in said
    assert "teacher         a copy of the student" in said
    assert f"normalisation   mean {MEAN}, std {STD}: the encoder's" in said

    with monkeypatch.context() as context:
        init = EquiSSLTrainer.__init__

        def killed_soon(self: EquiSSLTrainer, *args: object, **kwargs: object) -> None:
            init(self, *args, **kwargs)  # type: ignore[arg-type]
            self.add_callback(KillAfterSave())

        context.setattr(EquiSSLTrainer, "__init__", killed_soon)
        with pytest.raises(Killed):
            pretrain.main([*words, "--output_dir", str(broken)])
    assert [path.name for path in broken.glob("checkpoint-*")] == ["checkpoint-1"]
    shutil.rmtree(source)
    capsys.readouterr()
    assert pretrain.main([*words, "--output_dir", str(broken)]) == 0
    assert f"resuming from {broken / 'checkpoint-1'}" in capsys.readouterr().out
    for part in ("checkpoint-2", "checkpoint-3", "encoder"):
        assert same_weights(whole / part, broken / part), part
    assert (whole / "recipe.yaml").read_bytes() == (broken / "recipe.yaml").read_bytes()
    assert is_finished(Recipe.load(words[1], {"data.source": words[3], "model.init_from": str(source)}), broken)

    encoder = AutoModel.from_pretrained(broken / "encoder")
    assert (encoder.config.image_size, encoder.config.patch_size, encoder.config.hidden_size) == (32, 8, 32)
    assert read_image_settings(broken / "encoder") == {"image_mean": MEAN, "image_std": STD, "image_size": 32}
    assert pretrain.main([*words, "--output_dir", str(broken), "--model.hidden_size", "64"]) == 2
    assert "hidden_size of that encoder is 32" in capsys.readouterr().err
    assert pretrain.main([*words[:-1], str(tmp_path / "other"), "--output_dir", str(broken)]) == 2
    assert f"holds a run with model.init_from = {str(source)!r}" in capsys.readouterr().err
    assert pretrain.main([*words[:-2], "--output_dir", str(broken)]) == 2
    assert f"holds a run with model.init_from = {str(source)!r}" in capsys.readouterr().err
    assert pretrain.main([*words, "--output_dir", str(tmp_path / "new")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_stored_recipe_does_the_run_again(source: Path, words: list[str], tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    words += ["--init_from", str(source), "--training.max_steps", "2"]
    assert pretrain.main([*words, "--output_dir", str(first)]) == 0
    assert pretrain.main(["--recipe", str(first / "recipe.yaml"), "--output_dir", str(again)]) == 0
    assert same_weights(first / "encoder", again / "encoder")
    trained = load_file(first / "checkpoint-2" / "model.safetensors")
    stock = load_file(source / "model.safetensors")
    name = "encoder.layer.1.mlp.fc1.weight"
    assert 0 < (trained[f"student.{name}"] - stock[name]).abs().max() < 0.1

    # The state goes on as a source of its own: an encoder of the same name in the recipe is left behind.
    further = ["--recipe", str(first / "recipe.yaml"), "--init_from", str(first / "checkpoint-2")]
    further += ["--output_dir", str(tmp_path / "further"), "--training.learning_rate", "0", "--training.max_steps", "1"]
    assert pretrain.main([*further, "--training.teacher_momentum", "1"]) == 0
    assert same_weights(first / "checkpoint-2", tmp_path / "further" / "checkpoint-1") is False  # DINO's center moves
    left, right = (
        load_file(f / "model.safetensors") for f in (first / "checkpoint-2", tmp_path / "further/checkpoint-1")
    )
    assert {key for key in left if not torch.equal(left[key], right[key])} == {"invariance.cls_center"}


def test_dry_run_writes_nothing(
    source: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "preprocessor_config.json").unlink()
    words = [*words[:2], "--init_from", str(source), "--dry_run"]
    assert pretrain.main(words) == 0
    report = capsys.readouterr().out
    assert f"init_from: {source}" in report
    assert "ViT: width 32, 2 blocks, 4 heads, patch 8, image 32" in report
    assert "stem            new" in report
    assert "nothing says what the encoder was trained with" in report
    assert pretrain.main([*words, "--model.image_size", "36"]) == 2
    assert "choose e.g. image_size=32" in capsys.readouterr().err
    assert pretrain.main([*words, "--views.pipeline.local.size", "20"]) == 2
    assert "a multiple of model.patch_size, 8" in capsys.readouterr().err


def test_the_commit_of_a_repository_is_pinned(source: Path, words: list[str], tmp_path: Path, api: HfApi) -> None:
    repo = api.create_repo("stock").repo_id
    commit = api.upload_folder(repo_id=repo, folder_path=source, path_in_repo="native").oid
    words += ["--init_from", repo, "--model.init_subfolder", "native", "--training.max_steps", "1"]
    assert pretrain.main([*words, "--output_dir", str(tmp_path / "run")]) == 0
    stored = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert stored.model["init_revision"] == commit
    assert stored.views.image_mean == tuple(MEAN)
    api.delete_folder("native", repo_id=repo)
    before = launch.prepare(stored, None, dry=True)
    assert before.recipe == stored
    assert pretrain.main([*words, "--output_dir", str(tmp_path / "run")]) == 0  # finished: nothing of the Hub is needed
    assert pretrain.main([*words, "--output_dir", str(tmp_path / "new")]) == 2
