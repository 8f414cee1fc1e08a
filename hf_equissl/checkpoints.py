"""Where a run's checkpoints lie, which of them are complete, and how a Trainer writes them so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.trainer_utils import rotate_checkpoints

from .files import move_into_place
from .loss_history import LossHistory, check_weights

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

ARGUMENTS_FILE = "training_args.json"
STAGING_FOLDER = ".saving"
ENCODER_FOLDER = "encoder"  # where a finished run puts its encoder


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint with the highest step below ``output_dir``, or ``None``."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    complete = [path for path in folders if (path / "trainer_state.json").is_file()]
    return str(max(complete, key=checkpoint_step)) if complete else None


def checkpoint_step(folder: str | Path) -> int:
    """The step in a checkpoint's name."""
    return int(Path(folder).name[11:])


class WholeCheckpoints(_Trainer):
    """Stands before ``transformers.Trainer`` among a Trainer's parents. What differs from the latter:

    - a checkpoint is written beside and renamed: a folder ``checkpoint-N`` is complete or does not exist;
    - losses and weights are looked at before: what is not finite stops the run and is not saved;
    - which checkpoint is never deleted says ``best_checkpoint``.

    Raises:
        NonFiniteLossError: when it saves.
    """

    history: LossHistory
    _saving = False

    @property
    def best_checkpoint(self) -> str | None:
        """The checkpoint that stays whatever comes after it; none unless a subclass names one."""
        return None

    def _last_checkpoint(self) -> str | None:
        return newest_checkpoint(str(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_FOLDER) if self._saving else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.history.check(self._last_checkpoint)
        check_weights(model, self.state.global_step, self._last_checkpoint)
        run_dir = Path(self._get_output_dir(trial))
        staging, name = run_dir / STAGING_FOLDER, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            move_into_place(staging / name, run_dir / name)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, self.best_checkpoint)
        self.accelerator.wait_for_everyone()
