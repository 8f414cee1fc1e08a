"""An evaluator from outside the package, with its own metric and kind of data, runs and shows like one of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from hf_equissl.encoders import FrozenEncoder
from hf_equissl.evaluation import EVALUATORS, EvaluationData, Evaluator, ImageSet, Metric, ResultRecord, cli
from hf_equissl.evaluation.results import load_records
from hf_equissl.hub.card.limits import _describe_measured
from hf_equissl.hub.card.metadata import card_data
from hf_equissl.hub.card.text import _reading, _table
from hf_equissl.utils.options import Option


@dataclass(eq=False)
class BrightnessData(EvaluationData):
    """Images with the number that the name of their file ends in."""

    numbers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, source: str, **options: Any) -> Self:
        data = super().load(source, **options)
        names = {part.split: [part.images.item_name(row) for row in range(len(part))] for part in data.tests}
        names[data.train.split] = [data.train.images.item_name(row) for row in range(len(data.train))]
        data.numbers = {
            split: torch.tensor([float(Path(name).stem.rpartition("_")[2]) for name in listed])
            for split, listed in names.items()
        }
        return data


class BrightnessEvaluator(Evaluator):
    """Mean error of a least-squares fit of a number on the features."""

    name: ClassVar[str] = "brightness"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("mean_error", "levels", digits=1, higher_is_better=False, hub_type="mae", library="numpy"),
    )
    unmeasured: ClassVar[str] = "how bright an image is"
    reading: ClassVar[str] = "Errors in grey levels."
    hub_task: ClassVar[str] = "depth-estimation"
    data_type: ClassVar[type[EvaluationData]] = BrightnessData
    needs_tokens: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = (Option("--ridge", "penalty of the fit", "X", type=float),)
    protocols: ClassVar[dict[str, dict[str, Any]]] = {"small": {"scale": 2.0}}
    tasks = ("brightness",)

    def __init__(self, data: BrightnessData, *, ridge: float = 1e-3, scale: float = 1.0) -> None:
        super().__init__(data, features=("patches",), seeds=1)
        self.ridge, self.scale = ridge, scale

    def settings(self, task: str) -> dict[str, Any]:
        return {"ridge": self.ridge, "scale": self.scale}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        def read(part: ImageSet) -> tuple[np.ndarray, np.ndarray]:
            rows, features = part.features(encoder, self.features)
            known = np.pad(features["patches"].double().numpy(), ((0, 0), (0, 1)), constant_values=1.0)
            return known, self.data.numbers[part.split][rows].double().numpy()

        x, y = read(self.data.train)
        weights = np.linalg.solve(x.T @ x + self.ridge * np.eye(x.shape[1]), x.T @ y)
        records = []
        for part in self.data.tests:
            tested, true = read(part)
            error = np.abs(tested @ weights - true).mean()
            records += self.records(encoder, task, "patches", {"mean_error": [error]}, seeds, test=part)
        return records


@pytest.fixture
def registered() -> Iterator[None]:
    EVALUATORS.register(BrightnessEvaluator.name)(BrightnessEvaluator)
    yield
    del EVALUATORS[BrightnessEvaluator.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, and grey images whose file names say how bright they are."""
    root = tmp_path_factory.mktemp("extension")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=4
    )
    Dinov2Model(config).save_pretrained(root / "encoder")
    BitImageProcessor(crop_size={"height": 16, "width": 16}).save_pretrained(root / "encoder")
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("test", 20), ("validation", 20)):
        (root / "images" / split).mkdir(parents=True)
        for row, level in enumerate(rng.integers(20, 230, count)):
            pixels = np.full((16, 16, 3), level, dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{row}_{level}.png")
    return root


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current folder that registers the evaluator when it is imported."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    text = f"from {__name__} import EVALUATORS, BrightnessEvaluator\n\n"
    text += "EVALUATORS.register('brightness')(BrightnessEvaluator)\n"
    (tmp_path / "own_measures.py").write_text(text)
    yield "own_measures"
    EVALUATORS.pop("brightness", None)
    sys.modules.pop("own_measures", None)


def test_an_evaluator_from_outside_is_run_recorded_shown_and_published(
    own_module: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--encoder", str(folder / "encoder"), "--data", str(folder / "images"), "--output_dir", str(tmp_path)]
    words += ["--evaluators", "brightness", "effective_rank", "--further_test", str(folder / "images"), "validation"]
    for wrong, message in (([], "no 'brightness'"), (["--import", "own_measure"], "there is no module 'own_measure'")):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*words, *wrong])
        assert message in capsys.readouterr().err
    cli.main([*words, "--import", own_module, "--ridge", "0.01", "--set", "brightness.scale=3"])
    shown = capsys.readouterr().out

    records = load_records(tmp_path / "results.json")
    own = [record for record in records if record.evaluator == "brightness"]
    assert [record.split for record in own] == ["test", "validation"]
    assert [record.primary for record in own] == [True, False]
    assert own[0].about == BrightnessEvaluator.metrics[0]
    assert own[0].protocol["ridge"] == 0.01
    assert own[0].protocol["scale"] == 3.0  # the command stands above the protocol
    assert own[0].protocol["test_images"] == 20
    assert 0 < own[0].value < 40  # the numbers are there to be read; without features the error is about 52
    assert "brightness mean_error (images, test)" in shown
    assert f"{own[0].value:.1f} levels" in shown
    assert "brightness mean_error (images, test): " in (tmp_path / "results.md").read_text()

    head = card_data(
        repo_id="lab/tiny", license="mit", objectives=["vicreg"], data=None, base_model=None, records=records
    )
    entry = next(result for result in head.eval_results if result.metric_type == "mae")
    assert (entry.task_type, entry.task_name) == ("depth-estimation", "Depth estimation")
    assert entry.metric_value == round(own[0].value, 1)
    assert "Errors in grey levels." in (reading := _reading(records, finetuned=False))
    assert "Lower is better: mean error." in reading
    assert "levels |" in _table(own)
    assert "how bright" not in _describe_measured(records)
    assert "dense tasks" not in _describe_measured(records)
    others = [record for record in records if record.evaluator != "brightness"]
    assert "how bright an image is" in _describe_measured(others)
    assert "dense tasks" in _describe_measured(others)


def test_records_show_their_metric_where_the_evaluator_is_unknown(folder: Path, tmp_path: Path) -> None:
    """A published record is read by people who lack the evaluator's code."""
    EVALUATORS.register(BrightnessEvaluator.name)(BrightnessEvaluator)
    try:
        data = BrightnessData.load(str(folder / "images"), progress=False)
        record = BrightnessEvaluator(data)(folder / "encoder")[0]
    finally:
        del EVALUATORS[BrightnessEvaluator.name]
    read = ResultRecord.from_dict(record.to_dict())
    assert read == replace(record, protocol=read.protocol)
    assert read.text.endswith(" levels")
    assert "levels" in _table([read])


def test_it_runs_by_default_only_on_its_own_kind_of_data(registered: None, folder: Path) -> None:
    plain = EvaluationData.load(str(folder / "images"), progress=False)
    applying = [name for name, evaluator in EVALUATORS.items() if evaluator.applies_to(plain)]
    assert applying == ["transformation_regression", "equivariance", "effective_rank"]  # no labels, no numbers
    assert BrightnessEvaluator.applies_to(BrightnessData.load(str(folder / "images"), progress=False))


def test_a_name_is_given_once(registered: None) -> None:
    with pytest.raises(ValueError, match="exists"):
        EVALUATORS.register("brightness")(type("Other", (BrightnessEvaluator,), {}))
