"""The folder of a run: whether it can be written, whose it is, whether all processes see it, and the space in it."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints import (
    ENCODER_FOLDER,
    MANIFEST,
    STAGING_FOLDER,
    IncompleteCheckpointError,
    Manifest,
    list_checkpoints,
    newest_checkpoint,
)
from ..distributed.agreement import gather_objects
from ..distributed.collectives import is_main_process, world_size
from ..encoders.export import check_replaceable
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..utils.files import readable_size
from ..utils.suggestions import RecipeError

if TYPE_CHECKING:
    from ..planning.arithmetic import Schedule

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"
# Seconds that a file may take to appear on a network's file system, and a run that was told to stop to save and end.
_PATIENCE, _SECONDS_TO_END = 10.0, 120.0
_locks: dict[Path, int] = {}


def check_output_folder(folder: str | Path) -> None:
    """Create ``folder`` and make sure that it can be written, and the encoder in it at the end.

    Raises:
        RecipeError: It is a file, or cannot be created or written, or other files lie where the encoder goes.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        check_replaceable(folder / ENCODER_FOLDER)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if path.is_file())
        raise RecipeError(f"--output_dir {folder}: {file} is a file. Name a folder.") from error
    except OSError as error:
        raise RecipeError(
            f"--output_dir {folder}: cannot be written ({error.strerror}). Name another folder."
        ) from error
    except ValueError as error:
        raise RecipeError(f"--output_dir {folder}: {error}") from error


def take_folder(folder: str | Path, patience: float = _SECONDS_TO_END) -> None:
    """Take ``folder`` for this run alone, until ``leave_folder`` or the end of this process, however it ends.

    Two runs in one folder would delete what the other one is just saving. A run that still writes there may have been
    told to stop and be saving, so this waits for its end.

    Args:
        folder: The run's folder, which exists.
        patience: Seconds to wait.

    Raises:
        RecipeError: Another run still writes there; its process and host are named.
    """
    path = (Path(folder) / LOCK_FILE).resolve()
    if fcntl is None or path in _locks:
        return
    end, told = time.monotonic() + patience, False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process, not of the workers it forks
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                break
        except FileNotFoundError:  # who had it has just left
            pass
        except (BlockingIOError, PermissionError) as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
            if time.monotonic() > end:
                os.close(handle)
                raise RecipeError(
                    f"--output_dir {folder}: another run still writes there ({holder}). Wait for its end or stop it, "
                    f"or name another folder. If its machine is gone for good, delete {path}."
                ) from error
            if not told:
                logger.warning(f"Another run still writes in {folder} ({holder}). Waiting for its end.")
                told = True
            time.sleep(0.2)
        except OSError:  # a file system without locks
            os.close(handle)
            return
        os.close(handle)  # and another try: who had it is gone, or deleted the file
    _locks[path] = handle
    with suppress(OSError):  # a full disk: it only says who
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def leave_folder(folder: str | Path) -> None:
    """Give back a folder that ``take_folder`` took."""
    path = (Path(folder) / LOCK_FILE).resolve()
    handle = _locks.pop(path, None)
    if handle is not None:
        with suppress(OSError):
            path.unlink()
        os.close(handle)


@contextmanager
def leave_if_refused(folder: str | Path | None) -> Iterator[None]:
    """Give ``folder`` back if the block fails, unless it was taken before."""
    before = set(_locks)
    try:
        yield
    except BaseException:
        if folder is not None and (Path(folder) / LOCK_FILE).resolve() not in before:
            leave_folder(folder)
        raise


def check_shared_folder(folder: str | Path) -> None:
    """Make sure that all processes see the same ``folder``, take it, and clear what a killed run was saving in it.

    All processes have to call it, before anything can fail on one of them alone. They also wait until all of them see
    the newest checkpoint. A single process leaves a folder that does not exist to ``check_output_folder``.

    Raises:
        RecipeError: On every process: as ``check_output_folder`` and ``take_folder``, or some machines, which are
            named, see another folder.
    """
    folder = Path(folder)
    token, problem, newest = f".shared-{secrets.token_hex(8)}", None, None
    if is_main_process():
        try:
            if world_size() > 1 or folder.is_dir():
                check_output_folder(folder)
            if world_size() > 1:
                (folder / token).touch()
            if folder.is_dir():
                take_folder(folder)
                shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
                newest = newest_checkpoint(folder)
        except (RecipeError, OSError) as error:
            problem = str(error)
    told, problem = gather_objects(((token, newest), problem))[0]
    if problem is not None:
        raise RecipeError(problem)
    if world_size() == 1:
        return
    token, newest = told
    hosts = gather_objects((socket.gethostname(), _appears(folder / token)))
    if newest is not None:
        _appears(Path(newest) / MANIFEST)
    if is_main_process():
        (folder / token).unlink(missing_ok=True)
    if blind := sorted({host for host, seen in hosts if not seen}):
        raise RecipeError(
            f"--output_dir {folder}: what {hosts[0][0]} writes there is not seen on {', '.join(blind)}. All machines "
            "of a run write into one folder: name one that they share."
        )


def _appears(path: Path) -> bool:
    """Wait for a file as long as a network's file system may need to show it; returns whether it is there."""
    end = time.monotonic() + _PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return path.exists()


def check_disk_space(folder: str | Path, needed_bytes: int) -> None:
    """Raise ``RecipeError`` if the disk of ``folder`` cannot take ``needed_bytes``."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RecipeError(
            f"--output_dir {folder}: the run will write about {readable_size(needed_bytes)} of checkpoints and "
            f"{readable_size(free)} are free. Free some space, name another disk, or keep fewer checkpoints: "
            "--training.save_total_limit 1, or a larger --training.save_steps."
        )


def estimate_disk_use(args: EquiSSLTrainingArguments, plan: Schedule, checkpoint: int, present: int = 0) -> int:
    """Estimate the bytes that a run will still write: the checkpoints it keeps, one more while the next is written, and
    the encoder.

    Args:
        args: When checkpoints are written, and how many stay.
        plan: Steps of the run.
        checkpoint: Bytes of one checkpoint.
        present: Bytes of the checkpoints that are there already.
    """
    if args.save_strategy == "no":
        return checkpoint
    written = 1
    if args.save_strategy == "epoch" and plan.epochs:
        written = math.ceil(plan.epochs)
    elif plan.steps:
        written = math.ceil(plan.steps / (args.save_steps if args.save_steps >= 1 else args.save_steps * plan.steps))
    kept = min(written, args.save_total_limit or written)
    return max(0, checkpoint * (kept + min(1, written - kept) + 1) - present)


def measure_checkpoints(folder: str | Path) -> int:
    """Add up the bytes of the complete checkpoints in ``folder``."""
    total = 0
    for checkpoint in list_checkpoints(folder):
        with suppress(IncompleteCheckpointError):
            total += Manifest.read(checkpoint).size
    return total
