from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_equissl.encoders import FrozenEncoder, save_encoder
from hf_equissl.evaluation import build_evaluator
from hf_equissl.evaluation.rendered_objects import RenderedData
from hf_equissl.evaluation.retrieval import quaternions
from hf_equissl.evaluation.three_die_bench import draw_pairs
from hf_equissl.hub.sie_predictor import load_sie_predictor
from hf_equissl.modeling import EquiSSLConfig, EquiSSLModel
from hf_equissl.pretraining.model import EquiSSLForPreTraining, EquiSSLPreTrainingConfig
from hf_equissl.training import probe
from hf_equissl.views.facts import ViewFacts
from tests.data.render_objects import render_objects


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_objects(tmp_path_factory.mktemp("renders") / "bench", {"train": 12, "val": 6}, views=4, size=16)


class Knows(nn.Module):
    """Features that are the latents themselves: the data are read in the order in which the images come."""

    def __init__(self, latents: list[Tensor]) -> None:
        super().__init__()
        self.rows = iter(latents)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.stack([next(self.rows) for _ in pixel_values])


def knowing(data: RenderedData, names: list[str]) -> FrozenEncoder:
    """Make an encoder that says the rotation and the hues of every image, of the sets in the order of ``names``."""
    rows = []
    for name in names:
        latents = data.latents[name].flatten(0, 1)
        rows += list(torch.cat([quaternions(latents[:, :3]).float(), latents[:, [3, 6]]], 1))
    return FrozenEncoder(Knows(rows), image_size=16)


def test_pose_and_colour_are_read_from_features_that_have_them(folder: Path) -> None:
    data = RenderedData.load(str(folder), progress=False)
    assert (len(data.train), len(data.test), data.test.split) == (48, 24, "validation")
    assert data.latents["validation"].shape == (6, 4, 7)
    assert data.train.labels.reshape(12, 4).unique(dim=1).shape == (12, 1)
    evaluator = build_evaluator(
        "rendered_pose", data, features=["cls"], epochs=150, batch_size=12, hidden_width=64, progress=False
    )
    found = {(each.task, each.metric): each.value for each in evaluator(knowing(data, ["train", "validation"]))}
    assert found["color", "r2"] > 0.9, found  # differences
    assert found["color", "r2_scalar"] > 0.9
    assert found["rotation", "r2_scalar"] > 0.3, found
    first, second = draw_pairs(50, 4, 1, 2).unbind(1)
    assert bool((first != second).all())
    assert torch.equal(draw_pairs(50, 4, 1, 2)[:, 0], first)
    assert not torch.equal(draw_pairs(50, 4, 1, 3)[:, 0], first)
    few = RenderedData.load(str(folder), train_images=5, test_images=2, progress=False)
    assert [len(few.latents[split]) for split in ("train", "validation")] == [5, 2]
    half = RenderedData.load(str(folder), train_subset={"share": 0.5, "stratified": True}, progress=False)
    assert {split: len(latents) for split, latents in half.latents.items()} == {half.train.split: 6, "validation": 6}


class Oracle:
    """Embeddings are one-hot positions; predictions the right one, or the one beside it."""

    features = "cls"

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def embed(self, features: Tensor) -> Tensor:
        self.count = len(features)
        return torch.eye(self.count)

    def predict(self, embeddings: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        assert list(parameters)[:4] == [f"rotation_{axis}" for axis in "xyzw"]
        assert len(parameters) == 8
        return torch.eye(self.count).roll(self.offset, 1)


def test_a_predictor_that_is_right_and_one_that_errs_by_one(folder: Path) -> None:
    data = RenderedData.load(str(folder), progress=False)
    values = {}
    for offset in (0, 1):
        encoder = knowing(data, ["validation"])
        evaluator = build_evaluator("rendered_prediction", data)
        with pytest.raises(ValueError, match="--predictor PATH"):
            evaluator.check(encoder)
        encoder.predictor = Oracle(offset)
        evaluator.check(encoder)
        values[offset] = {record.metric: record.value for record in evaluator(encoder)}
    assert values[0] == pytest.approx(
        {"mrr": 1, "hit_at_1": 1, "hit_at_5": 1, "prediction_retrieval_error": 0}, abs=1e-6
    )
    assert values[1]["hit_at_1"] == 0
    assert values[1]["mrr"] < 0.6
    assert values[1]["prediction_retrieval_error"] > 0.05


CONFIG = EquiSSLConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
    feature_size=12,
    equivariant_size=4,
)


def save_state(folder: Path, *objectives: str) -> Path:
    """Save a pretraining state whose predictor was told rotations and hues."""
    torch.manual_seed(0)
    names = [f"rotation_{axis}" for axis in "xyzw"] + ["floor_hue", "light_hue"]
    options = {"sie": {"expander_sizes": [8, 8]}}
    config = EquiSSLPreTrainingConfig(
        encoder=CONFIG,
        invariance={"name": "vicreg", "expander_sizes": [8, 8]},
        equivariance=[{"name": name, "weight": 1.0, **options.get(name, {})} for name in objectives],
        facts=ViewFacts(parameter_names=tuple(names), same_base=True).to_dict(),
    )
    EquiSSLForPreTraining(config).save_pretrained(folder)
    return folder


def test_the_predictor_of_a_run_is_found_in_its_state(folder: Path, tmp_path: Path) -> None:
    state = save_state(tmp_path / "state", "sie")
    predictor = load_sie_predictor(state)
    assert predictor.features == "equivariant_cls"
    data = RenderedData.load(str(folder), progress=False)
    torch.manual_seed(0)
    encoder = FrozenEncoder(EquiSSLModel(CONFIG), image_size=16)
    encoder.predictor = predictor
    evaluator = build_evaluator("rendered_prediction", data)
    evaluator.check(encoder)
    records = evaluator(encoder)
    assert [record.metric for record in records] == ["mrr", "hit_at_1", "hit_at_5", "prediction_retrieval_error"]
    assert {record.features for record in records} == {"equivariant_cls"}
    assert not evaluator.missing_seeds(encoder, "prediction", records)
    # What it is told matters: its maps are linear in the parameters and the constant 1 behind them.
    x = predictor.embed(torch.randn(5, 4))
    names = predictor.parameter_names
    none, one = ({name: torch.full((5,), value) for name in names} for value in (0.0, 1.0))
    halfway = predictor.predict(x, {name: torch.full((5,), 0.5) for name in names})
    assert torch.allclose(halfway, (predictor.predict(x, none) + predictor.predict(x, one)) / 2, atol=1e-5)
    assert not torch.allclose(predictor.predict(x, none), predictor.predict(x, one))
    with pytest.raises(ValueError, match=r"trained with rotation_x, .* It cannot be judged on them"):
        predictor.predict(x, {"angle": torch.zeros(5)})
    with pytest.raises(ValueError, match="was trained with no objective, not SIE"):
        load_sie_predictor(save_state(tmp_path / "other"))


def test_every_part_of_a_stem_has_a_row(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_encoder(EquiSSLModel(CONFIG), tmp_path / "encoder", [0.5] * 3, [0.25] * 3)
    words = ["--encoder", str(tmp_path / "encoder"), "--data", str(folder), "--output_dir", str(tmp_path / "out")]
    quick = ["--set", "rendered_pose.epochs=1", "--set", "rendered_class.epochs=1"]
    probe.main([*words, *quick, "--evaluators", "rendered_class", "rendered_pose"])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("stem", "equivariant", "invariant", "rotation r2_scalar", "color r2"))
    with pytest.raises(SystemExit):
        probe.main([*words, "--evaluators", "rendered_prediction", "--predictor", str(tmp_path / "nothing")])
    assert "nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        probe.main([*words[:2], "--data", str(tmp_path), *words[4:], "--evaluators", "rendered_pose"])
    assert str(tmp_path) in capsys.readouterr().err
