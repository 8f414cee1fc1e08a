"""Several encoders in one report: their numbers in a table, differences to one of them, and R2 as bars."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..utils.figures import make_figure, save_figure
from ..utils.files import write_text
from ..utils.markdown import plain, table
from ..utils.suggestions import did_you_mean
from .metric import R2, Metric
from .r2_plot import plot_r2, short_labels
from .registry import evaluator_of
from .report import markdown_table
from .results import ResultRecord, column_titles, merge_records, save_records

logger = logging.getLogger(__name__)
TITLE = "# Encoders compared"
REPORT, RESULTS, DIFFERENCES, BARS = "report.md", "results.json", "differences.png", "r2.png"
# Bars end here, in per cent of the baseline's value: a number near zero would make any difference look endless.
_LONGEST = 50.0


@dataclass(frozen=True)
class Difference:
    """One measurement of several encoders, beside the same one of the baseline.

    Attributes:
        title: What was measured.
        about: The metric.
        baseline: The baseline's value.
        values: Encoder -> its value, the baseline left out.
    """

    title: str
    about: Metric
    baseline: float
    values: Mapping[str, float]

    def gain(self, encoder: str) -> float:
        """Return by how much an encoder is better than the baseline, as readers see the metric; below 0: worse."""
        sign = 1 if self.about.higher_is_better else -1
        return sign * (self.values[encoder] - self.baseline) * self.about.scale

    def relative_gain(self, encoder: str) -> float:
        """Return the gain in per cent of the baseline's value, 0 where that is 0 and nothing is gained."""
        gain, whole = self.gain(encoder), abs(self.baseline * self.about.scale)
        return 100 * gain / whole if whole else (_LONGEST if gain > 0 else -_LONGEST if gain else 0.0)


@dataclass(frozen=True)
class Comparison:
    """All differences to one encoder.

    Attributes:
        baseline: Its name.
        differences: Task by task.

    Raises:
        ValueError: there are none.
    """

    baseline: str
    differences: Sequence[Difference]

    def __post_init__(self) -> None:
        """Refuse what says nothing."""
        if not self.differences:
            raise ValueError(
                f"--baseline {self.baseline}: no number of it may be compared with one of another encoder. Measure "
                "both on the same data with the same settings."
            )

    @property
    def caption(self) -> str:
        """What a picture of it shows."""
        return (
            "By how much each is better than the baseline, of every task the number to quote, in the metric's own "
            "unit; below 0 it is worse, also where lower numbers are better. Bars are as long as the difference in per "
            f"cent of the baseline's value, at most {_LONGEST:g}."
        )


def join_encoders(records: Sequence[ResultRecord]) -> list[ResultRecord]:
    """Give records of the same weights, by their digest, the name under which these come first."""
    names: dict[str, str] = {}
    for record in records:
        names.setdefault(record.encoder_digest, os.path.normpath(record.encoder))
    return merge_records(replace(record, encoder=names[record.encoder_digest]) for record in records)


def find_encoder(name: str, records: Sequence[ResultRecord]) -> str:
    """Return the encoder that ``name`` stands for: its name, or an end of it that no other has.

    Raises:
        ValueError: there is none, or several.
    """
    known = list(dict.fromkeys(record.encoder for record in records))
    parts = Path(os.path.normpath(name)).parts
    found = [each for each in known if each == name] or [
        each for each in known if Path(each).parts[-len(parts) :] == parts
    ]
    if len(found) != 1:
        what = f"{len(found)} encoders are called so" if found else f"it was not measured.{did_you_mean(name, known)}"
        raise ValueError(f"--baseline {name}: {what} Measured: {', '.join(known)}.")
    return found[0]


def list_differences(records: Sequence[ResultRecord], baseline: str) -> list[Difference]:
    """Compare the number to quote of every task with that of the baseline.

    Only numbers that may be compared are (``ResultRecord.comparability``): the same data, protocol and metric.

    Args:
        records: As ``join_encoders`` makes them.
        baseline: Name of an encoder among them.
    """
    quoted = [record for record in records if record.primary]
    several = len({(record.dataset, record.split) for record in quoted}) > 1

    def title(record: ResultRecord) -> str:
        place = f" ({Path(record.dataset).name})" if several else ""
        return record.name + evaluator_of(record).variant(record) + place

    found = []
    for key, name in column_titles(quoted, title).items():
        alike = {record.encoder: record for record in quoted if record.comparability == key}
        own = alike.pop(baseline, None)
        if own is not None and alike:
            values = {encoder: record.value for encoder, record in alike.items()}
            found.append(Difference(name, own.about, own.value, values))
    return found


def plot_differences(compared: Comparison, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw how much better or worse each encoder is than the baseline, a group of bars per task.

    A bar is as long as the difference in per cent of the baseline's value, to the right where it is better, and says
    the difference in the metric's own unit.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: without matplotlib.
    """
    differences, baseline = compared.differences, compared.baseline
    encoders = list(dict.fromkeys(encoder for each in differences for encoder in each.values))
    labels = short_labels([(name, "") for name in (*encoders, baseline)])
    height = 0.8 / len(encoders)
    figure = make_figure((7.5, 1.2 + len(differences) * (0.2 + 0.22 * len(encoders))))
    axes = figure.add_subplot()
    for number, encoder in enumerate(encoders):
        rows = [row for row, each in enumerate(differences) if encoder in each.values]
        gains = [differences[row].relative_gain(encoder) for row in rows]
        bars = axes.barh(
            [row + (number + 0.5) * height - 0.4 for row in rows],
            [min(max(gain, -_LONGEST), _LONGEST) for gain in gains],
            height,
            color=f"C{number}",
            label=labels[encoder, ""],
        )
        axes.bar_label(bars, [_signed(differences[row], encoder) for row in rows], padding=3, fontsize="small")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(differences)), [each.title.replace("_", " ") for each in differences])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(f"better than {labels[baseline, '']} by so many per cent of its value")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(3, len(encoders)), fontsize="small")
    return save_figure(figure, path)


def write_encoder_report(
    records: Sequence[ResultRecord],
    folder: str | os.PathLike[str],
    baseline: str | None = None,
    remarks: Sequence[str] = (),
) -> list[Path]:
    """Write ``report.md``, its pictures where matplotlib is installed, and all records (``results.json``).

    Args:
        records: Of any evaluators and fine-tuning runs.
        folder: Where to.
        baseline: Encoder that the others are compared with; ``None``: only the table and R2.
        remarks: Sentences about what was not measured.

    Returns:
        The files.

    Raises:
        ValueError: the baseline was not measured, nothing of it may be compared with another encoder, or the folder
            holds a report or results of something else.
    """
    folder, records = Path(folder), join_encoders(records)
    _check_own(folder)
    parts = [TITLE, markdown_table(records).rstrip()]
    pictures: list[tuple[str, Any]] = []
    if baseline is not None:
        name = find_encoder(baseline, records)
        compared = Comparison(name, list_differences(records, name))
        pictures.append((DIFFERENCES, lambda path: plot_differences(compared, path)))
        parts += [f"## Differences to {plain(name)}", compared.caption, _table(compared), _image(DIFFERENCES)]
    if any(record.metric == R2.name for record in records):
        pictures.append((BARS, lambda path: plot_r2(records, path)))
        caption = (
            "R2 of the parameters of each transformation, regressed from the frozen features of an image and its "
            "transformed copy: 1 is all of it, 0 nothing."
        )
        parts += ["## What is left of a transformation", caption, _image(BARS)]
    if remarks:
        parts += ["## Not measured", "\n".join(f"- {plain(remark)}" for remark in remarks)]
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / REPORT, folder / RESULTS]
    for file, draw in pictures:
        try:
            draw(folder / file)
            written.append(folder / file)
        except ImportError as error:
            logger.warning("No picture: %s", error)
            parts.remove(_image(file))
    write_text(folder / REPORT, "\n\n".join(parts) + "\n")
    save_records(records, folder / RESULTS)
    return written


def _check_own(folder: Path) -> None:
    """Refuse a folder whose report or results an earlier report did not write: they would be replaced."""
    report = folder / REPORT
    own = report.is_file() and report.read_text(encoding="utf-8").startswith(TITLE)
    there = [name for name in (REPORT, RESULTS) if (folder / name).exists()]
    if there and not own:
        raise ValueError(f"{folder} holds {' and '.join(there)} of something else. Name another folder for the report.")


def _image(file: str) -> str:
    return f"![{file.removesuffix('.png')}]({file})"


def _table(compared: Comparison) -> str:
    encoders = list(dict.fromkeys(encoder for each in compared.differences for encoder in each.values))
    rows = [["task", compared.baseline, *encoders]]
    for each in compared.differences:
        own = each.about.text(each.baseline) + (" %" if each.about.unit == "%" else "")
        cells = [_signed(each, encoder) if encoder in each.values else "" for encoder in encoders]
        rows.append([each.title.replace("_", " "), own, *cells])
    return table([[*map(plain, row)] for row in rows])


def _signed(difference: Difference, encoder: str) -> str:
    """Write a gain with its sign and unit: "+1.25 points", "-0.0300"."""
    unit = {"": "", "%": " points"}.get(difference.about.unit, f" {difference.about.unit}")
    return f"{difference.gain(encoder):+.{difference.about.digits}f}{unit}"
