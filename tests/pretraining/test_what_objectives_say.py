"""What objectives say of themselves reaches model, plan and errors: objectives made up here, which no code names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from hf_equissl.modeling import EquiSSLConfig
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, INVARIANCE_OBJECTIVES, LossOutput, Objective
from hf_equissl.objectives.essl import FourRotations
from hf_equissl.objectives.progress import TrainingProgress
from hf_equissl.objectives.ser import TransformedPairs
from hf_equissl.planning import measure
from hf_equissl.planning.arithmetic import milestones, schedule
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.utils.suggestions import RecipeError
from hf_equissl.views import FlipFamily, SE2Family
from hf_equissl.views.facts import ViewFacts
from hf_equissl.views.needs import ExtraViews, Needs
from hf_equissl.views.view_specs import PipelineSpec, ViewSpec
from tests.objectives.helpers import make_views, tiny_config

VICREG = {"name": "vicreg", "expander_sizes": [8, 8]}


class Asking(Objective):
    """Asks for whatever its test wants, and reads the CLS token."""

    citation = ""

    def __init__(self, config: EquiSSLConfig, layer: int = 0, wants: tuple[str, ...] = ()) -> None:
        super().__init__(config)
        self.layer, self.wants = layer, wants

    @property
    def needs(self) -> Needs:
        layers = (self.layer,) if self.layer else ()
        return Needs(**dict.fromkeys(self.wants, True), hidden_layers=layers)

    def read_schedules(self, progress: TrainingProgress) -> dict[str, float]:
        return {"sharpness": progress.epoch}

    def forward(self, student: Any, teacher: Any, views: Any) -> LossOutput:
        loss = student.cls.float().square().mean()
        return LossOutput(loss, {"loss_asking": loss.detach()})


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EQUIVARIANCE_OBJECTIVES, "asking", Asking)


def build(encoder: EquiSSLConfig | None = None, invariance: dict[str, Any] = VICREG, **entry: Any) -> Any:
    return EquiSSLForPreTraining(
        EquiSSLPreTrainingConfig(
            encoder=encoder or tiny_config(), invariance=dict(invariance), equivariance=[{"name": "asking", **entry}]
        )
    )


@pytest.mark.usefixtures("asking")
def test_a_layer_beyond_the_encoder_is_refused_in_a_sentence() -> None:
    assert build(layer=2).needs.hidden_layers == (2,)
    with pytest.raises(ValueError, match="asking reads the tokens after block 3, and this encoder has blocks 1 to 2"):
        build(layer=3)


@pytest.mark.usefixtures("asking")
def test_missing_views_are_blamed_on_the_objective_that_asks_for_them() -> None:
    encoder = tiny_config(use_mask_token=True)
    model = build(encoder, wants=["local_crops", "masks"])
    views = make_views(model.needs)
    with pytest.raises(ValueError, match=r"^asking needs local crops"):
        model(replace(views, local_crops=None))
    with pytest.raises(ValueError, match=r"^asking needs masks"):
        model(replace(views, masks=None, mask_indices=None))
    with pytest.raises(ValueError, match=r"^asking masks patches, and this encoder has no token"):
        build(tiny_config(use_mask_token=False), wants=["masks"])


@pytest.mark.usefixtures("asking")
def test_only_the_layers_that_are_asked_for_stay_in_memory(tmp_path) -> None:
    encoder = tiny_config(num_hidden_layers=8)
    model = build(encoder, layer=1, wants=["teacher"])
    views = make_views(model.needs)
    args = EquiSSLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=16)

    def teacher_bytes(**entry: Any) -> int:
        cost = measure(build(encoder, wants=["teacher"], **entry).config, views, args)
        return max(moment.other for moment in cost.moments if moment.phase == "teacher")

    one_layer = 2 * 16 * 17 * 32 * 4  # V x B x T x D in fp32
    assert teacher_bytes(layer=1) <= teacher_bytes() + one_layer
    hidden = model.encode(views).hidden
    assert list(hidden) == [1]


@pytest.mark.usefixtures("asking")
def test_schedules_of_an_equivariance_objective_and_of_its_teacher_are_planned(tmp_path) -> None:
    args = EquiSSLTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=40, epoch_steps=10, teacher_momentum=0.9
    )
    rows = milestones(args, schedule(args, 1, None), build(wants=["teacher"]))
    assert [row.scheduled["sharpness"] for row in rows] == pytest.approx([row.step / 10 for row in rows])
    assert rows[0].teacher_momentum == 0.9
    assert all(row.teacher_momentum is None for row in milestones(args, schedule(args, 1, None), build()))


@pytest.mark.usefixtures("asking")
def test_parts_belong_to_their_objectives() -> None:
    model = build()
    assert model.owner_of("student.layernorm.weight") is None
    place, objective, name = model.owner_of("invariance.expander.0.weight")
    assert (place, objective, name) == ("invariance", model.invariance, "expander.0.weight")
    assert model.owner_of("equivariance.0")[1] is model.equivariance[0]
    assert torch.is_tensor(model(make_views(model.needs)).loss)


# ---- facts at construction ----


class Supervised(Objective):
    """A linear classifier, whose size follows from the data set."""

    citation = ""
    reads_num_classes = True
    exports = "student"

    def __init__(self, config: EquiSSLConfig, smoothing: float = 0.0, *, facts: ViewFacts) -> None:
        super().__init__(config)
        self.facts, self.smoothing = facts, smoothing
        self.classifier = torch.nn.Linear(config.hidden_size, facts.num_classes)

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, teacher=True)

    def prepare_encoder(self, encoder: Any) -> None:
        torch.nn.init.constant_(encoder.layernorm.bias, 0.25)

    def forward(self, student: Any, teacher: Any, views: Any) -> LossOutput:
        logits = self.classifier(student.cls[0])
        loss = torch.nn.functional.cross_entropy(logits, views.labels, label_smoothing=self.smoothing)
        return LossOutput(loss, {"loss_classes": loss.detach()}, projections=student.cls)


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INVARIANCE_OBJECTIVES, "supervised", Supervised)


RECIPE: dict[str, Any] = {
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    "objectives": {"invariance": {"name": "supervised"}},
    "views": {
        "pipeline": {"name": "vicreg", "hue": 0.2, "view_2": {"brightness": 0.7}},
        "transformation": {"name": "se2"},
    },
    "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
}


def image_folder(folder: Path, classes: int) -> str:
    """Nine images, in one folder per class or, with 0 classes, in one folder."""
    for index in range(9):
        place = folder / f"class_{index % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * index, 90, 90)).save(place / f"{index}.png")
    return str(folder)


@pytest.mark.usefixtures("supervised")
def test_a_head_is_as_large_as_the_data_set_has_classes_and_is_built_again_from_a_checkpoint(tmp_path) -> None:
    data = {"source": image_folder(tmp_path / "images", classes=3)}
    run = prepare(Recipe.from_dict({**RECIPE, "data": data}), None, dry=True)
    model = EquiSSLForPreTraining(run.config)
    assert model.invariance.classifier.out_features == 3
    assert model.invariance.facts.parameter_names == SE2Family().parameter_names
    first, second = model.invariance.facts.strengths
    colours = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.2}
    assert first == {**colours, "solarize_threshold": 128 / 255}
    assert second == {**first, "brightness": 0.7}
    assert not model.invariance.facts.same_base
    model.save_pretrained(tmp_path / "saved")
    loaded = EquiSSLForPreTraining.from_pretrained(tmp_path / "saved").train()
    assert loaded.invariance.facts == model.invariance.facts
    assert torch.equal(loaded(run.first).loss, model(run.first).loss)


@pytest.mark.usefixtures("supervised")
def test_what_the_objective_says_of_export_and_initial_weights_is_done() -> None:
    model = EquiSSLForPreTraining(Recipe.from_dict(RECIPE).build_pretraining_config(num_classes=4))
    for encoder in (model.student, model.teacher):
        assert torch.all(encoder.layernorm.bias == 0.25)
    with torch.no_grad():
        model.teacher.layernorm.bias.zero_()
    assert model.exported == "student"
    assert torch.all(model.export_encoder().layernorm.bias == 0.25)
    assert not model.export_encoder(weights_of="teacher").layernorm.bias.any()


@pytest.mark.usefixtures("supervised")
def test_without_labels_the_run_is_refused_and_without_data_it_says_what_it_assumes(tmp_path) -> None:
    data = {"source": image_folder(tmp_path / "images", classes=0)}
    with pytest.raises(RecipeError, match=r"data: supervised needs the class of every image.*--data.label_column"):
        prepare(Recipe.from_dict({**RECIPE, "data": data}), None, dry=True)
    run = prepare(Recipe.from_dict(RECIPE), None, dry=True)
    assert any("1000 classes are assumed" in note for note in run.notes)
    assert EquiSSLForPreTraining(run.config).invariance.classifier.out_features == 1000
    with pytest.raises(ValueError, match="'supervised' is built from facts of views and data"):
        EquiSSLForPreTraining(EquiSSLPreTrainingConfig(encoder=tiny_config(), invariance={"name": "supervised"}))
    with pytest.raises(RecipeError, match="unknown key 'facts'"):
        Recipe.from_dict({**RECIPE, "objectives": {"invariance": {"name": "supervised", "facts": {}}}})


@pytest.mark.usefixtures("asking")
def test_labels_that_an_equivariance_objective_needs_are_asked_for_before_the_first_step(tmp_path) -> None:
    data = {"source": image_folder(tmp_path / "images", classes=0)}
    objectives = {"invariance": VICREG, "equivariance": [{"name": "asking", "wants": ["labels"]}]}
    with pytest.raises(RecipeError, match="data: asking needs the class of every image"):
        prepare(Recipe.from_dict({**RECIPE, "objectives": objectives, "data": data}), None, dry=True)
    run = prepare(Recipe.from_dict({**RECIPE, "objectives": objectives}), None, dry=True)
    assert any("images with a class are assumed" in note for note in run.notes)


def test_facts_know_when_g_alone_tells_two_views_apart() -> None:
    bare = ViewSpec(
        crop_scale=None, flip_probability=0, jitter_probability=0, grayscale_probability=0, blur_probability=0
    )
    facts = ViewFacts.of(PipelineSpec((bare, bare)), FlipFamily(), num_classes=5)
    assert facts.same_base
    assert ViewFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts
    assert not ViewFacts.of(PipelineSpec((bare, replace(bare, flip_probability=0.5))), None).same_base


# ---- views of an objective of weight 0; projections ----


def test_a_control_keeps_the_views_and_stays_the_base() -> None:
    def model_with(**entry: Any) -> EquiSSLForPreTraining:
        torch.manual_seed(0)
        equivariance = [{"name": "reconstruction", "num_intermediate_images": 3, **entry}]
        return EquiSSLForPreTraining(
            EquiSSLPreTrainingConfig(encoder=tiny_config(), invariance=dict(VICREG), equivariance=equivariance)
        )

    trained, control, base = model_with(), model_with(weight=0, views="keep"), model_with(weight=0.0)
    assert control.needs == trained.needs == Needs(fractions=(0.25, 0.5, 0.75))
    assert base.needs == Needs()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in control.state_dict().items())
    views = make_views(trained.needs)
    assert torch.equal(control(views).loss, base(views).loss)
    with pytest.raises(StrictDataclassError, match=r"is 'all'\. Write `keep`"):
        model_with(weight=0, views="all")


def test_a_control_encodes_what_joins_and_refuses_what_its_runs_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharing(Asking):
        @property
        def needs(self) -> Needs:
            third = {"share": 1 / 3, "local_pairs": 0, "grid_scale": (0.7, 1.3), "grid_ratio": (0.75, 4 / 3)}
            joining = ExtraViews("share", TransformedPairs, third, hidden_layers=(1,), joins=(0, 1))
            turned = ExtraViews("turned", FourRotations, {"size": 16, "spec": ViewSpec()})
            return Needs(teacher=True, extra=(joining, turned))

        def check_batch(self, images: int, processes: int) -> None:
            if images < 4:
                raise ValueError("too few")

    monkeypatch.setitem(EQUIVARIANCE_OBJECTIVES, "asking", Sharing)
    model = EquiSSLForPreTraining(
        EquiSSLPreTrainingConfig(
            encoder=tiny_config(),
            invariance=dict(VICREG),
            equivariance=[{"name": "asking", "weight": 0, "views": "keep"}],
        )
    )
    features = model.encode(views := make_views(model.needs))
    assert views.extra["turned"][0].shape == (4, 3, 16, 16)
    assert (features.cls.shape[1], len(features.tokens[0])) == (6, 4)
    assert (sorted(features.extra["share"]), features.extra["turned"]) == ([0, 1], {})
    assert (features.extra["share"][0].hidden, model.teacher) == ({}, None)
    with pytest.raises(ValueError, match="too few"):
        model.check_batch(3, 1)


@pytest.mark.usefixtures("asking")
def test_a_control_is_written_in_a_recipe() -> None:
    objectives = {"invariance": VICREG, "equivariance": [{"name": "asking", "weight": 0, "views": "keep"}]}
    recipe = Recipe.from_dict({**RECIPE, "objectives": objectives})
    assert Recipe.from_dict(recipe.to_dict()).objectives.equivariance[0]["views"] == "keep"
    assert recipe.build_pretraining_config().kept == [{"name": "asking", "weight": 0, "views": "keep"}]
    objectives["equivariance"][0]["views"] = "kept"
    with pytest.raises(RecipeError, match=r"objectives\.equivariance\.0\.views: expected one of 'keep', got 'kept'"):
        Recipe.from_dict({**RECIPE, "objectives": objectives})


def test_equivariance_objectives_see_the_projections_of_the_invariance_objective(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Reading(Asking):
        def forward(self, student: Any, teacher: Any, views: Any) -> LossOutput:
            assert student.projections.requires_grad
            self.shape = tuple(student.projections.shape)
            return super().forward(student, teacher, views)

    monkeypatch.setitem(EQUIVARIANCE_OBJECTIVES, "asking", Reading)
    model = build()
    model(make_views(model.needs, batch=5))
    assert model.equivariance[0].shape == (2, 5, 8)
