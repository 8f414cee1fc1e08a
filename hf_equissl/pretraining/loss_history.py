"""Loss parts between two log lines, kept on the device until somebody must look."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.agreement import gather_objects
from ..distributed.collectives import local_shard, on_any_process, rank, reduce_mean, world_size


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number; the same on every process.

    Says at which step, on which process, in which part, and what can be resumed.
    """


class LossHistory:
    """Collects detached scalars per step without synchronising, and averages or checks them on demand.

    Args:
        averages: Whether somebody will ask for averages (``drain``); else what was checked is forgotten.
    """

    def __init__(self, averages: bool = True) -> None:
        self._averages = averages
        self._steps: list[int] = []
        self._records: list[dict[str, Tensor]] = []
        self._checked = 0  # so many were found finite: one process on a CPU asks at every step

    def add(self, step: int, loss: Tensor, logs: dict[str, Tensor]) -> None:
        """Remember one micro-batch of optimizer step ``step`` (1 = the first)."""
        self._steps.append(step)
        self._records.append({"loss": loss.detach(), **logs})

    def check(self, last_checkpoint: Callable[[], str | None]) -> None:
        """Raise ``NonFiniteLossError`` on all processes if a loss since the last ``drain`` is not finite on one.

        Waits for the device and for the other processes: all have to call it.
        """
        if not self._records:
            return
        new = [record["loss"] for record in self._records[self._checked :]] or [self._records[-1]["loss"]]
        if not on_any_process(~torch.stack(new).isfinite().all()):
            self._checked = len(self._records)
            if not self._averages:
                self._forget()
            return
        found = [bad for bad in gather_objects(self._first_bad()) if bad is not None]
        first = min(bad["step"] for bad in found)
        # Terms over the batch of all processes break on all of them; the others only where it began.
        most = max(len(bad["parts"]) for bad in found if bad["step"] == first)
        origin = [bad for bad in found if bad["step"] == first and len(bad["parts"]) == most]
        raise NonFiniteLossError(_message(first, origin, last_checkpoint()))

    def check_with_weights(
        self, model: nn.Module, step: int, last_checkpoint: Callable[[], str | None], device: torch.device
    ) -> None:
        """Raise ``NonFiniteLossError`` on all processes if a loss or, after ``step``, a weight is not finite on one."""
        self.check(last_checkpoint)
        check_weights(model, step, last_checkpoint, device)

    def _forget(self) -> None:
        self._steps.clear()
        self._records.clear()
        self._checked = 0

    def _first_bad(self) -> dict[str, Any] | None:
        """Find the earliest loss of this process that is not finite: ``step``, ``rank`` and ``parts`` by name."""
        for step, record in zip(self._steps, self._records, strict=True):
            bad = {key: float(value) for key, value in record.items() if not math.isfinite(float(value))}
            if bad.pop("loss", None) is not None:
                return {"step": step, "rank": rank(), "parts": bad}
        return None

    def drain(self, last_checkpoint: Callable[[], str | None]) -> dict[str, float]:
        """Check, then return the mean of every part over steps and ranks, and forget them."""
        self.check(last_checkpoint)
        if not self._records:
            return {}
        keys = list(dict.fromkeys(key for record in self._records for key in record if key != "loss"))
        means = {key: torch.stack([r[key].float() for r in self._records if key in r]).mean() for key in keys}
        self._forget()
        return {key: float(value) for key, value in reduce_mean(means).items()}


@torch.no_grad()
def check_weights(
    model: nn.Module, step: int, last_checkpoint: Callable[[], str | None], device: torch.device | None = None
) -> None:
    """Raise ``NonFiniteLossError`` on every process if a weight is not finite on one of them.

    The loss of a step cannot see what its update did. All processes have to call it. Answers are compared on the
    training ``device``: offloaded weights lie elsewhere, where processes may have no way to exchange.
    """
    local = {name: local_shard(parameter) for name, parameter in model.named_parameters()}
    if not on_any_process(~torch.stack([value.isfinite().all().to(device) for value in local.values()]).all()):
        return
    here = next((name for name, value in local.items() if not bool(value.isfinite().all())), None)
    bad = next(name for name in gather_objects(here) if name is not None)
    raise NonFiniteLossError(f"The weight {bad} is not finite after step {step}. {_remedy(last_checkpoint())}")


def _message(step: int, bad: list[dict[str, Any]], checkpoint: str | None) -> str:
    where = ""
    if len(bad) < world_size():
        where = f" on process {', '.join(str(entry['rank']) for entry in bad)} of {world_size()} (0 is the first)"
    parts = ", ".join(f"{key} = {value}" for key, value in bad[0]["parts"].items()) or "the sum only"
    return f"The loss is not finite at step {step}{where}: {parts}. {_remedy(checkpoint)}"


def _remedy(checkpoint: str | None) -> str:
    keep = f"Last good checkpoint: {checkpoint}." if checkpoint else "No checkpoint was written before it."
    return (
        f"{keep} Nothing was saved since. Usual remedies: a lower learning rate, a longer warm-up, bf16 instead of "
        "fp16, or max_grad_norm."
    )
