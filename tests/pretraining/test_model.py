"""EquiSSLForPreTraining: the sum of its objectives, what it trains, what it exports."""

from __future__ import annotations

import pytest
import torch

from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.running.run import prepare
from hf_equissl.views.base import Views
from tests.objectives.helpers import FACTS, make_views

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "feature_size": 32,
    "equivariant_size": 16,
}
VICREG = {"name": "vicreg", "expander_sizes": [32, 32]}


def make_model(equivariance: list[dict], seed: int = 0) -> EquiSSLForPreTraining:
    torch.manual_seed(seed)
    config = EquiSSLPreTrainingConfig(
        encoder=EquiSSLConfig(**ENCODER), invariance=dict(VICREG), equivariance=equivariance, facts=FACTS.to_dict()
    )
    return EquiSSLForPreTraining(config)


@pytest.fixture
def views() -> Views:
    generator = torch.Generator().manual_seed(1)
    return Views(
        global_crops=torch.randn(2, 8, 3, 32, 32, generator=generator),
        intermediate_images=torch.randn(8, 2, 3, 32, 32, generator=generator),
    )


@pytest.mark.parametrize("name", EQUIVARIANCE_OBJECTIVES)
def test_loss_is_the_weighted_sum_of_its_parts(name: str) -> None:
    # VICReg has no teacher, and a small share of a few images is none.
    small = {"layer": 1, "form": "student", "share": 0.5} if name == "ser" else {}
    model = make_model([{"name": name, "weight": 2.5, **small}])
    views = make_views(model.needs)
    output = model(views)
    parts = [value for key, value in output.logs.items() if key.startswith("loss_")]
    assert len(parts) == 2
    torch.testing.assert_close(sum(parts), output.loss.detach())
    unweighted = make_model([{"name": name, "weight": 1.0, **small}])(views)
    torch.testing.assert_close(output.logs[f"loss_{name}"], 2.5 * unweighted.logs[f"loss_{name}"])


def test_weight_zero_is_exactly_the_base(views: Views) -> None:
    base = make_model([])
    zero = make_model([{"name": "reconstruction", "weight": 0}])
    full = make_model([{"name": "reconstruction", "weight": 1.0}])
    assert base.state_dict().keys() == zero.state_dict().keys()
    assert torch.equal(base(views).loss, zero(views).loss)
    assert not zero.needs.fractions
    for key, value in base.student.state_dict().items():  # one seed, one start, whatever the objectives
        assert torch.equal(value, full.student.state_dict()[key]), key


@pytest.mark.parametrize(
    "equivariance", [[], [{"name": "reconstruction"}], [{"name": "cross_attention_reconstruction"}]]
)
def test_what_trains_gets_a_gradient_and_what_is_frozen_none(equivariance: list[dict], views: Views) -> None:
    model = make_model(equivariance)
    model(views).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"student.embeddings.mask_token"}


def test_round_trip(tmp_path, views: Views) -> None:
    model = make_model([{"name": "reconstruction", "weight": 3.0, "num_intermediate_images": 2}])
    model.save_pretrained(tmp_path)
    loaded = EquiSSLForPreTraining.from_pretrained(tmp_path).train()
    assert loaded.weights == [3.0]
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    torch.testing.assert_close(model(views).loss, loaded(views).loss, rtol=0, atol=0)


def test_an_incomplete_state_is_refused(tmp_path) -> None:
    make_model([]).save_pretrained(tmp_path)
    config = EquiSSLPreTrainingConfig.from_pretrained(tmp_path)
    config.equivariance = [{"name": "reconstruction"}]
    with pytest.raises(ValueError, match=r"lacks \d+ weights.*equivariance\.0\.decoder"):
        EquiSSLForPreTraining.from_pretrained(tmp_path, config=config)


def test_exported_encoder_is_the_student_with_its_decoder(views: Views) -> None:
    model = make_model([{"name": "reconstruction"}]).eval()
    encoder = model.export_encoder()
    bare = model.export_encoder(with_decoder=False)
    first, second = views.global_crops
    with torch.no_grad():
        expected = model.student(first).last_hidden_state
        assert torch.equal(encoder(first).last_hidden_state, expected)
        assert torch.equal(bare(first).last_hidden_state, expected)
        features = model.encode(views)
        images = model.equivariance[0].reconstruct(features, views)
        torch.testing.assert_close(encoder.reconstruct(first, second), images, rtol=1e-5, atol=1e-5)
    assert isinstance(encoder, EquiSSLModel)
    assert bare.decoder is None
    assert encoder.config.decoder_type == "conv"


def test_a_teacher_that_only_an_equivariance_objective_asks_for_is_not_the_result() -> None:
    ser = {"name": "ser", "layer": 1, "share": 0.5, "form": "teacher"}
    model = make_model([ser])
    assert model.teacher is not None
    assert model.exported == make_model([]).exported == "student"
    model.config.invariance["pooling"] = "mean"
    with pytest.raises(
        ValueError, match=r"Images of ser join .* vicreg reads the mean of the patches. Set its pooling"
    ):
        EquiSSLForPreTraining(model.config)


def test_monitors_show_collapse(views: Views) -> None:
    model = make_model([])
    healthy = model(views, monitor=True).logs
    views.global_crops[:] = views.global_crops[:, :1]
    collapsed = model(views, monitor=True).logs
    assert collapsed["feature_std"] < 1e-3 < healthy["feature_std"]
    assert collapsed["effective_rank"] < 1.5 < healthy["effective_rank"]
    assert "feature_std" not in model(views).logs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"invariance": {"expander_sizes": [8]}}, "needs a `name`"),
        ({"equivariance": [{"name": "reconstruction", "weight": -1.0}]}, "must be a number >= 0, got -1.0"),
        ({"equivariance": [{"name": "reconstruction", "weight": float("nan")}]}, "must be a number >= 0"),
        ({"equivariance": [{"name": "reconstruction"}] * 2}, "may be named once"),
        ({"encoder": EquiSSLConfig(**ENCODER, decoder_type="conv")}, "must not have a decoder"),
    ],
)
def test_impossible_configurations(change: dict, message: str) -> None:
    arguments = {"encoder": EquiSSLConfig(**ENCODER), "invariance": dict(VICREG), **change}
    with pytest.raises(Exception, match=message):
        EquiSSLPreTrainingConfig(**arguments)


def test_unknown_objective_names_the_nearest() -> None:
    config = EquiSSLPreTrainingConfig(encoder=EquiSSLConfig(**ENCODER), invariance={"name": "vicregg"})
    with pytest.raises(ValueError, match="vicreg"):
        EquiSSLForPreTraining(config)


def test_a_recipe_with_a_late_cls_has_none_before_its_layer_and_reads_it_after() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    recipe = Recipe.from_dict(
        {
            "model": {**sizes, "cls_insertion_layer": 2},
            "objectives": {"invariance": {"name": "vicreg", "expander_sizes": [8, 8]}},
            "views": {"pipeline": {"name": "vicreg"}},
            "training": {"per_device_train_batch_size": 4, "max_steps": 1, "use_cpu": True},
        }
    )
    run = prepare(recipe, None, dry=True)
    model = EquiSSLForPreTraining(run.config)
    student, images = model.student, torch.rand(4, 3, 32, 32)

    def states() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return student(images, output_hidden_states=True).hidden_states

    before = states()
    assert [state.shape[1] for state in before] == [16, 16, 16, 17]  # the CLS token goes in after block 2
    with torch.no_grad():
        student.embeddings.cls_token += 1
    after = states()
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)] == [True, True, True, False]
    model(views=run.first.map(torch.rand_like)).loss.backward()
    assert student.embeddings.cls_token.grad.abs().sum() > 0
