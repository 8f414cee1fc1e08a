"""From a training run to the Hub: its repository is built from its folder and pushed, at saves or at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..hub.push import create_repository, push_repository
from ..hub.repository import build_repository

logger = logging.get_logger(__name__)
PUBLISHING_PREFIX = ".publishing-"


class Publisher:
    """Publishes one run, one upload at a time; ``open`` comes before ``start``.

    Args:
        run_dir: The run's folder. The repository is built from its newest complete checkpoint, in a hidden folder
            that is removed after the upload.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.repo_id = ""
        self._rights: dict[str, Any] = {}
        self._revision: str | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="publish")

    def open(self, name: str, *, token: str | None, revision: str | None, private: bool | None) -> str:
        """Create the repository where it does not exist.

        Args:
            name: "model" or "name/model".
            token: ``None``: that of ``hf auth login`` or ``HF_TOKEN``. It stays in memory.
            revision: Branch that ``start`` pushes to; ``None``: the main branch.
            private: Whether the repository is created as private.

        Returns:
            Its full id, "name/model".

        Raises:
            PublishError: It cannot be created, with the reason.
        """
        self.repo_id = create_repository(name, private=private, token=token)
        self._rights, self._revision = {"token": token, "private": private}, revision
        return self.repo_id

    def callback(self, start: Callable[[str], Future[CommitInfo]]) -> PublishCallback:
        """Make the callback that publishes with ``start`` after each checkpoint."""
        return PublishCallback(start)

    def start(self, commit_message: str, *, revision: str | None = None, **options: Any) -> Future[CommitInfo]:
        """Build the repository now and upload it in the background.

        Args:
            commit_message: Title of the commit.
            revision: Branch, in place of that of ``open``.
            **options: Arguments of ``build_repository``.

        Raises:
            ValueError: The repository cannot be built. The future holds what the upload raises.
        """
        place = Path(tempfile.mkdtemp(dir=self.run_dir, prefix=PUBLISHING_PREFIX))
        try:
            # Models that are built draw random weights first: training must not notice.
            with torch.random.fork_rng(devices=[]):
                built = build_repository(self.run_dir, place / "repository", repo_id=self.repo_id, **options)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return self._worker.submit(self._push, built, commit_message, revision or self._revision)

    def _push(self, built: Path, commit_message: str, revision: str | None) -> CommitInfo:
        try:
            return push_repository(
                built, self.repo_id, revision=revision, commit_message=commit_message, **self._rights
            )
        finally:
            shutil.rmtree(built.parent, ignore_errors=True)


class PublishCallback(TrainerCallback):
    """Publishes after each checkpoint; a failure is a warning, and the next save tries again.

    A save during the upload of an earlier one is not published; the last one then is at the end of training.

    Args:
        start: Builds the repository and begins its upload, given the commit's message.
    """

    def __init__(self, start: Callable[[str], Future[CommitInfo]]) -> None:
        self._start = start
        self._running: Future[CommitInfo] | None = None
        self._left = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publish the checkpoint that was written, unless the run was asked to stop: an upload takes its time."""
        stopped = control.should_training_stop and state.global_step < state.max_steps
        if stopped or not state.is_world_process_zero:
            return
        self._left = self._running is not None and not self._running.done()
        if self._left:
            logger.info("Step %d is not published yet: an earlier upload is still running.", state.global_step)
        else:
            self._publish(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish the last checkpoint if it was left out; the Trainer waits for uploads after this."""
        if state.global_step < state.max_steps:  # asked to stop: there is no time for it
            return
        if self._left and self._running is not None:
            wait([self._running])
            self._publish(state.global_step)

    def _publish(self, step: int) -> None:
        try:
            self._running = self._start(f"Training in progress, step {step}")
        except Exception as error:  # whatever it is, hours of training weigh more
            _warn(step, error)
        else:
            self._running.add_done_callback(lambda done: _warn(step, done.exception()))


def _warn(step: int, error: BaseException | None) -> None:
    if error is not None:
        logger.warning("Step %d was not published, training goes on, and the next save tries again. %s", step, error)
