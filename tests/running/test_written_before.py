"""Runs and repositories that an earlier version wrote still load and go on.

``tests/written_before`` is of commit f01d9bf: ``training/pretrain.py --recipe cifar10_ibot_rot`` for 4 steps of 4
pictures, the first 16 of ``photo_folder``, with a tiny model (``run/recipe.yaml`` has all settings); ``run/encoder`` is
the encoder after step 4, ``published`` what ``training/push_to_hub.py --output_dir`` made of the run.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_equissl import EquiSSLForPreTraining, Recipe
from hf_equissl.hub import build_repository
from hf_equissl.running.initial_weights import load_initial_weights
from hf_equissl.running.precision import keep_precision
from hf_equissl.running.resume import is_finished
from hf_equissl.running.run import prepare, pretrain

WRITTEN = Path(__file__).resolve().parents[1] / "written_before"


@pytest.fixture
def earlier_run(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stopped run beside its pictures, under the path that its recipe names, as working directory."""
    (tmp_path / "photos").mkdir()
    for picture in sorted(photo_folder.iterdir())[:16]:
        shutil.copy(picture, tmp_path / "photos")
    shutil.copytree(WRITTEN / "run", tmp_path / "run", ignore=shutil.ignore_patterns("encoder"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_a_stopped_run_goes_on_to_the_same_encoder(earlier_run: Path) -> None:
    run = prepare(Recipe.load(earlier_run / "recipe.yaml"), earlier_run)
    assert Path(str(run.checkpoint)).name == "checkpoint-2"
    pretrain(run)
    weights, expected = (load_file(folder / "encoder/model.safetensors") for folder in (earlier_run, WRITTEN / "run"))
    begun = load_file(WRITTEN / "run" / "checkpoint-2" / "model.safetensors")
    assert weights.keys() == expected.keys()
    # A bias of attention's keys has no gradient but rounding, of which Adam makes whole steps.
    names = [name for name in expected if f"teacher.{name}" in begun and not name.endswith("k_proj.bias")]
    way = sum((expected[name] - begun[f"teacher.{name}"]).square().sum() for name in names)
    missed = sum((expected[name] - weights[name]).square().sum() for name in names)
    assert missed < 1e-4 * way  # less than 1 % of the way, since CPUs round differently
    build_repository(earlier_run, earlier_run.parent / "published", repo_id="lab/tiny", parts=["encoder"])
    assert (earlier_run.parent / "published" / "config.json").is_file()


def test_a_recipe_with_what_is_refused_now(earlier_run: Path) -> None:
    path = earlier_run / "recipe.yaml"
    asked = Recipe.load(path, {"training.bf16": "auto"})
    refused = "training: {do_train: true, eval_strategy: steps, auto_find_batch_size: true, "
    path.write_text(path.read_text().replace("training: {", refused))
    assert Path(str(prepare(asked, earlier_run).checkpoint)).name == "checkpoint-2"
    assert keep_precision(asked, earlier_run).training["bf16"] is False
    assert not is_finished(asked, earlier_run)
    shutil.copytree(WRITTEN / "run" / "encoder", earlier_run / "encoder", copy_function=shutil.copyfile)
    assert is_finished(asked, earlier_run)
    initial = load_initial_weights(replace(asked, model={"init_from": str(earlier_run / "checkpoint-2")}))
    assert initial.normalisation == (asked.views.image_mean, asked.views.image_std)
    begun = replace(asked, model={**asked.model, "init_from": "gone"})
    path.write_text(path.read_text().replace("model: {", "model: {init_from: gone, "))
    assert is_finished(begun, earlier_run) is False  # since the file is younger than the encoder


def test_a_published_repository_loads_whole_and_in_part() -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder = AutoModel.from_pretrained(WRITTEN / "published").eval()
    native = AutoModel.from_pretrained(WRITTEN / "published" / "native").eval()
    state = EquiSSLForPreTraining.from_pretrained(WRITTEN / "published" / "pretraining").eval()
    with torch.no_grad():
        tokens = [model(pixels).last_hidden_state for model in (encoder, native, state.export_encoder())]
    torch.testing.assert_close(tokens[1], tokens[0])
    torch.testing.assert_close(tokens[2], tokens[0])
    stored = load_file(WRITTEN / "published" / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in encoder.state_dict().items())
