"""DeepSpeed's one compiled operation, made ready once per machine: a compile that was killed hangs all later runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

from tests.processes import environment

OPERATION = "deepspeed_shm_comm"
STALE = 600.0  # seconds; it compiles in half a minute
COMPILE = (
    "from deepspeed.accelerator import get_accelerator as here;"
    "here().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
)


@pytest.fixture(scope="session", autouse=True)
def _deepspeed_is_ready(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile it in one process while other workers wait; a run that is cut off leaves nothing behind."""
    if find_spec("deepspeed") is None:
        return
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(OPERATION, verbose=False))
    with FileLock(folder.parent / f"{OPERATION}.tests.lock", timeout=2 * STALE):
        if (folder / f"{OPERATION}.so").is_file() and not is_stale(folder / "lock"):
            return
        shutil.rmtree(folder, ignore_errors=True)
        compiling = subprocess.Popen([sys.executable, "-c", COMPILE], env=environment(), start_new_session=True)
        try:
            if code := compiling.wait(timeout=STALE):
                pytest.fail(f"DeepSpeed's {OPERATION} does not compile: exit code {code}")
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(compiling.pid, signal.SIGKILL)  # with the compiler
            shutil.rmtree(folder, ignore_errors=True)
            raise


def is_stale(lock: Path) -> bool:
    """Whether a compile took ``lock`` so long ago that it must be dead."""
    return lock.exists() and time.time() - lock.stat().st_mtime > STALE
