"""What objectives say of themselves reaches model, plan and errors: objectives made up here, which no code names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_equissl.modeling import EquiSSLConfig
from hf_equissl.objectives import EQUIVARIANCE_OBJECTIVES, LossOutput, Objective
from hf_equissl.objectives.progress import TrainingProgress
from hf_equissl.planning import measure
from hf_equissl.planning.arithmetic import milestones, schedule
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.views.needs import Needs
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

    def scheduled(self, progress: TrainingProgress) -> dict[str, float]:
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
