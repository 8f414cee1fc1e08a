"""A Trainer that writes checkpoints which are whole or absent.

All processes write a checkpoint into a staging folder; then the main process writes ``checkpoint.json`` and renames the
folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from ..distributed.agreement import first_message
from ..distributed.engines import find_running_engine
from ..distributed.signals import end_workers
from ..utils.files import move_into_place, readable_size, sync_to_disk
from .integrity import checksums
from .manifest import STAGING_FOLDER, IncompleteCheckpointError, Manifest, list_checkpoints, newest_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, on every process; the message says why, and what can be resumed."""


class WholeCheckpoints(_Trainer):
    """Stands before ``transformers.Trainer`` among a Trainer's parents, from which it differs:

    - a checkpoint is written beside its place and renamed: a folder ``checkpoint-N`` is complete, or not written here;
    - ``check_finite`` is called before: weights that it refuses stop the run and are not saved;
    - a failure to write stops all processes together, and leaves the earlier checkpoints as they are;
    - ``best_checkpoint`` is never deleted; incomplete checkpoints are neither counted nor deleted.

    Raises:
        CheckpointError: A checkpoint cannot be saved. ``check_finite`` raises its own.
    """

    _saving = False
    _write_error: Exception | None = None

    @property
    def best_checkpoint(self) -> str | None:
        """The checkpoint that is never deleted; ``None`` unless a subclass names one."""
        return None

    @property
    def checkpoint_format(self) -> str:
        """``Manifest.format`` of the checkpoints that are saved."""
        if self.args.save_only_model:
            return "weights"
        return "deepspeed" if self.is_deepspeed_enabled else "full"

    def _last_checkpoint(self) -> str | None:
        return newest_checkpoint(str(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_FOLDER) if self._saving else run_dir

    def _save_more(self, folder: Path) -> None:
        """Write what else belongs to a checkpoint into ``folder``; for subclasses. Called on every process."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does; ``True`` goes on from the newest complete checkpoint.

        Raises:
            ValueError: There is none, or the one that is named is not complete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to go on from.")
        if resume_from_checkpoint:
            Manifest.read(resume_from_checkpoint, verify=True)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        end_workers(self.callback_handler.train_dataloader)
        return result

    def _init_training_state(self, max_steps: Any, *args: Any, **kwargs: Any) -> Any:
        """Do as the parent; how often is logged and saved follows the arguments, not those of the checkpoint."""
        comparing = logging.get_logger("transformers.trainer_utils")
        level = comparing.level
        comparing.setLevel(logging.ERROR)  # it would say that those of the checkpoint count
        try:
            found = super()._init_training_state(max_steps, *args, **kwargs)
        finally:
            comparing.setLevel(level)
        self.state.compute_steps(self.args, max_steps)
        return found

    def check_finite(self) -> None:
        """Raise on all processes if a loss or a weight is not finite on one of them; for subclasses."""

    # ---- writing ----

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep an error of writing a checkpoint until all processes can be told of it."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError, IncompleteCheckpointError) as error:
            if not self._saving:
                raise
            self._write_error = self._write_error or error

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        run_dir = Path(self._get_output_dir(trial))
        staging, name = run_dir / STAGING_FOLDER, f"checkpoint-{self.state.global_step}"
        self._write_error = None
        self._saving = True
        try:
            self._on_main(lambda: self._begin(staging / name))
            self._stop_together(staging)
            try:
                super()._save_checkpoint(model, trial)
                self._save_more(staging / name)
            except (OSError, SafetensorError) as error:
                self._write_error = self._write_error or error
            self._stop_together(staging)
            with self.writing():
                if self.args.local_process_index == 0:  # all have written by now
                    sync_to_disk(staging / name)
            self._stop_together(staging)
            self._on_main(lambda: self._finish(staging / name, run_dir / name))
            self._stop_together(staging)
        finally:
            self._saving = False

    def _on_main(self, write: Callable[[], None]) -> None:
        if self.args.should_save:
            with self.writing():
                write()

    def _begin(self, folder: Path) -> None:
        """Empty the staging folder, and refuse to begin where space is too small for another checkpoint."""
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        last = self._last_checkpoint()
        before = Manifest.read(last) if last else None
        # The size of the first one is not known here; the check before training has estimated it.
        needed = before.size if before is not None and before.format == self.checkpoint_format else 0
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"it needs about {readable_size(needed)}, {readable_size(needed - free)} more than there are")

    def _finish(self, folder: Path, target: Path) -> None:
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        files = dict(sorted(files.items()))
        Manifest(
            engine=find_running_engine(self.accelerator, self.model_wrapped),
            world_size=self.args.world_size,
            global_batch=self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            step=self.state.global_step,
            format=self.checkpoint_format,
            files=files,
            checksums=checksums(folder, list(files)),
        ).write(folder)
        _set_incomplete_aside(target)
        move_into_place(folder, target)
        self._delete_old(target)
        shutil.rmtree(folder.parent, ignore_errors=True)

    def _delete_old(self, newest: Path) -> None:
        """Delete the oldest complete checkpoints beyond ``save_total_limit``, each in one step, but not ``newest``."""
        run_dir, limit = newest.parent, self.args.save_total_limit
        complete = [folder for folder in list_checkpoints(run_dir) if _is_complete(folder)]
        kept = {newest.name, Path(self.best_checkpoint).name if self.best_checkpoint else None}
        spare = [folder for folder in complete if folder.name not in kept]
        for folder in spare[: max(0, len(complete) - limit) if limit and limit > 0 else 0]:
            folder.rename(run_dir / STAGING_FOLDER / folder.name)

    def _stop_together(self, staging: Path) -> None:
        """Wait for all processes; if one could not write, raise its error on all of them, and tidy up."""
        message = first_message(None if self._write_error is None else _reason(self._write_error, staging.parent))
        if message is None:
            return
        error, self._write_error = self._write_error, None
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._saving = False
        last = self._last_checkpoint()
        keep = f"The last complete checkpoint is {last}." if last else "There is no earlier checkpoint."
        raise CheckpointError(
            f"The checkpoint of step {self.state.global_step} cannot be written in {staging.parent}: {message}. {keep} "
            "Make room (or mend what else is wrong) and start the same command again: it goes on from there."
        ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self.writing():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self.writing():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self.writing():
            super()._save_rng_state(output_dir)


def _is_complete(folder: Path) -> bool:
    try:
        Manifest.read(folder)
    except IncompleteCheckpointError:
        return False
    return True


def _reason(error: Exception, folder: Path) -> str:
    """Say why writing failed, and what space there is; of torch's errors, which end in a stack, the first line."""
    said = error.strerror if isinstance(error, OSError) else None
    said = said or (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    try:
        return f"{said} ({readable_size(shutil.disk_usage(folder).free)} are free)"
    except OSError:  # the folder itself is gone
        return said


def _set_incomplete_aside(folder: Path) -> None:
    """Rename an incomplete folder that is in the way of a checkpoint: it may be somebody's."""
    try:
        if folder.exists():
            Manifest.read(folder)
    except IncompleteCheckpointError as error:
        number = 1
        while (aside := folder.with_name(f"incomplete-{folder.name}-{number}")).exists():
            number += 1
        folder.rename(aside)
        logger.warning(f"{folder.name} was not complete ({error}). It is kept as {aside.name}.")
