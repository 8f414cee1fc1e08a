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

from .helpers import own

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
# Pairs that contradict each other, and what the refusal says.
CONTRADICTIONS: dict[tuple[str, str], str] = {}


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


def recipe(base: str, *terms: str, data: Path | None = None, **sections: Mapping[str, Any]) -> Recipe:
    """Small models on small pictures; ``sections`` replace those of the same name, key by key."""
    raw: dict[str, Any] = {
        "model": MODEL,
        "objectives": {"invariance": entry(base), "equivariance": [entry(term) for term in terms]},
        "views": VIEWS,
        "data": {} if data is None else {"source": str(data)},
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
    if (reason := CONTRADICTIONS.get((base, term))) is not None:
        with pytest.raises(RecipeError, match=reason):
            prepare(recipe(base, term, data=labelled), tmp_path)
        return
    # As of a dry run with data: the step on fake tensors that others take is longer than the real ones.
    run = prepare(recipe(base, term, data=labelled), tmp_path, dry=True)
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
