"""Results on benchmarks that the Hub lists: one file for each under ``.eval_results/``, beside the card."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, constants, eval_result_entries_to_yaml

from ..evaluation.results import ResultRecord, merge_records
from ..utils.files import write_text
from ..utils.strict_yaml import dump_yaml
from .card.metadata import metric_name
from .contents import EVAL_RESULTS, OWN_EVAL_RESULTS
from .privacy import is_hub_id
from .terms import fetch_file

logger = logging.getLogger(__name__)
# A data set with such a file at its root is a benchmark: https://huggingface.co/docs/hub/eval-results
_DEFINITION = "eval.yaml"


def write_eval_results(records: Sequence[ResultRecord], repo_id: str, folder: Path) -> list[Path]:
    """Write the numbers to quote that were measured on benchmarks of the Hub, one file each.

    A record counts whose data set, a Hub id, defines a task on the split that was judged, and names its metric; of
    several with one task the first. Where the Hub cannot be
    asked there are no files; ``model-index`` in the card holds all numbers anyway.

    Args:
        records: As ``public_record`` makes them.
        repo_id: Name under which they are published; the entries refer to its card.
        folder: The repository.

    Returns:
        The files.
    """
    quoted = [record for record in merge_records(records) if record.primary and is_hub_id(record.dataset)]
    tasks = {name: find_tasks(name) for name in dict.fromkeys(record.dataset for record in quoted)}
    written: list[Path] = []
    done: set[tuple[str, str]] = set()
    for record in quoted:
        task = choose_task(tasks[record.dataset], record.split, (record.metric, record.about.hub_type))
        if task is None or (record.dataset, task) in done:
            continue
        done.add((record.dataset, task))
        words = (OWN_EVAL_RESULTS, record.dataset.rpartition("/")[2], task, record.name, record.features)
        path = folder / EVAL_RESULTS / (re.sub(r"[^\w.-]+", "-", "-".join(words)) + ".yaml")
        write_text(path, dump_yaml(eval_result_entries_to_yaml([eval_result_entry(record, task, repo_id)])))
        written.append(path)
    return written


def eval_result_entry(record: ResultRecord, task: str, repo_id: str) -> EvalResultEntry:
    """Make the entry of one record: its mean over seeds as readers see it, shares in %, and how it was measured."""
    about = record.about
    judged = record.protocol.get("test_images")
    facts = [
        metric_name(record),
        *([f"in {about.unit}"] if about.unit else []),
        *([f"{judged} images"] if judged is not None else []),
        f"{len(record.seeds)} seed(s)",
        *([f"standard deviation {record.std * about.scale:.{about.digits}f}"] if record.std is not None else []),
    ]
    return EvalResultEntry(
        dataset_id=record.dataset,
        task_id=task,
        value=round(record.value * about.scale, about.digits),
        date=record.date,
        source_url=f"{constants.ENDPOINT}/{repo_id}",
        notes=f"{', '.join(facts)}; the card says how it was measured",
    )


def find_tasks(dataset: str) -> list[Mapping[str, Any]]:
    """Return the tasks that a data set on the Hub defines as a benchmark; none where it is none, or cannot be asked."""
    path = fetch_file("data", dataset, _DEFINITION, None)
    if path is None:
        return []
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:  # a stranger's file
        logger.warning("%s of %s cannot be read: %s", _DEFINITION, dataset, str(error).splitlines()[0])
        return []
    tasks = content.get("tasks") if isinstance(content, dict) else None
    found = [task for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []
    return [task for task in found if isinstance(task.get("id"), str)]


def choose_task(tasks: Sequence[Mapping[str, Any]], split: str, metrics: Sequence[str | None]) -> str | None:
    """Return the id of the one task on a split by a metric; ``None`` where there is none, or more than one.

    A task that names no split is on any. Its id or ``metric`` has to be one of ``metrics``: a number of another kind,
    such as R2 of rotations on an image set that is judged by accuracy, would stand there as that set's result.
    """
    fitting = [
        task["id"]
        for task in tasks
        if task.get("split") in (None, split) and {task["id"], task.get("metric")} & ({*metrics} - {None})
    ]
    if len(fitting) > 1:
        logger.info("Not written to %s: which of %s is meant cannot be known.", EVAL_RESULTS, ", ".join(fitting))
    return fitting[0] if len(fitting) == 1 else None
