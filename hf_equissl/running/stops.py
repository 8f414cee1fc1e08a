"""What stops a run for good: one process says it for all, in words that help, and all end within seconds."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar, cast

import torch

from ..checkpoints import CheckpointError, newest_checkpoint
from ..data import ImageDecodeError, TooManyBadImages
from ..distributed.agreement import answer_others, end_process, gather_objects, lost_a_process, speaks_for_all
from ..distributed.signals import STOP_SIGNALS, forget_workers
from ..hub.publishable import PublishError
from ..pretraining.loss_history import NonFiniteLossError
from ..utils.files import readable_size
from ..utils.suggestions import RecipeError

logger = logging.getLogger(__name__)
T = TypeVar("T")
_FAILED = "failed"

SHARED_MEMORY = Path("/dev/shm")
# Seconds until a process that failed is ended, whatever a broken process group or a library's thread still waits for.
END_SECONDS = 20
ASKED_CODES = (1, 2)  # with these the processes ask each other who speaks; with all others the first one does
ASKING_SECONDS = 5.0  # seconds that the others may take to notice that one failed, and to ask who speaks


class ExportError(RuntimeError):
    """The encoder of a finished run could not be written; the same on every process."""


class LoaderDiedError(RuntimeError):
    """A process that loads images was killed or crashed."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


# Errors that all processes raise together: the first one speaks.
AGREED = (CheckpointError, ExportError, NonFiniteLossError, TooManyBadImages)
# Errors whose message is for the user: they need no traceback.
STOPS = (*AGREED, ImageDecodeError, LoaderDiedError, LostProcessError, PublishError)


@contextmanager
def explain_stops(output_dir: str | Path | None) -> Iterator[None]:
    """Explain the two faults that come from outside: what they are, what is left of the run, and how it goes on.

    Where something else fails on one process of several, the others will lose it: this one speaks for them.

    Raises:
        LoaderDiedError, LostProcessError: In place of what PyTorch raises for them.
    """
    try:
        yield
    except Exception as error:
        forget_workers()
        if lost_a_process(error):
            raise LostProcessError(_explain_lost_process(error, output_dir)) from error
        if _is_loader(error):
            raise LoaderDiedError(_explain_dead_loader(error, output_dir)) from error
        if not isinstance(error, STOPS):
            speaks_for_all()
        raise


@contextmanager
def refuse_errors(where: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn what libraries raise of settings into one sentence; the error itself stays its cause.

    Args:
        where: The settings that are being read, for the sentence.
        unless: Whether it is too late for that, because training has begun.

    Raises:
        RecipeError: In place of every error but a lack of memory, those of ``STOPS``, and those that ``explain_stops``
            explains.
    """
    try:
        yield
    except (RecipeError, MemoryError, torch.OutOfMemoryError, *STOPS):
        raise
    except Exception as error:
        if unless() or lost_a_process(error) or _is_loader(error):
            raise
        logger.debug("%s", where, exc_info=error)
        raise RecipeError(f"{where}: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    """Return the first line of an error; with its kind where the line alone would not say that it is one."""
    lines = str(error).strip().splitlines() or [""]
    # The error of a loading process comes with its traceback.
    first = lines[-1] if "Original Traceback" in str(error) else lines[0]
    if isinstance(error, ValueError | ImportError) and first:
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def run_on_all(prepare: Callable[[], T], expected: tuple[type[Exception], ...] = (RecipeError,)) -> T:
    """Do the same on all processes; if it fails on one, it fails on all of them, and none waits for another.

    Args:
        prepare: What to do.
        expected: Errors whose message is for the user.

    Returns:
        What ``prepare`` returns.

    Raises:
        RecipeError: With the message of the first process that raised an expected error.
    """
    result, failure = None, None
    try:
        result = prepare()
    except expected as error:
        failure = error
    # With a tag, since the others may still be in an exchange of ``prepare``, and take this for its answer.
    told = gather_objects((_FAILED, str(failure)) if failure is not None else None)
    failures = [value[1] for value in told if isinstance(value, tuple) and value[0] == _FAILED]
    if failures:
        raise RecipeError(failures[0]) from failure
    return cast(T, result)


def end(code: int) -> NoReturn:
    """End this process with an exit code, at the latest ``END_SECONDS`` from now if it is not 0.

    The launcher, which ends the rest of a run when one process ends, finds no handler that could change the code. The
    process that the others have to ask who speaks for all stays until they have asked.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if code:
        watch = threading.Timer(END_SECONDS, os._exit, (code,))
        watch.daemon = True
        watch.start()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # in case a library keeps Python's threads from running
        signal.alarm(2 * END_SECONDS)
        if code in ASKED_CODES:
            answer_others(ASKING_SECONDS)
    end_process(code)


def _is_loader(error: Exception) -> bool:
    """Whether ``error`` says that a worker is gone: by PyTorch's words, or because its batch cannot be fetched."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    lost = isinstance(error, (ConnectionError, EOFError))
    return lost and any(file.endswith("torch/utils/data/dataloader.py") for file in files)


def _explain_lost_process(error: Exception, output_dir: str | Path | None) -> str:
    said = re.sub(r"^\[.*?\]\s*", "", str(error).strip().splitlines()[0]).partition(". ")[0]
    return (
        f"Another process of this run has ended or cannot be reached ({said}), so all of them end. If it did not say "
        "why itself, it was killed: by hand, by the scheduler, or for lack of memory (`dmesg` says so). "
        f"{_say_what_is_left(output_dir)}"
    )


def _explain_dead_loader(error: Exception, output_dir: str | Path | None) -> str:
    said = re.sub(r"\s+", " ", (str(error).strip() or type(error).__name__).splitlines()[0]).rstrip(".")
    return (
        f"A process that loads images died: {said}. Usual causes: the machine or the container was out of memory and "
        f"killed it (`dmesg` says so), or shared memory was full ({_shared_memory()}). Remedies: fewer "
        "--training.dataloader_num_workers, more memory; in Docker, --shm-size or --ipc=host. "
        f"{_say_what_is_left(output_dir)}"
    )


def _shared_memory() -> str:
    if not SHARED_MEMORY.is_dir():
        return f"there is no {SHARED_MEMORY} here"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return f"{SHARED_MEMORY} has {readable_size(usage.total)}, of which {readable_size(usage.free)} are free now"


def _say_what_is_left(output_dir: str | Path | None) -> str:
    last = None if output_dir is None else newest_checkpoint(output_dir)
    if last is None:
        return "No checkpoint was written before."
    return f"Last complete checkpoint: {last}. The same command goes on from there."
