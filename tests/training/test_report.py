"""One report over several encoders: what is compared with what, in which direction, and what the command writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_equissl.evaluation import ResultRecord, load_records
from hf_equissl.evaluation.encoder_report import (
    Comparison,
    find_encoder,
    join_encoders,
    list_differences,
    plot_differences,
)
from hf_equissl.evaluation.metric import R2, TOP1, Metric
from hf_equissl.evaluation.results import save_records
from hf_equissl.training import report

MCE = Metric("mce", "px", digits=2, higher_is_better=False)
BASE, ROT = "runs/base/encoder", "runs/rot/encoder"


def record(encoder: str, metric: Metric, value: float, task: str, **changes: Any) -> ResultRecord:
    given: dict[str, Any] = {
        "evaluator": {"top1": "linear", "r2": "transformation_regression"}.get(metric.name, "finetune"),
        "task": task,
        "metric": metric.name,
        "about": metric,
        "features": "cls",
        "values": (value,),
        "seeds": (0,),
        "primary": True,
        "dataset": "photos",
        "split": "test",
        "protocol": {"epochs": 3},
        "encoder": encoder,
        "encoder_digest": ("b" if "base" in encoder else "c") * 16,
    }
    return ResultRecord(**{**given, **changes})


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Results as the two commands leave them: probes of both encoders, and a fine-tuned model of each."""
    probes = [
        *(record(BASE, TOP1, 0.50, "classification"), record(ROT, TOP1, 0.525, "classification")),
        *(record(BASE, R2, 0.40, "rotation"), record(ROT, R2, 0.95, "rotation")),
        record(ROT, R2, 0.90, "translation"),  # not of the baseline
        record(ROT, TOP1, 0.9, "classification", features="patches", primary=False),
    ]
    tuned = {
        "one": record(BASE, MCE, 10.0, "homography"),
        "two": record(f"./{ROT}/", MCE, 8.0, "homography"),
        "three": record(ROT, MCE, 1.0, "homography", protocol={"epochs": 90}),
    }
    for name, records in {"probes": probes, **{name: [each] for name, each in tuned.items()}}.items():
        (tmp_path / name).mkdir()
        save_records(records, tmp_path / name / "results.json")
    return [str(tmp_path / name) for name in ("probes", *tuned)]


def read(folders: list[str]) -> list[ResultRecord]:
    return join_encoders([each for folder in folders for each in load_records(Path(folder) / "results.json")])


def test_differences_are_of_like_numbers_and_positive_where_better(folders: list[str]) -> None:
    records = read(folders)
    assert {each.encoder for each in records} == {BASE, ROT}
    found = {each.title: each for each in list_differences(records, BASE)}
    assert {title: each.gain(ROT) for title, each in found.items()} == pytest.approx(
        {"linear top1": 2.5, "rotation r2": 0.55, "homography mce": 2.0}
    )
    assert {title: each.relative_gain(ROT) for title, each in found.items()} == pytest.approx(
        {"linear top1": 5.0, "rotation r2": 137.5, "homography mce": 20.0}
    )
    back = {each.title: each.gain(BASE) for each in list_differences(records, ROT)}
    assert back == pytest.approx({"linear top1": -2.5, "rotation r2": -0.55, "homography mce": -2.0})
    for name in (ROT, "rot/encoder", f"{ROT}/"):
        assert find_encoder(name, records) == ROT


def test_bars_point_to_the_better_side(folders: list[str]) -> None:
    figure = plot_differences(Comparison(ROT, list_differences(read(folders), ROT)))
    (axes,) = figure.axes
    (bars,) = axes.containers
    assert [bar.get_width() for bar in bars] == pytest.approx([-100 * 2.5 / 52.5, -50, -25])  # a long one is cut
    assert [text.get_text() for text in axes.texts] == ["-2.50 points", "-0.5500", "-2.00 px"]
    assert figure.legends[0].get_texts()[0].get_text() == "base/encoder"


def test_the_command_writes_a_report(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report"
    assert report.main([*folders, "--baseline", "base/encoder", "--output_dir", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["differences.png", "r2.png", "report.md", "results.json"]
    text = (output / "report.md").read_text()
    assert "| homography mce | 10.00 px | +2.00 px |" in text
    assert "| linear top1 | 50.00 % | +2.50 points |" in text
    assert "## Differences to runs/base/encoder" in text
    assert "![differences](differences.png)" in text
    assert "homography mce (2)" in text  # another protocol has a column of its own, and no difference
    assert len(load_records(output / "results.json")) == 9
    assert "Written to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("runs/bse/encoder", "it was not measured. Did you mean 'runs/base/encoder'"),
        ("encoder", "2 encoders are called so"),
    ],
)
def test_mistakes_are_named(
    folders: list[str], tmp_path: Path, baseline: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([*folders, "--baseline", baseline, "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="2 encoders"):
        find_encoder("encoder", read(folders))


def test_nothing_to_compare(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [folders[1], folders[3], "--output_dir", str(tmp_path / "out")]
    assert report.main([*words, "--baseline", "base/encoder"]) == 2
    assert "no number of it may be compared with one of another encoder" in capsys.readouterr().err
    assert report.main(words) == 0  # the table alone
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.md", "results.json"]


@pytest.mark.parametrize("name", ["report.md", "results.json"])
def test_files_of_others_stay(
    name: str, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run" / name
    other.parent.mkdir()
    other.write_text("[]")
    assert report.main([*folders, "--output_dir", str(other.parent)]) == 2
    assert f"holds {name} of something else" in capsys.readouterr().err
    assert other.read_text() == "[]"
    out = str(tmp_path / "report")
    assert report.main([*folders, "--output_dir", out]) == report.main([*folders, "--output_dir", out]) == 0
