"""The processes of one command: who this one is, and the two moments at which they meet."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.utils.logging import disable_progress_bar

from ..evaluation.cli import check_device
from .settings import ExtractionError

# Processes wait for each other only at the end; the slowest may have many shards more to do.
_PATIENCE = timedelta(days=30)


class Processes:
    """What ``accelerate launch`` or torchrun has started; one process where it was nobody.

    Attributes:
        rank, count: Of this process, and of how many.
        local_rank, local_count: The same on this machine.

    Raises:
        ExtractionError: Slurm started several, and did not say which one this is.
    """

    def __init__(self) -> None:
        environment = os.environ
        if "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            raise ExtractionError(
                f"srun has started {environment['SLURM_STEP_NUM_TASKS']} tasks, and each would do all of it. Start "
                "one `accelerate launch` per machine, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT "
                "as training/slurm/pretrain.sbatch does."
            )
        self.rank, self.count = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        self.local_rank = int(environment.get("LOCAL_RANK", "0"))
        self.local_count = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        if self.count > 1:
            # cpu=True chooses gloo, also beside GPUs: nothing but a few words is ever exchanged.
            PartialState(cpu=True, timeout=_PATIENCE)
        if not self.is_main:
            disable_progress_bar()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that plans, records and reports."""
        return self.rank == 0

    def from_main(self, value: Any) -> Any:
        """What the main process has as ``value``.

        Raises:
            ExtractionError: Another process is gone.
        """
        return value if self.count == 1 else _together(broadcast_object_list, [value])[0]

    def gather(self, value: Any) -> list[Any]:
        """What all processes have as ``value``, by rank.

        Raises:
            ExtractionError: Another process is gone.
        """
        return [value] if self.count == 1 else _together(gather_object, [value])

    def device(self, name: str | None) -> str:
        """The device of this process: as asked for; of several accelerators, each process its own.

        Raises:
            ValueError: This machine has no such device.
        """
        device = check_device(name) or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cpu" or ":" in device:
            return device
        return f"{device}:{self.local_rank % torch.accelerator.device_count()}"


def _together(exchange: Callable[[list[Any]], list[Any]], values: list[Any]) -> list[Any]:
    try:
        return exchange(values)
    except RuntimeError as error:  # gloo says this of a peer that has gone
        raise ExtractionError(
            "another process has stopped; see its message. What is whole is kept, and the same command goes on."
        ) from error
