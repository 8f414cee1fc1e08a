"""Recipes are strict: what they do not understand they refuse, and say what was probably meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_equissl.planning.arithmetic import schedule
from hf_equissl.recipes.overrides import apply_overrides, parse_overrides
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.recipes.sweep import is_sweep
from hf_equissl.running.run import prepare
from hf_equissl.utils.strict_yaml import load_yaml
from hf_equissl.utils.suggestions import RecipeError

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml") if not is_sweep(path))

TINY = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, image_size: 32,
        feature_size: 32, equivariant_size: 16}
objectives:
  invariance: {name: vicreg, expander_sizes: [32, 32]}
  equivariance: [{name: reconstruction, weight: 0.5}]
views:
  pipeline: {name: vicreg}
  transformation: {name: rotation, max_degrees: 30}
training: {max_steps: 2, learning_rate: 1e-3}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(folder: Path, **overrides: Any) -> Recipe:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return Recipe.load(write(folder, TINY), dotted)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads_and_survives_its_own_yaml(name: str) -> None:
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    assert recipe.name == name
    assert recipe.description
    assert "\n" not in recipe.description
    assert Recipe.from_dict(load_yaml(recipe.to_yaml(), name)) == recipe


def test_table_2_rows_differ_from_the_base_as_their_names_say() -> None:
    base = Recipe.load(RECIPES / "vits16_vicreg.yaml")
    assert base.objectives.equivariance == []
    families = {
        "rot": "rotation",
        "color": "color_jitter",
        "blur": "gaussian_blur",
        "trans": "translation",
        "se2": "se2",
    }
    for suffix, family in families.items():
        row = Recipe.load(RECIPES / f"vits16_vicreg_{suffix}.yaml")
        assert row.views.transformation is not None
        assert row.views.transformation["name"] == family
        assert row.objectives.equivariance[0]["weight"] == 1.0
        assert (row.model, row.training, row.objectives.invariance) == (
            base.model,
            base.training,
            base.objectives.invariance,
        )
    only_rotation = Recipe.load(RECIPES / "vits16_vicreg_rot_rot.yaml")
    assert only_rotation.views.pipeline == {"name": "center"}


def test_paper_batch_and_learning_rate(tmp_path: Path) -> None:
    recipe = Recipe.load(RECIPES / "vits16_vicreg_rot.yaml")
    training = recipe.training
    batch = training["per_device_train_batch_size"] * recipe.num_processes * training["gradient_accumulation_steps"]
    assert batch == 2048
    assert training["base_learning_rate"] * batch / training["learning_rate_reference_batch"] == pytest.approx(8e-4)
    args = recipe.build_training_arguments(tmp_path)
    assert args.get_warmup_steps(500_000) == 6250  # 10 epochs of 625 steps
    assert args.learning_rate == pytest.approx(1e-4 * args.global_batch_size / 256)


@pytest.mark.parametrize(
    ("name", "batch", "rate", "steps_per_pass", "steps", "warmup"),
    [  # by hand: rate x batch / reference, or x its root; floor(1,281,167 / batch) steps per pass; 10 epochs warm up
        ("vits16_vicreg", 2048, 8e-4, 625, 500_000, 6_250),
        ("vits16_dino", 512, 1e-3, 2_502, 250_200, 25_020),
        ("vits16_ibot", 1024, 2e-3, 1_251, 1_000_800, 12_510),
        ("vits16_ibot_se2", 1024, 2e-3, 1_251, 1_000_800, 12_510),
        ("vitl16_ibot", 1024, 2e-3, 1_251, 312_750, 12_510),
        ("vitl16_ibot_se2", 1024, 2e-3, 1_251, 312_750, 12_510),
        ("vitl16_dinov2", 2048, 4e-3 * 2**0.5, 625, 125_000, 12_500),
        ("vitl16_dinov2_se2", 2048, 4e-3 * 2**0.5, 625, 125_000, 12_500),
        ("vits16_simclr_se2", 2048, 8e-4, 625, 500_000, 6_250),
        ("vits16_barlow_twins_se2", 2048, 8e-4, 625, 62_500, 6_250),
        ("vits16_moco_v3_se2", 2048, 2.4e-3, 625, 62_500, 6_250),
        ("vits16_supervised_se2", 1024, 1e-3, 1_251, 375_300, 6_256),  # 5 epochs, rounded up
    ],
)
def test_arithmetic_of_the_papers_runs(
    name: str, batch: int, rate: float, steps_per_pass: int, steps: int, warmup: int, tmp_path: Path
) -> None:
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    assert recipe.num_processes is not None
    args = recipe.build_training_arguments(tmp_path, bf16=False)
    plan = schedule(args, recipe.num_processes, recipe.expected_images)
    assert (plan.batch, plan.steps_per_epoch, plan.steps, plan.warmup_steps) == (batch, steps_per_pass, steps, warmup)
    assert plan.learning_rate == pytest.approx(rate)


def test_teacher_student_recipes_state_the_method() -> None:
    small, large, dinov2 = (Recipe.load(RECIPES / f"{n}.yaml") for n in ("vits16_ibot", "vitl16_ibot", "vitl16_dinov2"))
    for recipe in (small, large, dinov2):
        assert "feature_size" not in recipe.model  # the official bases have no stem
        assert recipe.views.transformation is None
        assert (recipe.training["weight_decay"], recipe.training["weight_decay_end"]) == (0.04, 0.4)
        assert recipe.training["teacher_momentum_end"] == 1.0
    assert small.views.pipeline["local"] == {"count": 10, "size": 96, "crop_scale": [0.05, 0.25]}
    assert large.views.pipeline["local"] == {"count": 10, "size": 96, "crop_scale": [0.05, 0.32]}
    assert (small.training["max_grad_norm"], large.training["max_grad_norm"]) == (3.0, 0.3)
    assert (small.objectives.invariance["freeze_gain"], large.objectives.invariance["freeze_gain"]) == (False, True)
    assert dinov2.training["epoch_steps"] == 1250
    assert dinov2.build_encoder_config().drop_path_mode == "uniform"
    stems = {"vits16_ibot": (8192, 2048), "vitl16_ibot": (8192, 2048), "vitl16_dinov2": (2048, 512)}
    for base, sizes in stems.items():
        plain, row = Recipe.load(RECIPES / f"{base}.yaml"), Recipe.load(RECIPES / f"{base}_se2.yaml")
        assert (row.model["feature_size"], row.model["equivariant_size"]) == sizes
        assert row.objectives.equivariance[0] == {
            "name": "reconstruction",
            "weight": 1.0,
            "num_intermediate_images": 2,
            "decoder_widths": [64, 32, 16, 16],
        }
        assert row.views.transformation is not None
        assert row.views.transformation["name"] == "se2"
        same = (row.training, row.objectives.invariance, row.views.pipeline, row.num_processes)
        assert same == (plain.training, plain.objectives.invariance, plain.views.pipeline, plain.num_processes)


BASED = [name for name in SHIPPED if name.startswith("cifar10") and name.endswith("_rot")]


@pytest.mark.parametrize("name", [name for name in BASED if name.removesuffix("_rot") in SHIPPED])
def test_small_recipes_differ_from_their_base_in_the_reconstruction_alone(name: str) -> None:
    row, base = (Recipe.load(RECIPES / f"{n}.yaml") for n in (name, name.removesuffix("_rot")))
    assert base.objectives.equivariance == []
    assert row.objectives.equivariance[0]["name"] == "reconstruction"
    same = (row.model, row.views, row.training, row.objectives.invariance)
    assert same == (base.model, base.views, base.training, base.objectives.invariance)


TEACHER_STUDENT = """
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8, image_size: 32}
objectives: {invariance: {name: ibot, num_prototypes: 24, head_hidden_size: 16, bottleneck_size: 8}, equivariance: []}
views: {pipeline: {name: ibot, local: {count: 2, size: 16}}}
training: {max_steps: 2, epoch_steps: 2, use_cpu: true}
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views.pipeline.name": "vicreg"}, "views.pipeline.name: ibot, dinov2, dinov2_nominal"),
        ({"views.pipeline.local": None}, "views.pipeline: An objective asks for local crops"),
        ({"views.pipeline.masks": None}, "views.pipeline: An objective asks for masks"),
        (
            {"views.pipeline.local": {"size": 20}},
            "a multiple of model.patch_size, 8, and no more than model.image_size, 32, got 20",
        ),
        ({"views.pipeline.local": {"size": 40}}, "model.image_size, 32, got 40"),
        ({"num_processes": -4}, "num_processes: expected 1 or more, got -4"),
        ({"views.pipeline.masks": {"ratios": [0.1, 0.2]}}, "unknown key 'ratios'. Did you mean 'ratio'"),
        ({"views.pipeline.masks": {"kind": "half"}}, "masks.kind='half'"),
        ({"model.use_mask_token": False}, "model.use_mask_token: true"),
        (
            {"model.feature_size": 32, "model.equivariant_size": 16, "objectives.invariance.equivariant_logits": 8},
            "objectives: `equivariant_logits` (8) splits the head's output, and this encoder has a stem",
        ),
        ({"objectives.invariance.equivariant_logits": 24}, "fewer than the 24 prototypes"),
        ({"objectives.equivariance": [{"name": "reconstruction"}]}, "feature_size: 512"),
        (
            {
                "objectives.equivariance": [{"name": "reconstruction"}],
                "objectives.invariance.equivariant_logits": 8,
            },
            "names no transformation",
        ),
        ({"objectives.invariance.num_prototype": 3}, "Did you mean 'num_prototypes'"),
        ({"objectives.invariance.teacher_temperature": 0}, "Teacher temperatures must be above 0"),
        ({"training.grad_clipping": "modul"}, "grad_clipping must be one of global, parameter, module"),
        ({"training.grad_clipping": "module"}, "max_grad_norm 0 clips nothing"),
        ({"training.teacher_momentum": 1.5}, "teacher_momentum must be between 0 and 1"),
        ({"data.num_images": 0}, "data.num_images: expected 1 or more"),
        ({"data.subset": {"share": 2}}, "data.subset: share: expected a number between 0 and 1, got 2"),
        ({"data.subset": {"shares": 0.5}}, "shares"),
    ],
)
def test_combinations_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prepare(Recipe.from_dict(apply_overrides(load_yaml(TEACHER_STUDENT, "text"), changes)), None, dry=True)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("trainig", ["trainig", "training"]),
        ("model.hiden_size", ["hiden_size", "hidden_size"]),
        ("model.decoder_widths", ["decoder_widths", "model"]),
        ("objectives.invarience", ["invarience", "invariance"]),
        ("objectives.invariance.expander_size", ["expander_size", "expander_sizes"]),
        ("objectives.equivariance.0.weigth", ["weigth", "Did you mean 'weight'", "reconstruction"]),
        ("objectives.equivariance.0.wieght", ["wieght", "Did you mean 'weight'", "reconstruction"]),
        ("views.transformation.nam", ["nam", "Did you mean 'name'"]),
        ("objectives.equivariance.0.decoder_width", ["decoder_width", "decoder_widths"]),
        ("views.transfomation", ["transfomation", "transformation"]),
        ("views.pipeline.flip_probabilty", ["flip_probabilty", "flip_probability"]),
        ("views.pipeline.view_2", ["view_2"]),
        ("views.transformation.max_degree", ["max_degree", "max_degrees"]),
        ("data.colum", ["colum", "column"]),
        ("training.max_step", ["max_step", "max_steps"]),
        ("training.output_dir", ["output_dir", "--output_dir"]),
    ],
)
def test_unknown_key_names_its_nearest_neighbour(tmp_path: Path, key: str, names: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(write(tmp_path, TINY), {key: 1})
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("key", "guess"),
    [
        ("model.preset", "vit_small_patch16"),
        ("objectives.invariance.name", "vicreg"),
        ("objectives.equivariance.0.name", "reconstruction"),
        ("views.pipeline.name", "vicreg"),
        ("views.transformation.name", "rotation"),
    ],
)
def test_unknown_name_names_its_nearest_neighbour(tmp_path: Path, key: str, guess: str) -> None:
    with pytest.raises(RecipeError, match=repr(guess)):
        Recipe.load(write(tmp_path, TINY), {key: guess[:-1] + "x"})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.hidden_size", "384", "expected an integer, got '384'. Write it without quotes"),
        ("model.hidden_size", 384.5, "expected an integer, got 384.5"),
        ("model.use_mask_token", 1, "expected true or false, got 1"),
        ("objectives.invariance.expander_sizes", 1024, "expected a list"),
        ("objectives.invariance.pooling", "max", "expected one of 'cls', 'mean', got 'max'"),
        ("objectives.equivariance", {"name": "reconstruction"}, "expected a list, got a mapping"),
        ("objectives.equivariance.0.weight", "high", "expected a number, got 'high'"),
        ("objectives.equivariance.0.weight", -1, "-1"),
        ("views.transformation.max_degrees", "wide", "expected a number, got 'wide'"),
        ("views.pipeline.flip_probability", 2, "flip_probability is 2"),
        ("views.image_mean", 0.5, "expected a list of (a number), got 0.5"),
        ("data.streaming", "yes", "expected true or false, got 'yes'"),
        ("data.max_bad_share", 1.5, "expected a share from 0 to 1, got 1.5"),
        ("data.shuffle_buffer", -1, "expected 0 (file order) or more images, got -1"),
        ("training.hub_always_push", True, "A save during a running upload is left to the next"),
        ("training.hub_strategy", "all_checkpoints", "expected one of end, every_save, got 'all_checkpoints'"),
        ("model.init_from", 3, "expected a string or null, got 3"),
        ("model.init_revision", "v1", "there is no model.init_from (--init_from) that it would belong to"),
        ("training.max_steps", 1.5, "expected an integer, got 1.5"),
        ("training.save_strategy", "stepz", "expected one of"),
        ("num_processes", "many", "expected an integer or null, got 'many'"),
    ],
)
def test_wrong_value_names_key_value_and_type(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(write(tmp_path, TINY), {key: value})
    assert expected in str(caught.value)
    assert key.split(".")[-1] in str(caught.value)


def test_values_that_do_not_go_together_name_their_section(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model: .*image_size=33"):
        load(tmp_path, model__image_size=33)
    with pytest.raises(RecipeError, match="learning_rate"):
        load(tmp_path, training__base_learning_rate=1e-4)
    with pytest.raises(RecipeError, match="hub_token"):
        load(tmp_path, training__hub_token="secret")


def test_numbers_and_words_mean_what_they_look_like() -> None:
    text = "{a: 1e-3, b: 5e4, c: no, d: 1:30, e: 010, f: .5, g: true, h: ~, i: '1', j: -1.5E+3}"
    assert load_yaml(text, "text") == {
        "a": 1e-3, "b": 5e4, "c": "no", "d": "1:30", "e": 10, "f": 0.5, "g": True, "h": None, "i": "1", "j": -1500.0,
    }  # fmt: skip
    with pytest.raises(RecipeError, match="line 2: the key 'a' is given twice"):
        load_yaml("a: 1\na: 2", "text")
    with pytest.raises(RecipeError, match=r"text, line 1: this is not valid YAML"):
        load_yaml("a: [", "text")


def test_missing_sections_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'views' is missing"):
        Recipe.load(write(tmp_path, TINY.replace("views:", "data:").replace("pipeline: {name: vicreg}", "")[:420]))
    with pytest.raises(RecipeError, match=r"absent.yaml: the recipe cannot be read \(No such file"):
        Recipe.load(tmp_path / "absent.yaml")


def test_extends_merges_mappings_and_replaces_lists_and_renamed_entries(tmp_path: Path) -> None:
    write(tmp_path, TINY, "base.yaml")
    child = """
    extends: base.yaml
    model: {num_hidden_layers: 3}
    objectives: {invariance: {expander_sizes: [16]}}
    views: {transformation: {name: translation, max_shift: 4}}
    """
    recipe = Recipe.load(write(tmp_path, child, "child.yaml"))
    assert recipe.name == "child"
    assert recipe.model["num_hidden_layers"] == 3
    assert recipe.model["hidden_size"] == 32
    assert recipe.objectives.invariance["expander_sizes"] == [16]
    assert recipe.objectives.equivariance[0]["name"] == "reconstruction"
    assert recipe.views.transformation == {"name": "translation", "max_shift": 4.0}


def test_extends_looks_in_the_folders_that_it_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, "{extends: cifar10_vicreg.yaml, training: {max_steps: 3}}", "mine.yaml")
    assert Recipe.load(path, search=[RECIPES]).training["max_steps"] == 3
    with pytest.raises(RecipeError, match=r"extends 'cifar10_vicreg.yaml', which is not in"):
        Recipe.load(path)


def test_circular_extends(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml", "a.yaml")
    write(tmp_path, "extends: a.yaml", "b.yaml")
    with pytest.raises(RecipeError, match=r"a.yaml -> b.yaml -> a.yaml"):
        Recipe.load(tmp_path / "a.yaml")


def test_overrides_from_the_command_line(tmp_path: Path) -> None:
    words = (
        "--training.learning_rate 5e-4 --objectives.equivariance.0.weight 0 --data.streaming=true --data.column null"
    )
    overrides = parse_overrides([*words.split(), "--views.image_mean", "[0.5, 0.5, 0.5]", "--training.seed", "-1"])
    recipe = Recipe.load(write(tmp_path, TINY), overrides)
    assert recipe.training == {"max_steps": 2, "learning_rate": 5e-4, "seed": -1}
    assert recipe.objectives.equivariance[0]["weight"] == 0.0
    assert recipe.data == {"streaming": True, "column": None}
    assert recipe.views.image_mean == (0.5, 0.5, 0.5)


def test_a_new_name_drops_the_old_settings_whatever_the_order() -> None:
    raw = load_yaml(TINY, "text")
    changes = {"views.transformation.max_shift": 3, "views.transformation.name": "translation"}
    for order in (list(changes), list(reversed(changes))):
        changed = apply_overrides(raw, {key: changes[key] for key in order})
        assert changed["views"]["transformation"] == {"name": "translation", "max_shift": 3}
    assert raw == load_yaml(TINY, "text")  # the original is untouched


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainig.max_steps", "3"], "Did you mean --training.max_steps"),
        (["--recpie", "x"], "Did you mean --recipe"),
        (["vits16"], "'vits16' is not an option"),
        (["--training.max_steps"], "a value must follow"),
        (["--training.max_steps", "--data.split", "x"], "a value must follow"),
        (["--data.split", "a", "--data.split", "b"], "given twice"),
        (["--training.max_steps", "[1"], "--training.max_steps.*not valid YAML"),
    ],
)
def test_malformed_overrides(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_overrides(words, ["--recipe", "--data"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("objectives.equivariance.1.weight", "must be a position from 0 to 0"),
        ("objectives.equivariance.weight", "must be a position from 0 to 0"),
        ("training.max_steps.first", "holds the value 2, not keys"),
    ],
)
def test_overrides_of_places_that_do_not_exist(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(write(tmp_path, TINY), {key: 1})


def test_build_and_save(tmp_path: Path) -> None:
    recipe = load(tmp_path, objectives__equivariance__0__num_intermediate_images=3)
    config = recipe.build_pretraining_config()
    assert config.encoder.invariant_size == 16
    assert config.equivariance[0]["num_intermediate_images"] == 3
    assert recipe.build_encoder_config().image_size == 32
    family = recipe.build_transformation()
    assert family is not None
    assert family.max_degrees == 30
    args = recipe.build_training_arguments(tmp_path / "out", seed=7)
    assert (args.max_steps, args.learning_rate, args.seed) == (2, 1e-3, 7)
    assert Recipe.load(recipe.save(tmp_path)) == recipe
    assert load(tmp_path, model__preset="vit_tiny_patch8").build_encoder_config().hidden_size == 32  # fields win
