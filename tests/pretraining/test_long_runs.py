"""What grows with the length of a run stays small: log lines in checkpoints, the check of each step's loss."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from hf_equissl.pretraining.log_lines import MOST_LINES, bound_lines
from hf_equissl.pretraining.loss_history import LossHistory, NonFiniteLossError


def test_log_lines_are_bounded_and_even() -> None:
    history: list[dict[str, float]] = []
    for step in range(50, 1_000_050, 50):
        history.append({"step": step, "loss": 1.0 / step, "learning_rate": 1e-3, "grad_norm": 0.5})
        bound_lines(history)
        if step % 100_000 == 0:
            history.append({"step": step, "monitor/knn_top1": 0.5})
    history.append({"step": step, "train_loss": 0.1})
    steps = [line["step"] for line in history if "loss" in line]
    assert MOST_LINES // 4 <= len(steps) <= MOST_LINES
    assert (steps[0], steps[-1]) == (50, 1_000_000)
    assert steps == sorted(steps)
    gaps = [after - before for before, after in pairwise(steps)]
    assert max(gaps) <= 4 * 1_000_000 / (MOST_LINES // 2)  # no part of the run is bare
    assert sum("monitor/knn_top1" in line for line in history) == 10
    assert "train_loss" in history[-1]
    assert len(json.dumps(history, indent=2)) < 1_500_000


def test_few_lines_stay_as_they_are() -> None:
    history = [{"step": step, "loss": 1.0} for step in range(1, MOST_LINES + 1)]
    before = list(history)
    bound_lines(history)
    assert history == before
    bound_lines(history, most=10)
    assert [line["step"] for line in (history[0], history[-1])] == [1, MOST_LINES]
    assert len(history) <= 11


@pytest.mark.parametrize("bad", [1, 3, 7])
def test_each_loss_is_looked_at_once(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one CPU process every step asks: the work must not grow with the steps since the last log line."""
    looked: list[int] = []
    real = torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors, *more: (looked.append(len(tensors)), real(tensors, *more))[1])
    history = LossHistory()
    for step in range(1, bad):
        history.add(step, torch.tensor(float(step)), {"part": torch.tensor(0.5 * step)})
        history.check(lambda: None)
    assert looked == [1] * (bad - 1)
    if bad == 3:  # a log line in between, after which the check begins anew
        assert history.drain(lambda: None) == {"part": 0.75}
    history.add(bad, torch.tensor(float("nan")), {"part": torch.tensor(float("inf"))})
    with pytest.raises(NonFiniteLossError, match=rf"not finite at step {bad}: part = inf"):
        history.check(lambda: None)


def test_averages_count_every_step() -> None:
    history = LossHistory()
    for step in range(1, 6):
        history.add(step, torch.tensor(1.0), {"part": torch.tensor(float(step))})
        history.check(lambda: None)
    assert history.drain(lambda: None) == {"part": 3.0}
    assert history.drain(lambda: None) == {}
