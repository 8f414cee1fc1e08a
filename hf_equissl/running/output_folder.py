"""The folder of a run: whether it can be written, whose it is, whether all processes see it, and the space in it."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
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
from ..distributed.signals import MARKER_FILE
from ..encoders.export import check_replaceable
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.pictures import PICTURES_FILE
from ..pretraining.run_record import RECORD_FILE
from ..recipes.recipe import KEPT_RECIPE
from ..utils.files import readable_size
from ..utils.suggestions import RecipeError

if TYPE_CHECKING:
    from ..planning.arithmetic import Schedule

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"
# Seconds that a file may take to appear on a network's file system, and that a stopped run may take to save and end.
_PATIENCE, _SECONDS_TO_END = 10.0, 120.0
REPORT_FILE, CURVES_FILE = "report.md", "losses.png"  # for people, at the end (``run_report``)
KEPT_REPORT = "<!-- Written by hf_equissl at the end of a run. The next run in this folder replaces it. -->"
# What a run writes into its folder, beside checkpoints and results.
_WRITTEN = (
    *(LOCK_FILE, STAGING_FOLDER, ENCODER_FOLDER, MARKER_FILE, RECORD_FILE, "recipe.yaml", "monitor.jsonl"),
    *("monitor.png", "views.png", "finetune.json", "results.json", "results.md", "curves.png", "model", "adapter"),
    *(REPORT_FILE, CURVES_FILE, PICTURES_FILE),
)
_locks: dict[Path, int] = {}


def check_output_folder(folder: str | Path) -> None:
    """Create ``folder`` and make sure that it can be written, and that nothing of somebody else's is in a run's way.

    Raises:
        RecipeError: It is a file, or cannot be created or written; a link or other files lie where a run writes.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        _check_own(folder)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if path.is_file())
        raise RecipeError(f"--output_dir {folder}: {file} is a file. Name a folder.") from error
    except OSError as error:
        raise RecipeError(
            f"--output_dir {folder}: cannot be written ({error.strerror}). Name another folder."
        ) from error
    except ValueError as error:
        raise RecipeError(f"--output_dir {folder}: {error}") from error


def _check_own(folder: Path) -> None:
    """Raise ``ValueError`` for links where a run writes, and for files of others that it would delete."""
    for name in _WRITTEN:
        if (folder / name).is_symlink():
            raise ValueError(f"{name} is a link there, and a run would write to where it leads. Delete it first.")
    saving = folder / STAGING_FOLDER
    found = sorted(path.name for path in saving.iterdir()) if saving.is_dir() else []
    if others := [name for name in found if not name.startswith("checkpoint-")]:
        raise ValueError(f"{STAGING_FOLDER}/ holds {others[0]}, which a run would delete. Move it away.")


def check_result_folder(folder: str | Path, result: str, signs: Sequence[str], also: Sequence[str] = ()) -> None:
    """Make sure that at its end a run replaces only what a run in the same folder has written.

    Args:
        folder: The run's folder.
        result: Name of the folder in it that the run replaces.
        signs: Files of which one shows that a run has written there.
        also: Files of the result beside those of a model.

    Raises:
        RecipeError: Somebody else's files lie there.
    """
    folder = Path(folder)
    try:
        check_replaceable(folder / result, also)
    except ValueError as error:
        raise RecipeError(f"--output_dir {folder}: {error}") from error
    of_run = any((folder / sign).is_file() for sign in signs) or newest_checkpoint(folder) is not None
    if not of_run and (folder / result).is_dir() and any((folder / result).iterdir()):
        raise RecipeError(
            f"--output_dir {folder}: {result}/ holds a model that no run has written there, and would be deleted. Move "
            "it away, or name a new folder."
        )


def check_own_texts(folder: str | Path, report: bool = True) -> None:
    """Make sure that the recipe that a run keeps, and its ``report``, replace none that somebody has written.

    Raises:
        RecipeError: They would.
    """
    for name, beginning in (("recipe.yaml", KEPT_RECIPE), *([(REPORT_FILE, KEPT_REPORT)] if report else [])):
        path = Path(folder) / name
        if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(beginning):
            raise RecipeError(
                f"--output_dir {folder}: {name} there was not written by a run, and would be overwritten. Name a new "
                "folder, or rename the file."
            )


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
    path = Path(folder).resolve() / LOCK_FILE
    if fcntl is None or path in _locks:
        return
    end, told = time.monotonic() + patience, False
    while True:
        handle = _open_lock(path)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process, not of the workers it forks
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                break
        except FileNotFoundError:  # its last owner has just left
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
        os.close(handle)  # try again: the last owner is gone, or deleted the file
    _locks[path] = handle
    with suppress(OSError):  # a full disk, and the text only says who has it
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _open_lock(path: Path) -> int:
    """Open the lock's file, which is made where there is none.

    Raises:
        RecipeError: What lies there is no lock of a run.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if not path.is_symlink() and not path.is_dir():
            raise
        raise RecipeError(f"{path} is a link or a folder, no lock of a run. Move it away.") from error
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or (about.st_size and os.pread(handle, 8, 0) != b"process "):
        os.close(handle)
        raise RecipeError(f"{path} was not written by a run, and would be overwritten. Move it away.")
    return handle


def leave_folder(folder: str | Path) -> None:
    """Give back a folder that ``take_folder`` took."""
    path = Path(folder).resolve() / LOCK_FILE
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
        if folder is not None and Path(folder).resolve() / LOCK_FILE not in before:
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
