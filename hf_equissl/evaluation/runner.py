"""Several encoders through several evaluators, with results on disk after each step, so that nothing is done twice."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ..encoders.frozen import FrozenEncoder
from ..utils.files import write_text
from .base import Evaluator
from .registry import EVALUATORS
from .report import markdown_table
from .results import ResultRecord, load_records, merge_records, save_records

logger = logging.getLogger(__name__)

RESULTS = "results.json"
TABLE = "results.md"


def check_output_dir(output_dir: str | os.PathLike[str]) -> Path:
    """Make the folder and try to write there, before anything is computed.

    Raises:
        ValueError: if it is no folder, or if nothing can be written there.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"Results cannot be written to {str(folder)!r} ({error.strerror or error}). Choose another output folder."
        ) from error
    return folder


def run_evaluators(
    encoder: FrozenEncoder,
    evaluators: Sequence[Evaluator],
    output_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    command: str | None = None,
    progress: bool = True,
) -> list[ResultRecord]:
    """Measure one encoder and keep the records in ``output_dir/results.json``.

    A task is not measured again for a seed that the file already holds for the same weights (by digest), data set and
    protocol. The file is replaced after every task: a run that is stopped loses one task at most. One process at a time
    may write to a folder.

    Args:
        encoder: What to measure.
        evaluators: What measures them.
        output_dir: Where results live; records of other encoders and protocols in there stay.
        overwrite: Measure everything again, replacing records of the same measurement.
        command: The command line, for the records.
        progress: Whether to show a bar.

    Returns:
        The records of this call's measurements, those found on disk included.
    """
    path = check_output_dir(output_dir) / RESULTS
    records = load_records(path) if path.exists() else []
    for evaluator in evaluators:
        evaluator.check(encoder)
    work = [(evaluator, task) for evaluator in evaluators for task in evaluator.tasks]
    wanted: list[str] = []
    for evaluator, task in tqdm(work, desc=encoder.name, unit="task", disable=not progress):
        known = [record for record in records if record.encoder_digest == encoder.digest()]
        seeds = evaluator.seeds if overwrite else evaluator.missing_seeds(encoder, task, known)
        if seeds:
            evaluator.command = command
            made = evaluator.evaluate(encoder, task, seeds)
            if overwrite:
                replaced = {record.key for record in made}
                records = [record for record in records if record.key not in replaced]
            records = merge_records([*records, *made])
            save_records(records, path)
        else:
            logger.info("%s, %s, %s: found in %s.", encoder.name, evaluator.name, task, path)
        wanted += evaluator.keys(encoder, task)
    return [record for record in records if record.key in set(wanted)]


def write_report(records: Iterable[ResultRecord], output_dir: str | os.PathLike[str]) -> list[Path]:
    """Write ``results.md`` and, where matplotlib is installed, the evaluators' pictures; return their paths."""
    folder, records = Path(output_dir), list(records)
    write_text(folder / TABLE, markdown_table(records))
    written = [folder / TABLE]
    for name, evaluator in EVALUATORS.items():
        own = [record for record in records if record.evaluator == name]
        for plot in evaluator.plots if own else ():
            try:
                plot.draw(own, folder / plot.file)
                written.append(folder / plot.file)
            except ImportError as error:
                logger.warning("No picture: %s", error)
    return written
