"""The Trainer's log lines, which every checkpoint writes again: bounded, however long a run is."""

from __future__ import annotations

from typing import Any

# So many lines of training take 1.1 MB and a quarter of a second in each checkpoint; plots show fewer points.
MOST_LINES = 2000
# Keys of other lines begin with one of these. Those lines are few, and all are kept.
_MEASURED = ("eval_", "monitor/", "train_")


def bound_lines(history: list[dict[str, Any]], most: int = MOST_LINES) -> None:
    """Thin out lines of training in place, once there are more than ``most``, to half as many, even over all steps.

    The first and the last line stay. What is dropped was shown and handed to the trackers when it was new.

    Args:
        history: ``TrainerState.log_history``.
        most: Lines of training.
    """
    if len(history) <= most:
        return
    training = [line for line in history if "loss" in line and not any(key.startswith(_MEASURED) for key in line)]
    if len(training) <= most:
        return
    first, last = training[0]["step"], training[-1]["step"]
    width = (last - first + 1) / (most // 2)
    kept: dict[int, int] = {}  # part of the steps -> the line that stands for it
    for line in training[:-1]:
        kept.setdefault(int((line["step"] - first) / width), id(line))
    dropped = {id(line) for line in training[:-1]} - set(kept.values())
    history[:] = [line for line in history if id(line) not in dropped]
