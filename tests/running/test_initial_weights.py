"""Starting from an encoder that exists: its outputs, its architecture, its normalisation, and what is said of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.dry_run import dry_run_report
from hf_equissl.running.initial_weights import InitialWeights, adopt_encoder, load_initial_weights
from hf_equissl.running.run import prepare
from hf_equissl.utils.strict_yaml import load_yaml
from hf_equissl.utils.suggestions import RecipeError
from tests.encoders.upstream_layouts import UpstreamViT

RECIPE = """
name: small
model: {preset: vit_tiny_patch16, image_size: 32, drop_path_rate: 0.2, feature_size: 24, equivariant_size: 8}
objectives:
  invariance: {name: vicreg, expander_sizes: [24, 24]}
  equivariance: [{name: reconstruction, decoder_widths: [8, 8, 8]}]
views: {pipeline: {name: vicreg}, transformation: {name: rotation}}
training: {max_steps: 2, per_device_train_batch_size: 4, use_cpu: true}
"""
IBOT = {
    "objectives.invariance": {"name": "ibot", "num_prototypes": 12, "head_hidden_size": 16, "bottleneck_size": 8},
    "views.pipeline": {"name": "ibot", "local": {"count": 2, "size": 16}},
    "training.epoch_steps": 2,
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
STOCK = {**SIZES, "patch_size": 8, "image_size": 40}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def dinov2() -> PreTrainedModel:
    return Dinov2Model(Dinov2Config(**STOCK, layerscale_value=0.5))


def with_registers() -> PreTrainedModel:
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**STOCK, num_register_tokens=2, layerscale_value=0.5))


def vit() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**STOCK, intermediate_size=48, layer_norm_eps=1e-5))


def equissl(**fields: Any) -> EquiSSLModel:
    return EquiSSLModel(EquiSSLConfig(**{**STOCK, **fields}))


SOURCES: dict[str, Callable[[], PreTrainedModel]] = {
    "dinov2": dinov2,
    "dinov2_with_registers": with_registers,
    "vit": vit,
    "equissl": equissl,
    "late_cls": lambda: equissl(cls_insertion_layer=1, use_mask_token=False),
}


def save(model: PreTrainedModel, folder: Path, processor: bool = True) -> Path:
    """Weights drawn anew, wide: positions and tokens that start at 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    if processor:
        BitImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def load(source: Path, tmp_path: Path, **overrides: Any) -> Recipe:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return Recipe.load(path, {"model.init_from": str(source), **dotted})


def build(recipe: Recipe, seed: int = 0) -> EquiSSLForPreTraining:
    """The model as ``running.run.pretrain`` makes it."""
    run = prepare(recipe, None, dry=True)
    initial = load_initial_weights(run.recipe)
    torch.manual_seed(seed)
    model = EquiSSLForPreTraining(run.config)
    initial.load(model)
    return model.eval()


@pytest.mark.parametrize("size", [40, 32])
@pytest.mark.parametrize("kind", SOURCES)
def test_the_student_starts_with_the_encoders_outputs(kind: str, size: int, tmp_path: Path) -> None:
    stock = SOURCES[kind]()
    source = save(stock, tmp_path / kind)
    recipe = load(source, tmp_path, model__image_size=size)
    student = build(recipe).student
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    backbone = getattr(stock.eval(), "vit", stock)
    extra = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        expected = backbone(pixels, **extra).last_hidden_state
        got = student(pixels).last_hidden_state
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert student.config.image_size == size
    assert student.embeddings.grid_size == (size // 8, size // 8)


def test_of_the_recipes_model_only_the_trainings_part_stays(tmp_path: Path) -> None:
    run = prepare(load(save(dinov2(), tmp_path / "encoder"), tmp_path), None, dry=True)
    config = run.config.encoder_config
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size, config.layerscale_value) == (32, 2, 8, 0.5)
    assert (config.image_size, config.feature_size, config.equivariant_size) == (32, 24, 8)
    assert (config.drop_path_rate, config.drop_path_mode) == (0.2, "linear")
    assert "preset" not in run.recipe.model
    assert run.recipe.model["init_from"] == str(tmp_path / "encoder")
    assert run.cost().parameters == sum(p.numel() for p in EquiSSLForPreTraining(run.config).parameters())
    report = dry_run_report(run)
    assert f"starting from {tmp_path / 'encoder'}" in report
    assert "ViT: width 32, 2 blocks, 4 heads, patch 8, image 32" in report


def test_a_settled_recipe_is_complete_and_settles_to_itself(tmp_path: Path) -> None:
    recipe = prepare(load(save(with_registers(), tmp_path / "encoder"), tmp_path), None, dry=True).recipe
    again = Recipe.from_dict(load_yaml(recipe.to_yaml(), "text"))
    assert again == recipe
    assert again.build_encoder_config().num_register_tokens == 2
    assert prepare(again, None, dry=True).recipe == recipe


def test_normalisation(tmp_path: Path) -> None:
    source = save(dinov2(), tmp_path / "encoder")
    run = prepare(load(source, tmp_path), None, dry=True)
    assert run.recipe.views.image_mean == tuple(MEAN)
    assert list(run.pipeline.image_std) == STD
    assert any(line.endswith(f"mean {MEAN}, std {STD}: the encoder's") for line in run.notes)
    given = prepare(load(source, tmp_path, views__image_mean=[0.1, 0.1, 0.1]), None, dry=True)
    assert (given.recipe.views.image_mean, given.recipe.views.image_std) == ((0.1,) * 3, tuple(STD))
    assert any(f"given; the encoder was trained with mean {MEAN}" in line for line in given.notes)
    (source / "preprocessor_config.json").unlink()
    bare = prepare(load(source, tmp_path), None, dry=True)
    assert bare.recipe.views.image_mean == Recipe.load(tmp_path / "small.yaml").views.image_mean
    assert any("nothing says what the encoder was trained with" in line for line in bare.notes)


@pytest.mark.parametrize("sizes", [{"feature_size": 24, "equivariant_size": 8}, {}, {"equivariant_size": 12}])
def test_stem_mask_token_and_decoder_of_an_equissl_encoder(sizes: dict[str, int], tmp_path: Path) -> None:
    fields = {"feature_size": 24, **sizes} if sizes else {}
    decoder = {"decoder_type": "conv", "decoder_widths": [8, 8, 8]} if sizes.get("equivariant_size") == 8 else {}
    source = save(equissl(**fields, **decoder, image_size=32), tmp_path / "encoder")
    recipe = load(source, tmp_path)
    model, fresh = build(recipe), EquiSSLForPreTraining(prepare(recipe, None, dry=True).config)
    encoder, notes = EquiSSLModel.from_pretrained(source), "\n".join(prepare(recipe, None, dry=True).notes)
    same = bool(decoder)
    assert torch.equal(model.student.embeddings.mask_token, encoder.embeddings.mask_token)
    assert encoder.embeddings.mask_token.abs().max() > 0
    if encoder.stem is not None:
        assert torch.equal(model.student.stem.weight, encoder.stem.weight) == same
    assert ("stem            taken" in notes) == same
    assert ("reconstruction  decoder taken" in notes) == same
    states = (model.equivariance[0].decoder.state_dict(), fresh.equivariance[0].decoder.state_dict())
    if same:
        assert all(torch.equal(states[0][key], value) for key, value in encoder.decoder.state_dict().items())
    assert all(states[0][key].shape == value.shape for key, value in states[1].items())


def test_new_parts_start_as_in_a_run_from_scratch(tmp_path: Path) -> None:
    run = prepare(load(save(vit(), tmp_path / "encoder"), tmp_path), None, dry=True)
    model = build(run.recipe, seed=3)
    torch.manual_seed(3)
    scratch = EquiSSLForPreTraining(run.config).state_dict()
    new = ("student.stem", "student.embeddings.mask_token", "invariance", "equivariance")
    for name, value in model.state_dict().items():
        assert torch.equal(value, scratch[name]) == name.startswith(new), name


def test_the_teacher_starts_as_a_copy_of_the_student(tmp_path: Path) -> None:
    recipe = load(save(dinov2(), tmp_path / "encoder"), tmp_path, **IBOT)
    model = build(recipe)
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    for leader, follower in model.invariance.ema_pairs():
        pairs = zip(leader.parameters(), follower.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def pretraining_state(folder: Path, recipe: Recipe, **options: Any) -> EquiSSLForPreTraining:
    """The state of a run in the midst: student and teacher differ, centers are not 0."""
    torch.manual_seed(5)
    model = EquiSSLForPreTraining(recipe.build_pretraining_config())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder, **options)
    return model


def scratch_recipe(tmp_path: Path, **overrides: Any) -> Recipe:
    path = tmp_path / "scratch.yaml"
    path.write_text(RECIPE.replace("preset: vit_tiny_patch16", "hidden_size: 32, num_hidden_layers: 2, patch_size: 8"))
    return Recipe.load(path, {"model.num_attention_heads": 4, **overrides})


def test_a_pretraining_state_goes_on_whole(tmp_path: Path) -> None:
    published = tmp_path / "repository" / "pretraining"
    before = scratch_recipe(tmp_path, **IBOT, **{"views.image_mean": MEAN, "views.image_std": STD})
    state = pretraining_state(published, before, max_shard_size="20KB")
    assert len(list(published.glob("*.safetensors"))) > 2
    before.save(published)
    recipe = load(published.parent, tmp_path, model__init_subfolder="pretraining", **IBOT)
    model = build(recipe)
    for name, value in state.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    run = prepare(recipe, None, dry=True)
    assert run.recipe.views.image_mean == tuple(MEAN)
    notes = [note for note in run.notes if not note.startswith("planned in")]
    assert notes[0] == f"starting from {published.parent} (subfolder pretraining)"
    said = dict(line.split(maxsplit=1) for line in notes[1:] if not line.startswith("  mask"))
    assert said == {
        "encoder": "taken", "stem": "taken", "teacher": "taken", "ibot": "taken", "reconstruction": "taken",
        "normalisation": f"mean {MEAN}, std {STD}: the encoder's",
    }  # fmt: skip


def test_of_a_pretraining_state_what_fits_is_taken(tmp_path: Path) -> None:
    before = scratch_recipe(tmp_path, **IBOT)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    state = pretraining_state(checkpoint, before)
    before.save(checkpoint.parent)
    changes = {**IBOT, "objectives.equivariance": [{"name": "reconstruction", "decoder_widths": [8, 4, 8]}]}
    changes["objectives.equivariance"] += [{"name": "cross_attention_reconstruction", "decoder_hidden_size": 16}]
    recipe = load(checkpoint, tmp_path, **changes)
    model, run = build(recipe), prepare(recipe, None, dry=True)
    for name, value in state.state_dict().items():
        if not name.startswith("equivariance"):
            assert torch.equal(model.state_dict()[name], value), name
    notes = "\n".join(run.notes)
    assert "cross_attention_reconstruction  new\n" in notes
    assert "reconstruction                  new, decoder." in notes
    assert "(4, 8, 3, 3)" in notes
    other = prepare(load(checkpoint, tmp_path), None, dry=True)  # VICReg has no teacher, and other heads
    assert "teacher" not in "\n".join(other.notes)
    assert "vicreg          new\n" in "\n".join(other.notes)
    assert "reconstruction  taken" in "\n".join(other.notes)
    assert "ibot            left out, the recipe has none" in "\n".join(other.notes)
    stemless = {"objectives.equivariance": [], "model.feature_size": None, "model.equivariant_size": None}
    bare = prepare(load(checkpoint, tmp_path, **IBOT, **stemless), None, dry=True)
    assert "stem            left out, the recipe has none" in "\n".join(bare.notes)


def test_positions_of_both_networks_follow_the_crop(tmp_path: Path) -> None:
    pretraining_state(tmp_path / "state", scratch_recipe(tmp_path, **IBOT))
    model = build(load(tmp_path / "state", tmp_path, model__image_size=48, **IBOT))
    for encoder in (model.student, model.teacher):
        assert encoder.embeddings.position_embeddings.shape == (1, 37, 32)
    student, teacher = (e.embeddings.position_embeddings for e in (model.student, model.teacher))
    assert not torch.equal(student, teacher)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.hidden_size": 64},
            "--model.hidden_size 64 contradicts --init_from {0}: hidden_size of that encoder is 32",
        ),
        ({"model.preset": "vit_small_patch16"}, "--model.preset vit_small_patch16 (hidden_size 384) contradicts"),
        ({"model.preset": "vit_smal_patch16"}, "Did you mean 'vit_small_patch16'"),
        ({"model.image_size": 44}, "choose e.g. image_size=48. The architecture is that of {0}."),
        ({"model.init_revision": "v1"}, "'v1' is a revision on the Hub, and {0} is here"),
        (
            {"model.init_subfolder": "encoder"},
            "at {0!r} (subfolder 'encoder'): no such subfolder",
        ),
        ({"model.init_from": "nobody/nothing"}, "model.init_from (--init_from): No encoder at 'nobody/nothing'"),
        (
            {"model.init_from": None, "model.init_subfolder": "native"},
            "model.init_subfolder: there is no model.init_from",
        ),
        ({"model.init_form": "x"}, "Did you mean 'init_from'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_built(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save(dinov2(), tmp_path / "encoder")
    with pytest.raises(RecipeError) as caught:
        prepare(load(source, tmp_path, **changes), None, dry=True)
    assert message.format(str(source)) in str(caught.value)


def test_given_keys_that_agree_are_no_contradiction(tmp_path: Path) -> None:
    source = save(dinov2(), tmp_path / "encoder")
    keys = {"model.hidden_size": 32, "model.patch_size": 8, "model.layerscale_value": 0.5, "model.mlp_ratio": 4}
    assert prepare(load(source, tmp_path, **keys), None, dry=True).config.encoder_config.hidden_size == 32


def test_sources_that_are_no_encoder(tmp_path: Path) -> None:
    source = save(equissl(), tmp_path / "encoder")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(RecipeError, match=r"model.init_from.*model.safetensors.*cut short"):
        load_initial_weights(load(source, tmp_path))
    model = equissl()
    with torch.no_grad():
        model.layernorm.bias[3] = float("nan")
    shutil.rmtree(source)
    model.save_pretrained(source)
    with pytest.raises(RecipeError, match=r"layernorm.bias of .* is not finite"):
        load_initial_weights(load(source, tmp_path))
    (source / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RecipeError, match=r"model.init_from.*bert"):
        load_initial_weights(load(source, tmp_path))


def test_a_new_encoder_drops_the_revision_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "stored.yaml"
    path.write_text(RECIPE.replace("model: {", "model: {init_from: a/b, init_revision: 0f1e, init_subfolder: native, "))
    same = Recipe.load(path, {"model.init_from": "a/b"}).model
    assert (same["init_revision"], same["init_subfolder"]) == ("0f1e", "native")
    other = Recipe.load(path, {"model.init_from": "c/d", "model.init_subfolder": "pretraining"}).model
    assert (other["init_from"], other["init_subfolder"]) == ("c/d", "pretraining")
    assert "init_revision" not in other
    assert (
        not {"init_from", "init_revision", "init_subfolder"} & Recipe.load(path, {"model.init_from": None}).model.keys()
    )


def test_a_file_of_the_authors_own_code(tmp_path: Path) -> None:
    upstream = UpstreamViT("ibot", width=64, depth=1, grid=5)
    torch.save(
        {"teacher": {f"backbone.{name}": value for name, value in upstream.state_dict().items()}}, tmp_path / "x.pth"
    )
    recipe = load(tmp_path / "x.pth", tmp_path, model__image_size=40)
    pixels = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        got = build(recipe).student(pixels).last_hidden_state
        torch.testing.assert_close(got, upstream(pixels), rtol=0, atol=1e-5)
    assert any(line.endswith("the encoder's") for line in prepare(recipe, None, dry=True).notes)
    with pytest.raises(RecipeError, match=r"model.init_from.*absent.pth"):
        load_initial_weights(load(tmp_path / "absent.pth", tmp_path))


def test_an_encoder_of_another_architecture_is_refused() -> None:
    config = EquiSSLPreTrainingConfig(
        encoder=EquiSSLConfig(**{**STOCK, "hidden_size": 64}), invariance={"name": "vicreg"}
    )
    with pytest.raises(ValueError, match="has no embeddings"):
        InitialWeights(equissl()).load(EquiSSLForPreTraining(config))


def test_the_commit_is_kept(tmp_path: Path) -> None:
    recipe = load(tmp_path, tmp_path)
    assert adopt_encoder(recipe, EquiSSLConfig(**STOCK), revision="a1").model["init_revision"] == "a1"
    named = load(tmp_path, tmp_path, model__init_revision="v1")
    assert adopt_encoder(named, EquiSSLConfig(**STOCK), revision="a1").model["init_revision"] == "v1"
