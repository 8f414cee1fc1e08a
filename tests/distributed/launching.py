"""Start ``training/pretrain.py`` under any engine on two CPU processes, with the accelerate configs that ship."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from tests import processes
from tests.processes import FIXED, PRELOADED, WITH_DEEPSPEED, Child, environment, limit
from tests.processes import start as start_process

LAUNCHERS = (["-m", "accelerate.commands.launch"], ["-m", "accelerate.commands.accelerate_cli", "launch"])
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "training" / "accelerate_configs"
SCRIPT = ROOT / "tests" / "distributed" / "pretrain.py"
# Engine -> (config, what wraps the model).
ENGINES = {
    "single": ("cpu", "EquiSSLForPreTraining"),
    "ddp": ("ddp", "DistributedDataParallel"),
    "fsdp2": ("fsdp2", "FSDPEquiSSLForPreTraining"),
    "zero1": ("deepspeed_zero1", "DeepSpeedEngine1"),
    "zero2": ("deepspeed_zero2", "DeepSpeedEngine2"),
    "zero3": ("deepspeed_zero3", "DeepSpeedEngine3"),
    "zero3+offload": ("deepspeed_zero3_offload", "DeepSpeedEngine3"),
}
TIMEOUT = 400.0  # seconds, on a quiet machine


def command(
    engine: str, *options: str, processes: int = 2, script: Path = SCRIPT, launcher: tuple[str, ...] = ()
) -> list[str]:
    """The words of an ``accelerate launch``; ``options`` go to the script, ``launcher`` to accelerate."""
    config = CONFIGS / f"{ENGINES[engine][0]}.yaml"
    words = [sys.executable, *LAUNCHERS[0], "--config_file", str(config)]
    words += ["--num_processes", str(1 if engine == "single" else processes), "--main_process_port", "0"]
    return [*words, "--mixed_precision", "no", *launcher, str(script), *options]


@dataclass
class Launch:
    """The processes of a run, forked with the variables that a launcher would have given them.

    Attributes:
        ranks: In the order of their ranks.
        stopped: Whether they were told to stop because one failed.
    """

    ranks: list[Child]
    stopped: bool = False

    @property
    def pid(self) -> int:
        """That of the first one."""
        return self.ranks[0].pid

    @property
    def returncode(self) -> int | None:
        """As ``poll``."""
        return self.poll()

    def poll(self) -> int | None:
        """None while one runs, then 0, or 1 if one failed; the others are then told to stop, as torchrun does it."""
        codes = [rank.poll() for rank in self.ranks]
        if any(codes) and not self.stopped:
            self.stopped = True
            for rank in self.ranks:
                rank.terminate()
        return None if None in codes else int(any(codes))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of all; ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.ranks[0].args, timeout or 0.0)
            time.sleep(0.02)
        return code

    def terminate(self) -> None:
        """SIGTERM to all processes."""
        for rank in self.ranks:
            rank.terminate()

    def kill(self) -> None:
        """SIGKILL to all processes and to what they started."""
        for rank in self.ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)


def popen(words: list[str], **options: Any) -> Launch | Child:
    """``processes.popen`` that knows ``accelerate launch``: it forks the processes, without the launcher."""
    launcher = next((start for start in LAUNCHERS if words[1 : 1 + len(start)] == start), None)
    if launcher is None:
        return processes.popen(words, **options)
    given = words[1 + len(launcher) :]
    args = launch_command_parser().parse_args(given)
    own_words = [sys.executable, args.training_script, *args.training_script_args]
    env = options.pop("env", None) or os.environ
    return Launch([processes.popen(own_words, env={**env, **one}, **options) for one in variables_of(given)])


def variables_of(words: list[str]) -> Iterator[dict[str, str]]:
    """The environment that ``accelerate launch`` and torchrun would give each process, by the words behind "launch"."""
    args, defaults, precision = _validate_launch_command(launch_command_parser().parse_args(words))
    single = args.num_processes == 1 and not args.use_deepspeed
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if precision else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        given = prepare_deepspeed_cmd_env(args)[1]
    elif single:
        given = prepare_simple_launcher_cmd_env(args)[1]
    else:
        given = prepare_multi_gpu_env(args)
    given.pop("PYTHONPATH", None)  # it is read at import, and is the folder where the command is given
    if single:
        yield given
        return
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "none"}
    sizes = {"WORLD_SIZE": str(args.num_processes), "LOCAL_WORLD_SIZE": str(args.num_processes)}
    for rank in range(args.num_processes):
        yield {**given, **place, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def needs_deepspeed() -> None:
    """Skip the test where DeepSpeed is not installed; to import it takes seconds, and children do."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")


def free_port() -> str:
    """A port that nobody uses at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(
    engine: str,
    *options: str,
    log: Path | None = None,
    stdout: Path | None = None,
    stderr: Path | None = None,
    processes: int = 2,
    variables: dict[str, str] | None = None,
    **kwargs: Any,
) -> Launch:
    """Fork the processes of a run; what they print is appended to ``log``, or to ``stdout`` and ``stderr``."""
    words = command(engine, *options, processes=processes, **kwargs)
    script = words.index(str(kwargs.get("script", SCRIPT)))
    preloaded = WITH_DEEPSPEED if engine.startswith("zero") else PRELOADED
    ranks = []
    for given in variables_of(words[3:]):
        own = {**given, **FIXED, **(variables or {})}
        own_words = [sys.executable, *words[script:]]
        child = start_process(own_words, log=log, stdout=stdout, stderr=stderr, env=own, preloaded=preloaded)
        ranks.append(child)
    return Launch(ranks)


def run(
    engine: str, *options: str, timeout: float = TIMEOUT, really: bool = False, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """``start`` a run and wait for it; killed with all its processes when time is out.

    Args:
        really: Start it by ``accelerate launch``, which takes new interpreters and 20 CPU seconds more.
    """
    timeout = limit(timeout)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        launch = launch_really if really else start
        process = launch(engine, *options, stdout=out, stderr=err, **kwargs)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            text = f"{out.read_text()[-3000:]}\n{err.read_text()[-3000:]}"
            raise AssertionError(f"{engine}: no end after {timeout:.0f} s\n{text}") from None
        finally:
            kill(process)
        return subprocess.CompletedProcess([engine, *options], code, out.read_text(), err.read_text())


def launch_really(
    engine: str,
    *options: str,
    log: Path | None = None,
    stdout: Path | None = None,
    stderr: Path | None = None,
    variables: dict[str, str] | None = None,
    **kwargs: Any,
) -> subprocess.Popen[bytes]:
    """``accelerate launch`` in a session of its own, with new interpreters."""
    words, files = command(engine, *options, **kwargs), {}
    with ExitStack() as opened:
        for name, path in (("stdout", stdout or log), ("stderr", stderr or log)):
            files[name] = opened.enter_context(path.open("ab")) if path else subprocess.DEVNULL
        return subprocess.Popen(words, cwd=ROOT, env=environment(**(variables or {})), start_new_session=True, **files)  # type: ignore[call-overload]


def kill(process: Launch | subprocess.Popen[bytes]) -> None:
    """End a run, with all that it started: torchrun gives each process a session of its own."""
    if isinstance(process, Launch):
        process.kill()
        return
    for number in (process.pid, *descendants(process.pid)):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def descendants(number: int) -> list[int]:
    """Processes that a process started, and theirs."""
    found = []
    for child in children(number):
        found += [child, *descendants(child)]
    return found


def children(number: int) -> list[int]:
    """Processes that a process started and that still run."""
    found: list[int] = []
    for task in Path(f"/proc/{number}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found
