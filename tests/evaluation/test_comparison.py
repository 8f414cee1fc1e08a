"""Several seeds of several systems in one table: hand-computed numbers, and nothing unlike in one column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_equissl.evaluation import ResultRecord
from hf_equissl.evaluation.comparison import (
    Measured,
    UnlikeProtocolsError,
    comparison_rows,
    comparison_text,
    merge_systems,
    newest_encoder,
    plain_comparison,
    plot_comparison,
)


def r2(task: str, *values: float, fill: str | None = "zeros", **changes: Any) -> ResultRecord:
    """R2 of one encoder, a value per seed of the probe."""
    record = ResultRecord(
        evaluator="transformation_regression",
        task=task,
        metric="r2",
        features="backbone",
        values=values,
        seeds=tuple(range(len(values))),
        primary=True,
        dataset="photos",
        split="test",
        protocol={"epochs": 8, "family": {"class": task, **({"fill": fill} if fill else {})}},
        encoder="runs/any",
        encoder_digest="0123",
    )
    return replace(record, **changes)


def top1(value: float) -> ResultRecord:
    changes = {"evaluator": "linear", "metric": "top1", "about": None, "hub_task": "", "protocol": {"solver": "lbfgs"}}
    return r2("classification", value, **changes)


def measured() -> list[Measured]:
    blur = {"fill": None}
    return [
        Measured("base", 0, [r2("rotation", 0.1, 0.3), r2("gaussian_blur", 0.6, **blur), top1(0.40)]),
        Measured("base", 7, [r2("rotation", 0.4), r2("gaussian_blur", 0.8, **blur), top1(0.44)]),
        Measured("ours", 0, [r2("rotation", 0.9), r2("rotation", 0.5, fill="reflect"), top1(0.5)]),
    ]


def test_rows_are_systems_with_mean_and_deviation_over_training_seeds() -> None:
    merged = merge_systems(measured())
    rows = comparison_rows(merged, ["ours", "base", "absent"], ("backbone", ""), {"step": {"ours": "1.25"}})
    mean, reflect = "mean r2 [zeros]", "rotation r2 [reflect]"
    header = ["rotation r2 [zeros]", "gaussian_blur r2", reflect, mean, "linear top1"]
    assert rows[0] == ["system", "seed", *header, "step"]
    assert rows[1] == ["ours", "0", "0.9000", "", "0.5000", "", "50.00", "1.25"]  # without blur there is no mean
    # Rotation: 0.2 (mean of two probes) and 0.4; mean over families: 0.4 and 0.6. Deviation: difference / sqrt(2).
    cells = ["0.3000 +- 0.1414", "0.7000 +- 0.1414", "", "0.5000 +- 0.1414", "42.00 +- 2.83", ""]
    assert rows[2] == ["base", "0 7", *cells]
    base = next(record for record in merged if (record.encoder, record.task) == ("base", "rotation"))
    assert base.values == pytest.approx((0.2, 0.4))
    assert (base.seeds, base.details) == ((0, 7), {"values_by_probe_seed": [[0.1, 0.3], [0.4]]})


def test_a_cell_of_fewer_seeds_than_its_row_says_so() -> None:
    runs = [*measured(), Measured("base", 8, [top1(0.46)]), Measured("base", 9, [top1(0.46)])]
    merged = merge_systems(runs)
    row = comparison_rows(merged, ["base"], ("backbone", ""), {})[1]
    assert row[1:3] == ["0 7 8 9", "0.3000 +- 0.1414 (seeds 0 7)"]
    assert row[-1] == "44.00 +- 2.83"
    assert "(seed ...)" not in comparison_text(merge_systems(measured()), ["base"])
    text = comparison_text(merge_systems([*measured()[:1], Measured("base", 7, [top1(0.44)])]), ["base"])
    assert "| base | 0 7 | 0.2000 (seed 0) |" in text
    assert "Cells with (seed ...) are of these seeds alone" in text


def test_texts_and_plot(tmp_path: Path) -> None:
    equivariant = [r2("rotation", 0.95, features="equivariant", primary=False)]
    equivariant += [r2("rotation", 0.25, features="equivariant", metric="r2_linear", primary=False, about=None)]
    runs = [*measured(), Measured("ours", 0, equivariant)]
    merged = merge_systems(runs)
    text = comparison_text(merged, ["ours", "base"], {"step": {"ours": "1.25"}}, ["Step: a note."])
    text, linear = text.split("Features: equivariant, linear probe")
    backbone, rest = text.split("Features: equivariant")
    assert "| system | seed | rotation r2_linear [zeros] |" in linear
    assert "| ours | 0 | 0.2500 |" in linear
    assert "| ours | 0 | 0.9000 |" in backbone
    assert "| ours | 0 | 0.9500 |" in rest
    assert "1.25" in backbone
    assert "1.25" not in rest
    assert "Mean +- standard deviation over seeds of the training.\n\nStep: a note.\n\n- rotation r2" in linear
    assert "0.3000 +- 0.1414" in plain_comparison(merged, ["base"])
    pytest.importorskip("matplotlib")
    figure = plot_comparison(merged, ["ours", "base"], tmp_path / "table.png")
    assert [axes.get_title() for axes in figure.axes][:2] == ["rotation r2\n[zeros]", "gaussian blur r2"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ours", "base"]
    drawn = [container.lines[0].get_xdata().tolist() for container in figure.axes[0].containers]
    assert drawn == [pytest.approx([0.9, 0.3]), [0.95]] or drawn == [pytest.approx([0.3, 0.9]), [0.95]]
    assert (tmp_path / "table.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"protocol": {"epochs": 2, "family": {"class": "rotation", "fill": "zeros"}}},
            "epochs is 2 for ours, seed 0, ",
        ),
        ({"dataset": "others"}, "dataset is 'others' for ours, seed 0, and 'photos' for base, seed 0"),
        ({"split": "train"}, "split is 'train'"),
    ],
)
def test_unlike_protocols_are_refused_in_one_column(change: dict[str, Any], message: str) -> None:
    runs = [Measured("base", 0, [r2("rotation", 0.1)]), Measured("ours", 0, [r2("rotation", 0.1, **change)])]
    with pytest.raises(UnlikeProtocolsError, match=message):
        merge_systems(runs)
    within = [Measured("base", 0, [r2("rotation", 0.1), r2("rotation", 0.1, **change)])]  # in one folder
    with pytest.raises(UnlikeProtocolsError):
        merge_systems(within)


def test_records_of_an_earlier_training_are_passed_over() -> None:
    old, new = (r2("rotation", 0.1, encoder_digest=digest) for digest in ("old", "new"))
    old, new = replace(old, date="2026-01-01T00:00:00+00:00"), replace(new, date="2026-01-02T00:00:00+00:00")
    assert newest_encoder([new, old]) == [new]
    assert newest_encoder([]) == []
