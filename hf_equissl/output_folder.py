"""The folder of a run: whether it can be written, whether all processes see the same one, and whether it has room."""

from __future__ import annotations

import json
import math
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoints import ENCODER_FOLDER, STAGING_FOLDER
from .distributed import gather_objects, is_main_process, world_size
from .hub.export import check_replaceable
from .strict import RecipeError
from .training_arguments import EquiSSLTrainingArguments

if TYPE_CHECKING:
    from .run_plan import Schedule

GIB = 1024**3
_PATIENCE = 10.0  # seconds


def trained_steps(checkpoint: str) -> int:
    """The step at which a complete checkpoint was written."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def check_output_folder(folder: str | Path) -> None:
    """Create ``folder`` and make sure that it can be written, and the encoder in it at the end.

    Raises:
        RecipeError: it is a file, or cannot be created or written, or files of others lie where the encoder goes.
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


def check_shared_folder(folder: str | Path) -> None:
    """Make sure that all processes see the same ``folder``, and clear what a killed run was saving in it.

    All processes have to call it, before anything can fail on one of them alone.

    Raises:
        RecipeError: on every process: as ``check_output_folder``, or it names the machines that see another folder.
    """
    folder = Path(folder)
    if is_main_process():
        shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
    if world_size() == 1:
        return
    token, problem = f".shared-{secrets.token_hex(8)}", None
    if is_main_process():
        try:
            check_output_folder(folder)
            (folder / token).touch()
        except (RecipeError, OSError) as error:
            problem = str(error)
    token, problem = gather_objects((token, problem))[0]
    if problem is not None:
        raise RecipeError(problem)
    hosts = gather_objects((socket.gethostname(), _appears(folder / token)))
    if is_main_process():
        (folder / token).unlink(missing_ok=True)
    if blind := sorted({host for host, seen in hosts if not seen}):
        raise RecipeError(
            f"--output_dir {folder}: what {hosts[0][0]} writes there is not seen on {', '.join(blind)}. All machines "
            "of a run write into one folder: name one that they share."
        )


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes while one waits for it as long as a network's file system may need."""
    end = time.monotonic() + _PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return path.exists()


def check_disk_space(folder: str | Path, needed_bytes: int) -> None:
    """Raise ``RecipeError`` if the disk of ``folder`` cannot take ``needed_bytes``."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RecipeError(
            f"--output_dir {folder}: the run will write about {needed_bytes / GIB:.2f} GiB of checkpoints and "
            f"{free / GIB:.2f} GiB are free. Free some space, name another disk, or keep fewer checkpoints: "
            "--training.save_total_limit 1, or a larger --training.save_steps."
        )


def disk_need(args: EquiSSLTrainingArguments, plan: Schedule, checkpoint: int) -> int:
    """Checkpoints that will lie there at once, one more while the next is written, and the encoder."""
    if args.save_strategy == "no":
        return checkpoint
    written = 1
    if args.save_strategy == "epoch" and plan.epochs:
        written = math.ceil(plan.epochs)
    elif plan.steps:
        written = math.ceil(plan.steps / (args.save_steps if args.save_steps >= 1 else args.save_steps * plan.steps))
    kept = min(written, args.save_total_limit or written)
    return checkpoint * (kept + min(1, written - kept) + 1)
