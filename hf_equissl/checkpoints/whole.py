"""How a Trainer writes checkpoints that are whole or absent.

A checkpoint is written into a staging folder, by all processes; then the main process writes ``checkpoint.json`` and
renames the folder.
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
from ..distributed.engines import running_engine
from ..utils.files import move_into_place, readable_size, sync_to_disk
from .manifest import STAGING_FOLDER, IncompleteCheckpointError, Manifest, list_checkpoints, newest_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the same on every process. Says why, and what can be resumed."""


class WholeCheckpoints(_Trainer):
    """Stands before ``transformers.Trainer`` among a Trainer's parents. What differs from the latter:

    - a checkpoint is written beside and renamed: a folder ``checkpoint-N`` is complete, or not written here;
    - ``check_finite`` is called before: what it refuses stops the run and is not saved;
    - what cannot be written stops all processes together, and leaves the earlier checkpoints as they are;
    - which checkpoint is never deleted says ``best_checkpoint``; what is not complete is neither counted nor deleted.

    Raises:
        CheckpointError: when it saves; and what ``check_finite`` raises.
    """

    _saving = False
    _write_error: Exception | None = None

    @property
    def best_checkpoint(self) -> str | None:
        """The checkpoint that stays whatever comes after it; none unless a subclass names one."""
        return None

    @property
    def checkpoint_format(self) -> str:
        """``Manifest.format`` of what is saved."""
        if self.args.save_only_model:
            return "weights"
        return "deepspeed" if self.is_deepspeed_enabled else "full"

    def _last_checkpoint(self) -> str | None:
        return newest_checkpoint(str(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_FOLDER) if self._saving else run_dir

    def _save_more(self, folder: Path) -> None:
        """Write what else belongs to a checkpoint into ``folder``. Called on every process, before the manifest."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The parent's. ``True`` goes on from the newest complete checkpoint.

        Raises:
            ValueError: there is none, or the one that is named is not complete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to go on from.")
        if resume_from_checkpoint:
            Manifest.read(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_finite(self) -> None:
        """Raise on all processes if a loss or a weight is not finite on one of them; a Trainer says how it knows."""

    # ---- writing ----

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While a checkpoint is saved, keep an error of writing until all processes are there to hear of it."""
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
        """Empty the staging folder, and do not begin what cannot end."""
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        last = self._last_checkpoint()
        before = Manifest.read(last) if last else None
        # Of the first one nobody knows better than the check before training.
        needed = before.size if before is not None and before.format == self.checkpoint_format else 0
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(f"it needs about {readable_size(needed)}, {readable_size(needed - free)} more than there are")

    def _finish(self, folder: Path, target: Path) -> None:
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        Manifest(
            engine=running_engine(self.accelerator, self.model_wrapped),
            world_size=self.args.world_size,
            global_batch=self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            step=self.state.global_step,
            format=self.checkpoint_format,
            files=dict(sorted(files.items())),
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
    """In words, with the room that there is; of torch's own, which has a stack behind it, the first line."""
    said = error.strerror if isinstance(error, OSError) else None
    said = said or (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    try:
        return f"{said} ({readable_size(shutil.disk_usage(folder).free)} are free)"
    except OSError:  # the folder itself is gone
        return said


def _set_incomplete_aside(folder: Path) -> None:
    """Keep what lies where a checkpoint goes and is not complete: nobody knows whose it is."""
    try:
        if folder.exists():
            Manifest.read(folder)
    except IncompleteCheckpointError as error:
        number = 1
        while (aside := folder.with_name(f"incomplete-{folder.name}-{number}")).exists():
            number += 1
        folder.rename(aside)
        logger.warning(f"{folder.name} was not complete ({error}). It is kept as {aside.name}.")
