"""Loss parts between two log lines, kept on the device until somebody must look."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .distributed import local_shard, on_any_process, reduce_mean


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number. Says at which step, in which part, and what can be resumed."""


class LossHistory:
    """Collects detached scalars per step without synchronising, and averages or checks them on demand."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._records: list[dict[str, Tensor]] = []

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
        bad_here = ~torch.stack([record["loss"] for record in self._records]).isfinite().all()
        if not on_any_process(bad_here):
            return
        for step, record in zip(self._steps, self._records, strict=True):
            bad = {key: float(value) for key, value in record.items() if not math.isfinite(float(value))}
            if "loss" in bad:
                raise NonFiniteLossError(self._message(step, bad, last_checkpoint()))
        raise NonFiniteLossError(
            f"The loss is not finite on another process, between steps {self._steps[0]} and {self._steps[-1]}. "
            f"{_remedy(last_checkpoint())}"
        )

    @staticmethod
    def _message(step: int, bad: dict[str, float], checkpoint: str | None) -> str:
        parts = ", ".join(f"{key} = {value}" for key, value in bad.items() if key != "loss") or "the sum only"
        return f"The loss is not finite at step {step}: {parts}. {_remedy(checkpoint)}"

    def drain(self, last_checkpoint: Callable[[], str | None]) -> dict[str, float]:
        """Check, then return the mean of every part over steps and ranks, and forget them."""
        self.check(last_checkpoint)
        if not self._records:
            return {}
        keys = list(dict.fromkeys(key for record in self._records for key in record if key != "loss"))
        means = {key: torch.stack([r[key].float() for r in self._records if key in r]).mean() for key in keys}
        self._steps.clear()
        self._records.clear()
        return {key: float(value) for key, value in reduce_mean(means).items()}


@torch.no_grad()
def check_weights(model: nn.Module, step: int, last_checkpoint: Callable[[], str | None]) -> None:
    """Raise ``NonFiniteLossError`` on every process if a weight is not finite on one of them.

    The loss of a step cannot see what its update did. All processes have to call it.
    """
    local = {name: local_shard(parameter) for name, parameter in model.named_parameters()}
    if not on_any_process(~torch.stack([value.isfinite().all() for value in local.values()]).all()):
        return
    bad = next((name for name, value in local.items() if not bool(value.isfinite().all())), "(on another process)")
    raise NonFiniteLossError(f"The weight {bad} is not finite after step {step}. {_remedy(last_checkpoint())}")


def _remedy(checkpoint: str | None) -> str:
    keep = f"Last good checkpoint: {checkpoint}." if checkpoint else "No checkpoint was written before it."
    return (
        f"{keep} Nothing was saved since. Usual remedies: a lower learning rate, a longer warm-up, bf16 instead of "
        "fp16, or max_grad_norm."
    )
