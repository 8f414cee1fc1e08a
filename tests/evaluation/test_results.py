from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hf_equissl.evaluation import (
    ResultRecord,
    load_records,
    markdown_table,
    merge_records,
    plain_table,
    plot_r2,
    save_records,
)
from hf_equissl.evaluation.report import table_rows


def record(**changes: object) -> ResultRecord:
    settings: dict[str, object] = {
        "evaluator": "transformation_regression",
        "task": "rotation",
        "metric": "r2",
        "features": "backbone",
        "values": (0.5, 0.7),
        "seeds": (0, 1),
        "primary": True,
        "dataset": "photos",
        "split": "test",
        "protocol": {"epochs": 8, "family": {"class": "RotationFamily", "fill": "zeros"}, "pair": (1, 2)},
        "encoder": "runs/a",
        "encoder_digest": "0123",
        "details": {"r2_angle": [0.5, 0.7]},
        "command": "python training/probe.py",
    }
    return ResultRecord(**{**settings, **changes})  # type: ignore[arg-type]


def test_round_trip_and_statistics(tmp_path: Path) -> None:
    one = record()
    assert one.value == pytest.approx(0.6)
    assert one.std == pytest.approx(0.1 * 2**0.5)
    assert record(values=(0.5,), seeds=(0,), details={}).std is None
    path = tmp_path / "deep" / "results.json"
    save_records([one], path)
    read = load_records(path)[0]
    assert read.to_dict() == one.to_dict()
    assert read.key == one.key
    assert {"value", "std", "versions", "date"} <= set(json.loads(path.read_text())["results"][0])
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_merging_adds_seeds_and_the_later_wins() -> None:
    later = record(values=(0.9, 0.8), seeds=(1, 2), details={"r2_angle": [0.9, 0.8]})
    merged = merge_records([record(), later, record(task="crop")])
    assert [item.task for item in merged] == ["rotation", "crop"]
    assert merged[0].seeds == (0, 1, 2)
    assert merged[0].values == (0.5, 0.9, 0.8)
    assert merged[0].details == {"r2_angle": [0.5, 0.9, 0.8]}
    with pytest.raises(ValueError, match="different measurements"):
        record().merge(record(encoder_digest="4567"))


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_records(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match="not a result file"):
        load_records(tmp_path / "b.json")
    with pytest.raises(ValueError, match="one value per seed"):
        record(seeds=(0,))
    with pytest.raises(ValueError, match="not finite"):
        record(values=(float("nan"), 0.1))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    save_records([record()], tmp_path / "r.json")
    with pytest.raises(TypeError, match="serializable"):
        save_records([record(protocol={"k": object()})], tmp_path / "r.json")
    assert len(load_records(tmp_path / "r.json")) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_tables_and_logs() -> None:
    accuracy = {"evaluator": "knn", "task": "classification", "metric": "top1", "features": "cls", "details": {}}
    rank = {"evaluator": "effective_rank", "task": "representation", "metric": "effective_rank", "details": {}}
    records = [
        record(),
        record(metric="r2_scalar", primary=False, details={}),
        record(task="crop", values=(0.2, 0.2), details={}),
        replace(record(), encoder="runs/b", encoder_digest="9"),
        record(**accuracy, values=(0.456,), seeds=(0,), protocol={"k": 20}),
        record(**rank, values=(12.3456,), seeds=(0,)),
    ]
    plain, markdown = plain_table(records), markdown_table(records)
    for text in (plain, markdown):
        assert "0.6000 +- 0.1414" in text
        assert "45.60" in text
        assert re.search(r"\b12\.35\b", text)
        assert "effective_rank effective_rank" not in text
        assert "runs/b" in text
        assert "rotation r2 [zeros]" in text
        assert "r2_scalar" not in text  # one parameter: the same number
    assert "k 20" in markdown
    assert "family RotationFamily(fill=zeros)" in markdown
    two = {"details": {"r2_tx": [0.1, 0.2], "r2_ty": [0.3, 0.4]}, "task": "translation"}
    assert "r2_scalar" in plain_table(
        [record(**two), record(**{**two, "details": {}, "values": (0.1, 0.2)}, metric="r2_scalar")]
    )


def test_numbers_that_may_not_be_compared_never_share_a_column() -> None:
    other = {"encoder": "runs/b", "encoder_digest": "9"}
    alike = [record(), replace(record(), **other, seeds=(5, 6), features="cls", command="else", date="then")]
    assert len({each.comparability for each in alike}) == 1
    header, rows = table_rows(alike)
    assert [len(header), [row[2] for row in rows]] == [3, ["0.6000 +- 0.1414"] * 2]
    for change in ({"protocol": {"epochs": 9}}, {"split": "other"}, {"dataset": "else"}, {"evaluator": "mine"}):
        unlike = [record(), replace(record(), **{**other, **change})]
        assert len({each.comparability for each in unlike}) == 2, change
        header, rows = table_rows(unlike)
        assert len(header) == 4, change
        assert [[bool(cell) for cell in row[2:]] for row in rows] == [[True, False], [False, True]]
    # What follows from the encoder does not part them; each column is explained under its own name.
    sizes = [record(protocol={"parameters": 1}), replace(record(protocol={"parameters": 2}), **other)]
    assert len(table_rows(sizes)[0]) == 3
    longer = {**record().protocol, "epochs": 9}
    text = markdown_table([record(), replace(record(protocol=longer), **other)]).replace("\\", "")
    assert "rotation r2 [zeros] (2): photos (test), 2 seed(s); epochs 9" in text
    assert record().to_dict()["comparability"] == record().comparability


def test_plot_shows_encoders_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [record(), record(task="crop", values=(-3.0, -3.0)), replace(record(), encoder="other/a")]
    figure = plot_r2(records, tmp_path / "r2.png")
    assert (tmp_path / "r2.png").stat().st_size > 1000
    axes = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["runs/a", "other/a"]
    assert sorted(round(bar.get_height(), 3) for bar in axes.patches) == [-0.1, 0.6, 0.6]
    with pytest.raises(ValueError, match="no R2"):
        plot_r2([record(metric="top1")])
