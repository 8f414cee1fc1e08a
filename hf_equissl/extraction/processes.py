"""The processes of one extraction: which one this is, and the two moments at which they meet."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.utils.logging import disable_progress_bar

from ..utils.devices import choose_device
from .settings import ExtractionError

# Processes wait for each other only at the end; the slowest may have many shards more to do.
_PATIENCE = timedelta(days=30)


class Processes:
    """The processes that ``accelerate launch`` or torchrun has started; a single one without a launcher.

    Attributes:
        rank, count: Number of this process, and of how many.
        local_rank, local_count: Number of this process on this machine, and of how many.

    Raises:
        ExtractionError: Slurm started several processes and did not say which one this is.
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

    def send_from_main(self, value: Any) -> Any:
        """Send ``value`` of the main process to all of them.

        Raises:
            ExtractionError: Another process is gone.
        """
        return value if self.count == 1 else _exchange(broadcast_object_list, [value])[0]

    def gather(self, value: Any) -> list[Any]:
        """Collect the ``value`` of each process, by rank.

        Raises:
            ExtractionError: Another process is gone.
        """
        return [value] if self.count == 1 else _exchange(gather_object, [value])

    def device(self, name: str | None) -> str:
        """Choose the device of this process: as asked for; of several accelerators, each process its own.

        Raises:
            ValueError: This machine has no such device.
        """
        device = str(choose_device(name or "auto"))
        if device == "cpu" or ":" in device:
            return device
        return f"{device}:{self.local_rank % torch.accelerator.device_count()}"


def _exchange(collective: Callable[[list[Any]], list[Any]], values: list[Any]) -> list[Any]:
    try:
        return collective(values)
    except RuntimeError as error:  # gloo says this of a peer that has gone
        raise ExtractionError(
            "another process has stopped; see its message. What is whole is kept, and the same command goes on."
        ) from error
