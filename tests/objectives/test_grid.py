"""Every base objective beside every equivariance objective: by recipe alone, three steps, and on from a checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import SaveStrategy

from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import Run, build_training, prepare
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views import TRANSFORMATIONS, RotationFamily

from .helpers import own, tiny_objective

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
# Drop path draws from the generator of PyTorch, which a resumed run has to find where it was.
MODEL = {**SIZES, "feature_size": 24, "equivariant_size": 8, "drop_path_rate": 0.1}
# It has whatever an objective may ask for.
VIEWS = {
    "pipeline": {"name": "dinov2", "local": {"count": 2, "size": 16}, "masks": {"min_patches": 1}},
    "transformation": {"name": "rotation"},
}
TRAINING = {
    "per_device_train_batch_size": 6,
    "max_steps": 3,
    "save_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}
PAIRS = [(base, term) for base in sorted(INVARIANCE_OBJECTIVES) for term in sorted(EQUIVARIANCE_OBJECTIVES)]
MULTI_CROP = [base for base in INVARIANCE_OBJECTIVES if tiny_objective("invariance", base).needs.local_crops]


@pytest.fixture(scope="module")
def labelled(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures in two classes: three batches and a rest."""
    folder = tmp_path_factory.mktemp("labelled")
    for number, picture in enumerate(sorted(photo_folder.iterdir())[:20]):
        (folder / f"class-{number % 2}").mkdir(exist_ok=True)
        (folder / f"class-{number % 2}" / picture.name).symlink_to(picture)
    return folder


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Every training collects garbage, which takes longer than its steps where it looks at all modules again."""
    gc.freeze()
    yield
    gc.unfreeze()


def entry(name: str) -> dict[str, Any]:
    """The entry of a recipe for an objective with small heads."""
    return {"name": name, **own(name, "SMALL", {})}


def recipe(
    base: str, term: str | None, data: Path, options: Mapping[str, Any] | None = None, **sections: Mapping[str, Any]
) -> Recipe:
    """Small models on small pictures.

    Args:
        base, term: The objectives.
        data: Pictures.
        options: Of ``term``, over those of small heads.
        sections: What replaces values of the recipe's sections, key by key.
    """
    raw: dict[str, Any] = {
        "model": MODEL,
        "objectives": {"invariance": entry(base), "equivariance": [{**entry(term), **(options or {})}] if term else []},
        "views": VIEWS,
        "data": {"source": str(data)},
        "training": TRAINING,
    }
    return Recipe.from_dict({key: {**value, **sections.get(key, {})} for key, value in raw.items()})


def train(run: Run) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, float]]]:
    """The weights before the first and after the last step, and what each step logged."""
    model, trainer = build_training(run)
    states = [copy_state(model)]
    trainer.train(resume_from_checkpoint=run.checkpoint)
    return [*states, copy_state(model)], [log for log in trainer.state.log_history if "loss" in log]


def copy_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("base", "term"), PAIRS, ids=[f"{base}-{term}" for base, term in PAIRS])
def test_it_trains_and_a_resumed_run_is_the_unbroken_one(base: str, term: str, labelled: Path, tmp_path: Path) -> None:
    # As of a dry run with data: the step on fake tensors that others take is longer than the real ones.
    options = own(term, "BESIDE_LOCAL_CROPS", {}) if base in MULTI_CROP else {}
    run = prepare(recipe(base, term, labelled, options), None, dry=True)
    run.args.output_dir = str(tmp_path)
    (before, after), logs = train(run)
    assert len(logs) == 3
    for log in logs:
        assert log["loss"] == pytest.approx(log["loss_ssl"] + log[f"loss_{term}"], rel=1e-4)
        assert 0 < log["grad_norm"] < float("inf")
    for part in ("student", "invariance", "equivariance"):
        assert any(not torch.equal(before[name], after[name]) for name in after if name.startswith(f"{part}.")), part
    run.args.save_strategy = SaveStrategy.NO
    (_, resumed), own_logs = train(replace(run, checkpoint=str(tmp_path / "checkpoint-2")))
    assert own_logs[-1]["loss"] == logs[-1]["loss"]
    assert resumed.keys() == after.keys()
    assert not [name for name, value in after.items() if not torch.equal(value, resumed[name])]


class NoParameters(RotationFamily):
    """Changes nothing that could be told."""

    parameter_names = ()


NO_STEM = {"feature_size": None, "equivariant_size": None}
REST = {"per_device_train_batch_size": 31, "dataloader_drop_last": False}
CENTER = {"pipeline": {"name": "center"}}
WITHOUT_G = {"transformation": None}
GIVEN = {"transformation": {"name": "given", "parameters": ["angle"]}}
# What cannot be had: base, equivariance objective, its options or sections of the recipe, what the one sentence says.
REFUSED: dict[str, tuple[str, str | None, dict[str, Any], str]] = {
    "local crops": ("dino", "sie", {"views": {"pipeline": {"name": "vicreg"}}}, "asks for local crops"),
    "masks": ("ibot", "sie", {"views": {"pipeline": {"name": "dino"}}}, "asks for masks"),
    "mask token": ("ibot", None, {"model": {"use_mask_token": False}}, "ibot masks patches"),
    "labels": ("supervised", "sie", {}, "needs the class of every image"),
    "layer": ("vicreg", "augself", {"options": {"layer": 3}}, "after block 3.* blocks 1 to 2"),
    "differences": ("vicreg", "augself", {"views": CENTER}, "AugSelf"),
    "parameters": ("vicreg", "sie", {"views": WITHOUT_G}, "the parameters of g, and there are none"),
    "no parameters": ("vicreg", "sie", {"views": {"transformation": {"name": "untold"}}}, "of g, and there are none"),
    "regression": ("parameter_regression", None, {"views": WITHOUT_G}, "learns the parameters of g, and there"),
    "path": ("vicreg", "reconstruction", {"views": {"transformation": {"name": "flip"}}}, "no path from the identity"),
    "no g": ("vicreg", "reconstruction", {"views": WITHOUT_G}, "names no transformation"),
    "latents": ("vicreg", "sie", {"views": GIVEN}, "has single images"),
    "equivariant part": ("vicreg", "reconstruction", {"model": NO_STEM}, "this encoder has none"),
    "batch": ("vicreg", "sie", {"training": {"per_device_train_batch_size": 1}}, "at least 2 images, got 1"),
    "joining crops": ("dino", "ser", {}, "'dinov2' makes 4 .* each needs one"),
    "last batch": ("vicreg", "sie", {"training": REST}, "32 images modulo 31 = 1"),
}  # fmt: skip


@pytest.mark.parametrize(("base", "term", "sections", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence_before_the_first_step(
    base: str,
    term: str | None,
    sections: dict[str, Any],
    message: str,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TRANSFORMATIONS, "untold", NoParameters)
    with pytest.raises(RecipeError, match=message) as caught:
        prepare(recipe(base, term, photo_folder, **sections), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("run/checkpoint-*"))
