"""A sweep is many runs in one file; what it cannot mean it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hf_equissl.recipes.overrides import parse_overrides, read_recipe
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.recipes.sweep import choose, group_by_system, is_sweep, read_sweep
from hf_equissl.utils.suggestions import RecipeError

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes"
BASE = """
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8, image_size: 32}
objectives: {invariance: {name: vicreg}, equivariance: []}
views: {pipeline: {name: vicreg}}
"""


def sweep(folder: Path, grids: str) -> Path:
    (folder / "base.yaml").write_text(BASE)
    path = folder / "many.yaml"
    path.write_text(f"description: Many.\nsweep: {grids}")
    return path


def test_cross_and_zip(tmp_path: Path) -> None:
    path = sweep(
        tmp_path,
        """
  - name: "s{seed}-d{num_hidden_layers}"
    extends: base.yaml
    set: {training.max_steps: 3}
    cross: {training.seed: [1, 2], model.num_hidden_layers: [1, 2, 3]}
  - {name: "lr-{learning_rate}", extends: base.yaml, zip: {training.learning_rate: [1e-3, 0.1], training.seed: [5, 6]}}
""",
    )
    members = read_sweep(path)
    names = [f"s{seed}-d{depth}" for seed in (1, 2) for depth in (1, 2, 3)]
    assert [member.name for member in members] == [*names, "lr-0.001", "lr-0.1"]
    assert members[4].overrides == {"training.max_steps": 3, "training.seed": 2, "model.num_hidden_layers": 2}
    assert members[7].overrides == {"training.learning_rate": 0.1, "training.seed": 6}
    for member in members:  # as the command line will read them
        assert parse_overrides(member.words) == member.overrides
        assert Recipe.load(member.recipe, member.overrides).training["seed"] == member.overrides["training.seed"]
    assert [member.name for member in choose(members, ["lr-0.1", "s1-d1"])] == ["s1-d1", "lr-0.1"]
    assert choose(members, []) == members
    with pytest.raises(RecipeError, match=r"--only lr-0.2: .*Did you mean 'lr-0.1'"):
        choose(members, ["lr-0.2"])


def test_keys_that_end_alike_are_told_apart_by_longer_ends(tmp_path: Path) -> None:
    path = sweep(
        tmp_path,
        """
  - {name: "{training.seed}-of-{subset.seed}", extends: base.yaml, set: {data.subset.share: 0.5},
     cross: {data.subset.seed: [3, 4], training.seed: [1, 2]}}
  - {name: "deep-{num_hidden_layers}_{data.subset.seed}", extends: base.yaml, set: {data.subset.share: 0.5},
     cross: {data.subset.seed: [3], training.seed: [1], model.num_hidden_layers: [1, 2]}}
  - {name: "{model.num_hidden_layers}_seed-{training.seed}", extends: base.yaml,
     cross: {model.num_hidden_layers: [1], training.seed: [1, 2]}}
""",
    )
    members = read_sweep(path)
    pairs = [f"{seed}-of-{subset}" for subset in (3, 4) for seed in (1, 2)]
    assert [member.name for member in members] == [*pairs, "deep-1_3", "deep-2_3", "1_seed-1", "1_seed-2"]
    assert members[1].overrides == {"data.subset.share": 0.5, "data.subset.seed": 3, "training.seed": 2}
    assert list(group_by_system(members)) == ["of-3", "of-4", "deep-1_3", "deep-2_3", "1"]


def test_members_of_a_system_differ_in_the_seed_alone(tmp_path: Path) -> None:
    path = sweep(
        tmp_path,
        """
  - {name: "deep-{num_hidden_layers}_seed-{seed}", extends: base.yaml,
     cross: {model.num_hidden_layers: [1, 2], training.seed: [1, 10]}}
  - {name: "seed-{seed}_slow", extends: base.yaml, set: {training.learning_rate: 0.1}, cross: {training.seed: [1, 2]}}
  - {name: "{seed}", extends: base.yaml, cross: {training.seed: [3]}}
  - {name: "lr-{learning_rate}", extends: base.yaml, cross: {training.learning_rate: [0.2]}}
""",
    )
    members = read_sweep(path)
    groups = {system: [member.name for member in group] for system, group in group_by_system(members).items()}
    assert groups == {
        "deep-1": ["deep-1_seed-1", "deep-1_seed-10"],
        "deep-2": ["deep-2_seed-1", "deep-2_seed-10"],
        "slow": ["seed-1_slow", "seed-2_slow"],
        "3": ["3"],
        "lr-0.2": ["lr-0.2"],
    }
    assert [member.name for member in choose(members, ["slow", "deep-1_seed-10"])] == [
        "deep-1_seed-10",
        *groups["slow"],
    ]
    clash = [*members, replace(members[0], name="deep-1-1", overrides={"training.seed": 5})]
    with pytest.raises(RecipeError, match="without it both are called 'deep-1'"):
        group_by_system(clash)


def test_the_sensitivity_study_of_the_paper() -> None:
    path = RECIPES / "vits16_ibot_sweep.yaml"
    assert is_sweep(path)
    assert not is_sweep(RECIPES / "vits16_ibot.yaml")
    members = read_sweep(path, [RECIPES])
    recipes = [Recipe.load(member.recipe, member.overrides) for member in members]
    grid = {
        (recipe.objectives.equivariance[0]["weight"], recipe.model["equivariant_size"], recipe.model["feature_size"])
        for recipe in recipes[:18]
    }
    assert grid == {(w, size, 8192) for w in (0.1, 1.0, 5.0) for size in (256, 512, 1024, 2048, 4096, 5120)}
    assert {recipe.training["num_train_epochs"] for recipe in recipes[:18]} == {100}
    table_7 = [recipe.objectives.equivariance[0] for recipe in recipes[18:]]
    assert [(e["num_intermediate_images"], e["reconstruct_final"]) for e in table_7] == [
        (1, False),
        (2, False),
        (3, False),
        (2, True),
    ]
    assert {recipe.objectives.invariance["name"] for recipe in recipes[18:]} == {"vicreg"}


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ("[]", "empty list"),
        ("{name: a}", "expected a list"),
        ("[{name: a, extends: base.yaml, cros: {training.seed: [1]}}]", "unknown key 'cros'. Did you mean 'cross'"),
        ("[{extends: base.yaml, cross: {training.seed: [1]}}]", "`name` must be given"),
        ("[{name: a, cross: {training.seed: [1]}}]", "`extends` must be given"),
        ("[{name: a, extends: base.yaml}]", "got 0"),
        ("[{name: a, extends: base.yaml, cross: {training.seed: [1]}, zip: {training.seed: [1]}}]", "got 2"),
        ("[{name: a, extends: none.yaml, cross: {training.seed: [1]}}]", "extends 'none.yaml', which is not in"),
        ("[{name: a, extends: base.yaml, cross: {training.seed: 1}}]", "expected a list, got 1"),
        ("[{name: a, extends: base.yaml, cross: {training.seed: []}}]", "at least one value"),
        ("[{name: a, extends: base.yaml, cross: {seed: [1]}}]", "'seed' is no dotted key"),
        ("[{name: a, extends: base.yaml, cross: {training.seed: [1, 2]}}]", "two runs are called 'a'"),
        ("[{name: 'a{sead}', extends: base.yaml, cross: {training.seed: [1]}}]", "may hold {seed}; 'sead'"),
        (
            "[{name: 'a{seed}', extends: base.yaml, zip: {training.seed: [1, 2], data.subset.seed: [1, 2]}}]",
            "{seed} is the end of training.seed and of data.subset.seed. Write {training.seed} or {subset.seed}.",
        ),
        (
            "[{name: 'a{sead}', extends: base.yaml, zip: {training.seed: [1, 2], data.subset.seed: [1, 2]}}]",
            "may hold {training.seed}, {subset.seed}; 'sead'",
        ),
        ("[{name: 'a/{seed}', extends: base.yaml, cross: {training.seed: [1]}}]", "cannot be a folder's name"),
        ("[{name: '..', extends: base.yaml, cross: {training.seed: [1]}}]", "cannot be a folder's name"),
        (
            "[{name: 'a{seed}', extends: base.yaml, zip: {training.seed: [1, 2], training.max_steps: [1]}}]",
            "must be equally long",
        ),
        (
            "[{name: a, extends: base.yaml, set: {training.seed: 1}, cross: {training.seed: [1]}}]",
            "'training.seed' stands under `set` and under `cross`",
        ),
        ("[{name: a, extends: base.yaml, cross: {objectives.equivariance.0.weight: [1]}}]", "is an empty list"),
    ],
)
def test_mistakes(tmp_path: Path, grids: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_sweep(sweep(tmp_path, grids))
    assert message in str(caught.value)


def test_a_sweep_is_no_recipe_and_a_recipe_no_sweep(tmp_path: Path) -> None:
    path = sweep(tmp_path, "[{name: a, extends: base.yaml, cross: {training.seed: [1]}}]")
    with pytest.raises(RecipeError, match=r"training/sweep.py --recipe many --list"):
        read_recipe(path)
    with pytest.raises(RecipeError, match=r"training/pretrain.py"):
        read_sweep(tmp_path / "base.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_sweep(tmp_path / "none.yaml")
