"""From a run to the folder that is published: complete, true, free of this machine's paths, whole or absent."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from hf_equissl.data import ImageViewDataset, load_images
from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation.results import load_records, save_records
from hf_equissl.hub import build_repository, push_repository
from hf_equissl.hub.card.snippets import Snippet, SnippetError
from hf_equissl.modeling import EquiSSLConfig
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.pretraining.run_record import RunRecord
from hf_equissl.pretraining.trainer import EquiSSLTrainer
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.training import pretrain
from hf_equissl.utils.strict_yaml import dump_yaml, load_yaml
from hf_equissl.views.pipelines import build_pipeline
from tests import processes

from .tiny_run import copy_of, records_of, run

__all__ = ["run"]  # a fixture

pytest.importorskip("matplotlib")
REPO = "some-lab/tiny-rot"
CODE = {f"{name}_equissl.py" for name in ("base", "configuration", "decoders", "layers", "modeling")}


@pytest.fixture(scope="module")
def repository(run: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole thing, its card's code executed."""
    measured = tmp_path_factory.mktemp("probes")
    ours = records_of(run, photo_folder)
    others = [replace(record, encoder="/opt/runs/base/encoder", encoder_digest="0" * 16) for record in ours]
    save_records([*ours, *others], measured / "results.json")
    folder = tmp_path_factory.mktemp("build") / "repository"
    return build_repository(
        run,
        folder,
        repo_id=REPO,
        results=[measured],
        dataset=f"some-lab/{photo_folder.name}",
        license="apache-2.0",
        baseline="base/encoder",
    )


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_every_part_is_there_and_nothing_else(repository: Path, run: Path) -> None:
    assert files(repository) - CODE == {
        *("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json"),
        *(f"native/{name}" for name in ("config.json", "model.safetensors", "preprocessor_config.json")),
        *(f"pretraining/{name}" for name in ("config.json", "model.safetensors", "recipe.yaml")),
        *(f"figures/{name}.png" for name in ("losses", "features", "r2", "differences")),
    }
    assert files(repository) >= CODE
    assert [path.name for path in repository.parent.iterdir()] == ["repository"]
    assert_same(weights(repository), weights(run / "encoder"))
    assert_same(weights(repository / "pretraining"), weights(run / "checkpoint-4"))
    for figure in (repository / "figures").iterdir():
        with Image.open(figure) as picture:
            assert min(picture.size) > 300


def test_the_parts_agree_on_the_same_image(repository: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(repository / "native")
    pixels = processor(Image.linear_gradient("L").convert("RGB"), return_tensors="pt")["pixel_values"]
    state = EquiSSLForPreTraining.from_pretrained(repository, subfolder="pretraining")
    encoders = AutoModel.from_pretrained(repository), AutoModel.from_pretrained(repository / "native")
    with torch.no_grad():
        tokens = [model.eval()(pixels).last_hidden_state for model in (*encoders, state.export_encoder())]
    assert tokens[0].shape == (1, 1 + 2 + 16, 16)
    torch.testing.assert_close(tokens[1], tokens[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[2], tokens[0], rtol=0, atol=0)


def test_no_path_of_this_machine_is_published(repository: Path, run: Path, photo_folder: Path) -> None:
    private = (str(run.parent), run.parent.name, str(photo_folder.parent), "/opt/code", "/var/cache", str(Path.home()))
    for name in files(repository):
        content = (repository / name).read_bytes().decode("utf-8", errors="ignore")
        assert not [word for word in private if word in content], name
    records = load_records(repository / "results.json")
    assert {record.encoder for record in records} == {REPO}
    assert {record.dataset for record in records} == {f"some-lab/{photo_folder.name}"}
    assert records[0].command == (
        f"python training/probe.py --encoder {REPO} --data=some-lab/{photo_folder.name} --cache_dir me"
    )


def test_the_recipe_goes_on_with_the_state(repository: Path, run: Path, photo_folder: Path) -> None:
    published, ran = (Recipe.load(folder / "recipe.yaml").to_dict() for folder in (repository / "pretraining", run))
    assert ran["data"].pop("source") == str(photo_folder)
    assert published["data"].pop("source") == f"some-lab/{photo_folder.name}"
    assert published == ran


def test_the_cards_command_goes_on_with_the_state(
    repository: Path, photo_folder: Path, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As it is written, with the real client, by somebody who has nothing but photographs."""
    repo_id = "maker/tiny-rot"
    push_repository(repository, repo_id)
    card = ModelCard.load(repo_id).text.replace(REPO, repo_id)
    download, train = re.search(r"```bash\n(hf .*\n)(python [^`]*)```", card).groups()
    (tmp_path / "photos").symlink_to(photo_folder)
    monkeypatch.chdir(tmp_path)
    hf, *words = shlex.split(download)
    subprocess.run([Path(sys.executable).with_name(hf), *words], check=True, capture_output=True)
    python, script, *words = shlex.split(train.replace("\\\n", ""))
    assert (python, script) == ("python", "training/pretrain.py")
    assert pretrain.main([*words, "--training.max_steps", "1", "--training.learning_rate", "0"]) == 0
    said = capsys.readouterr().out
    assert "resampled" not in said
    for part in ("encoder", "stem", "vicreg", "reconstruction"):
        assert re.search(rf"  {part} +taken\n", said), said
    went_on, published = weights(tmp_path / "runs/continued/checkpoint-1"), weights(repository / "pretraining")
    parameters = {name for name in published if "running" not in name and "num_batches" not in name}
    assert_same({k: went_on[k] for k in parameters}, {k: published[k] for k in parameters})


def test_the_cards_code_runs_as_it_is_written(repository: Path, api: HfApi, tmp_path: Path) -> None:
    """By the name on the Hub, in a process of its own, with a picture of one's own."""
    repo_id = "maker/tiny-rot"
    push_repository(repository, repo_id)
    card = ModelCard.load(repo_id).text.replace(REPO, repo_id)
    pieces = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(pieces) == 5
    Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "photo.jpg")
    (tmp_path / "pieces.json").write_text(json.dumps(pieces))
    run_all = """
import json
import torch
left = []
for code in json.load(open("pieces.json")):
    exec(code, names := {})
    left.append(names)
tokens = [names["tokens"] for names in left if "tokens" in names]
assert len(tokens) == 3 and all(torch.allclose(tokens[0], other, atol=1e-6) for other in tokens)
print(*sorted({name for names in left for name in names if name in ("equivariant", "images", "model")}))
"""
    done = processes.run([sys.executable, "-c", run_all], cwd=tmp_path, env={**processes.FIXED, **os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "equivariant images model"


def test_whoever_goes_on_depends_on_nothing_of_the_author(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that itself went on from an encoder, watched itself on other images and published itself."""
    monkeypatch.setattr("hf_equissl.hub.repository.run_snippets", lambda *_: None)
    going_on = copy_of(run, tmp_path / "run")
    recipe = load_yaml((run / "recipe.yaml").read_text(), "recipe")
    changes = {
        "monitor": {"every_steps": 2, "source": "/data/mine", "split": "val"},
        "training": {**recipe["training"], "push_to_hub": True, "hub_model_id": "some-lab/tiny-rot"},
    }
    # A folder that was called like a Hub id, and a Hub id: of that a run keeps the commit.
    starts: tuple[tuple[dict[str, str], str | None, str], ...] = (
        ({"init_from": "runs/base", "init_subfolder": "native"}, None, "base"),
        ({"init_from": "facebook/base", "init_revision": "a1b2"}, "facebook/base", "facebook/base"),
    )
    for number, (start, base_model, name) in enumerate(starts):
        changed = {**recipe, **changes, "model": {**recipe["model"], **start}}
        (going_on / "recipe.yaml").write_text(dump_yaml(changed))
        folder = build_repository(going_on, tmp_path / f"{number}", repo_id=REPO, parts=["pretraining", "card"])
        published = load_yaml((folder / "pretraining" / "recipe.yaml").read_text(), "recipe")
        assert published == {**recipe, "data": {**recipe["data"], "source": Path(recipe["data"]["source"]).name}}
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model == base_model
        assert f", starting from `{name}`" in card.text
        assert "/data/mine" not in card.text


def test_without_matplotlib_there_are_no_figures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A day of training ends with a repository all the same."""
    monkeypatch.setattr("hf_equissl.hub.repository.run_snippets", lambda *_: None)
    monkeypatch.setattr("hf_equissl.hub.card.figures.find_spec", lambda name: None)
    folder = build_repository(run, tmp_path / "out", repo_id=REPO, parts=["encoder", "figures", "card"])
    assert not (folder / "figures").exists()
    assert "figures/" not in (folder / "README.md").read_text()
    assert "pip install 'hf-equissl[plots]'" in caplog.text


def test_the_card_says_what_was_measured(repository: Path, run: Path, photo_folder: Path) -> None:
    card = ModelCard.load(repository / "README.md")
    found = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {
        "rotation r2 (backbone)": 0.6,
        "translation r2 (backbone)": 0.25,
        "linear top1 (cls)": 0.4322,
        "effective rank (cls)": 12.35,
    }
    assert found["rotation r2 (backbone)"].metric_args["std"] == 0.1414
    assert found["linear top1 (cls)"].task_type == "image-classification"
    assert found["linear top1 (cls)"].metric_args["command"].startswith("python training/probe.py --encoder some-lab/")
    assert card.data.datasets == [f"some-lab/{photo_folder.name}"]
    assert card.data.to_dict().items() >= {"library_name": "transformers", "license": "apache-2.0"}.items()
    assert card.data.base_model is None
    text = card.text
    record = RunRecord.load(run)
    for fact in (
        "32 images",
        "8 x 1 process(es) x accumulation 1 = 8",
        f"torch {record.versions['torch']}",
        record.hardware["cpu"],
        "| optimizer steps | 4 |",
        "`vicreg` + 2.5 x `reconstruction`",
        "0.6000 +- 0.1414",
        "43.22",
        "The paper's figures, not ours",
        "Table 2",
    ):
        assert fact in text, fact
    assert "Unfinished" not in text
    figures = sorted(path.name for path in (repository / "figures").iterdir())
    assert all(f"](figures/{name})" in text for name in figures)


def test_a_broken_snippet_fails_the_build_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [Snippet("Load it", "import json\njson.loads('')\n", needs_package=False)]
    monkeypatch.setattr("hf_equissl.hub.repository.snippets", lambda *_: broken)
    with pytest.raises(SnippetError, match=r"'Load it' does not run: json\.decoder\.JSONDecodeError: Expecting value"):
        build_repository(run, tmp_path / "out", repo_id=REPO, parts=["encoder", "card"])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_build_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        assert list(tmp_path.glob(".building-*/out/model.safetensors"))
        raise KeyboardInterrupt  # weights are written, the card is not

    monkeypatch.setattr("hf_equissl.hub.repository.draw_figures", stop)
    with pytest.raises(KeyboardInterrupt):
        build_repository(run, tmp_path / "out", repo_id=REPO)
    assert not list(tmp_path.iterdir())


def test_results_of_another_encoder_are_refused(run: Path, photo_folder: Path, tmp_path: Path) -> None:
    other = [replace(record, encoder_digest="0" * 16, encoder="runs/other") for record in records_of(run, photo_folder)]
    with pytest.raises(ValueError, match=r"measured on runs/other \(digest 0{16}\), and .* from .*checkpoint-4"):
        build_repository(run, tmp_path / "out", repo_id=REPO, results=other)
    with pytest.raises(ValueError, match=r"no results at .*nowhere"):
        build_repository(run, tmp_path / "out", repo_id=REPO, results=[tmp_path / "nowhere"])
    assert not list(tmp_path.iterdir())


def test_of_a_file_with_several_encoders_the_own_results_are_taken(
    run: Path, photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = records_of(run, photo_folder)
    other = [replace(record, encoder_digest="0" * 16, encoder="runs/other") for record in own]
    folder = build_repository(run, tmp_path / "out", repo_id=REPO, parts=["encoder"], results=[*other, *own])
    published = load_records(folder / "results.json")
    assert [record.values for record in published] == [record.values for record in own]
    assert {record.encoder_digest for record in published} == {own[0].encoder_digest}
    assert "results of other encoders, runs/other" in caplog.text


def test_an_unfinished_run_without_export(
    run: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_equissl.hub.repository.run_snippets", lambda *_: None)  # they ran in the fixture's build
    unfinished = copy_of(run, tmp_path / "run", "encoder", "checkpoint-4")
    replace(RunRecord.load(run), steps=2, finished=None).save(unfinished)
    folder = build_repository(unfinished, tmp_path / "out", repo_id=REPO, parts=["encoder", "card"])
    assert files(folder) - CODE == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    state = EquiSSLForPreTraining.from_pretrained(run / "checkpoint-2")
    assert_same(weights(folder), state.export_encoder().state_dict())
    text = (folder / "README.md").read_text()
    assert "has taken 2 of 4 planned steps" in text
    assert "Nothing was measured on this encoder." in text
    assert "figures/" not in text
    assert 'subfolder="native"' not in text
    assert f"`{photo_folder.name}`, split train, 32 images" in text  # no Hub id was given: the folder's name


def test_an_export_that_is_not_the_checkpoints(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last checkpoint of a finished run may be missing; an export may be older than the newest checkpoint."""
    partial = copy_of(run, tmp_path / "run", "checkpoint-4")
    folder = build_repository(partial, tmp_path / "out", repo_id=REPO, parts=["encoder"])
    assert_same(weights(folder), weights(run / "encoder"))
    replace(RunRecord.load(run), steps=2, finished=None).save(partial)
    with caplog.at_level(logging.WARNING):
        folder = build_repository(partial, tmp_path / "older", repo_id=REPO, parts=["encoder"])
    assert "is not the encoder of checkpoint-2" in caplog.text
    assert FrozenEncoder(folder).digest() != FrozenEncoder(run / "encoder").digest()


def test_a_run_from_python_that_has_no_native_form(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_equissl.hub.repository.run_snippets", lambda *_: None)
    encoder = EquiSSLConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        cls_insertion_layer=1,
        feature_size=None,
        equivariant_size=None,
    )
    config = EquiSSLPreTrainingConfig(encoder=encoder, invariance={"name": "vicreg", "expander_sizes": [8, 8]})
    model = EquiSSLForPreTraining(config)
    mean, std = [0.5, 0.25, 0.125], [0.2, 0.2, 0.2]
    views = {"image_size": 32, "patch_size": 8, "image_mean": mean, "image_std": std, "transformation": None}
    pipeline = build_pipeline("vicreg", needs=model.needs, **views)
    args = EquiSSLTrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=3e-4,
        disable_tqdm=True,
        report_to="none",
    )
    dataset = ImageViewDataset(load_images(str(photo_folder)), pipeline, seed=args.seed)
    EquiSSLTrainer(model=model, args=args, pipeline=pipeline, train_dataset=dataset).train()
    folder = build_repository(tmp_path / "run", tmp_path / "out", repo_id=REPO)
    assert not (folder / "native").exists()
    assert not (folder / "pretraining" / "recipe.yaml").exists()
    text = (folder / "README.md").read_text()
    assert "There is no `native/`: " in text
    assert "cls_insertion_layer" in text
    assert "learning_rate: 0.0003" in text
    assert "No equivariance objective was trained" in text
    assert "--init_from" not in text  # there is no recipe to go on with
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_mean"] == mean


def test_what_is_no_run_or_no_place_is_refused(run: Path, repository: Path, tmp_path: Path) -> None:
    def refused(pattern: str, source: Path = run, target: Path = tmp_path / "out", **options: object) -> None:
        with pytest.raises(ValueError, match=pattern):
            build_repository(source, target, **{"repo_id": REPO, "parts": ["encoder"], **options})

    refused("is not a folder", tmp_path / "nowhere")
    refused("no complete checkpoint", copy_of(run, tmp_path / "empty", "checkpoint-*"))
    refused("Did you mean the run's folder", run / "encoder")
    refused("expected a name on the Hub", repo_id="tiny")
    refused("dataset is './photos'", dataset="./photos")
    refused(r"license \(--license\) is 'Apache 2'", license="Apache 2")
    refused(r"choose among encoder, native", parts=["weights"])
    refused("choose among", parts="encoder")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    refused(r"thesis holds files already", target=tmp_path / "thesis")
    refused(r"holds files already, perhaps a card that you have edited", target=repository)
    refused("holds files already", target=run)
    assert (tmp_path / "thesis" / "chapter.tex").is_file()
    damaged = copy_of(run, tmp_path / "damaged")
    weights = damaged / "checkpoint-4" / "model.safetensors"  # of its size: a shorter one would be passed over
    weights.write_bytes(b"{}".ljust(weights.stat().st_size))
    refused("model.safetensors|checkpoint-4", damaged)
    assert not (tmp_path / "out").exists()
