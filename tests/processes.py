"""Processes that start at once: forks of a server that has imported the libraries, in place of new interpreters.

``start`` and ``run`` take the words of a command of this interpreter (``[sys.executable, "script.py", ...]``, also with
``-m`` or ``-c``). What they start is a process like any other: with a session and process group, a working directory,
an environment and logs of its own, killed and signalled for real, and it ends as Python ends, with the command's code.

It differs from a new interpreter in three ways, for which tests start a few real ones: modules are imported already,
strings have the server's hashes, and ``/proc/PID/cmdline`` is the server's. Variables that libraries read when they are
imported cannot be changed, but for those of the Hub, which are read again; ``start`` refuses other values than the
server's.

Each pytest process has a server, and others where children need DeepSpeed or must not have imported this package; each
starts when it is first needed. A server has one thread and only imports: locks that another thread holds would stay
locked in a fork. When pytest dies, the server kills all that it started; when the server dies, the kernel does.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Listener, wait
from pathlib import Path
from typing import Any

from tests.process_server import HUB_VARIABLES

ROOT = Path(__file__).resolve().parents[1]
# What a server imports; each begins as a fork of the one before.
BARE = ("torch", "datasets", "accelerate")
WITHOUT_US = (*BARE, "transformers.trainer")
# accelerate imports DeepSpeed, where it is installed, in every run.
DEEPSPEED = ("deepspeed",) if find_spec("deepspeed") else ()
PRELOADED = (*WITHOUT_US, *DEEPSPEED, "hf_equissl.running.run")
# The last one is imported when a run under DeepSpeed begins, and with it the whole of torch.compile.
WITH_DEEPSPEED = (*PRELOADED, "deepspeed.runtime.zero.muon.original_muon")
FORK_OF = {WITHOUT_US: BARE, PRELOADED: WITHOUT_US, WITH_DEEPSPEED: PRELOADED}
# Variables with these beginnings are read while Python or a library is imported or loaded. (KMP_ ones, too, but they
# say how the threads of a process share cores, and ours have one.)
READ_AT_IMPORT = (
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_", "DS_", "TORCH_LOGS", "TORCHDYNAMO_", "TORCHINDUCTOR_", "USE_"),
    *("PYTHON", "LD_", "MALLOC_", "OMP_", "MKL_", "OPENBLAS_", "CUDA_", "TOKENIZERS_"),
)
# OpenCV puts its folder into LD_LIBRARY_PATH when the tests of corruptions import it; nothing here is found by that.
READ_WHEN_USED = ("TORCHINDUCTOR_CACHE_DIR", "LD_LIBRARY_PATH", *HUB_VARIABLES)
NOWHERE = Path(os.devnull)
# No model or data set that somebody has loaded before, and only CPUs.
FIXED = {"HF_HOME": f"{tempfile.gettempdir()}/hf-home-{os.getpid()}", "DS_ACCELERATOR": "cpu"}
# As it is when pytest starts, whatever a test changes later.
ENVIRONMENT = {**os.environ, **FIXED}


class Child:
    """A process that a server started; the names are those of ``subprocess.Popen``."""

    def __init__(self, server: Server, args: Sequence[str], pid: int) -> None:
        self.args = list(args)
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.exit_code(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self._server.wait(left)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that imports once and forks on request.

    Args:
        modules: What it imports.
        parent: A server of which it is a fork; by default it is a new interpreter.
    """

    def __init__(self, modules: Sequence[str], parent: Server | None = None) -> None:
        self.log = Path(tempfile.mkstemp(prefix="processes-", suffix=".log")[1])
        self._codes: dict[int, int] = {}
        self._lock = threading.Lock()
        self.process: Child | subprocess.Popen[bytes]
        with Listener(family="AF_UNIX") as listener:
            words = [sys.executable, "-m", "tests.process_server", str(listener.address), *modules]
            if parent:
                self.process = parent.start(words, ROOT, ENVIRONMENT, NOWHERE, self.log, self.log)
            else:
                quiet = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # Arrow's allocator would start a thread
                with self.log.open("wb") as log:
                    self.process = subprocess.Popen(
                        words, cwd=ROOT, env=ENVIRONMENT | quiet, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True,
                    )  # fmt: skip
            self._connection = listener.accept()
        atexit.register(self.close)

    def start(
        self, words: Sequence[str], cwd: Path, env: Mapping[str, str], stdin: Path, stdout: Path, stderr: Path
    ) -> Child:
        """Fork a process that becomes the command ``words``; its output is appended to the last two files."""
        with self._lock:
            self._send((list(words), str(cwd), dict(env), str(stdin), str(stdout), str(stderr)))
            while (message := self._receive())[0] != "started":
                self._codes[message[1]] = message[2]
        return Child(self, words, message[1])

    def exit_code(self, pid: int) -> int | None:
        """The code of a process that has ended, None while it runs; a code is handed out once."""
        with self._lock:
            while self._connection.poll():
                _, ended, code = self._receive()
                self._codes[ended] = code
            return self._codes.pop(pid, None)

    def wait(self, timeout: float | None) -> None:
        """Until some process has ended, or ``timeout`` seconds, or a moment in which another thread may have asked."""
        wait([self._connection], 1.0 if timeout is None else min(timeout, 1.0))

    def close(self) -> None:
        """End the server, and with it all that it started."""
        self._connection.close()
        self.process.wait()
        self.log.unlink(missing_ok=True)
        shutil.rmtree(FIXED["HF_HOME"], ignore_errors=True)

    def _send(self, request: Any) -> None:
        try:
            self._connection.send(request)
        except OSError as error:
            raise self._dead() from error

    def _receive(self) -> tuple[Any, ...]:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._dead() from error

    def _dead(self) -> RuntimeError:
        server.cache_clear()
        return RuntimeError(f"the server of processes has ended:\n{self.log.read_text(errors='replace')[-3000:]}")


@functools.cache
def server(*modules: str) -> Server:
    """The server of this pytest process that has imported ``modules``."""
    return Server(modules, server(*FORK_OF[modules]) if modules in FORK_OF else None)


def start(
    words: Sequence[str],
    *,
    log: Path | None = None,
    stdin: Path | None = None,
    stdout: Path | None = None,
    stderr: Path | None = None,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    preloaded: Sequence[str] = PRELOADED,
) -> Child:
    """Start a command of this interpreter, in a session of its own.

    Args:
        words: As for ``subprocess.Popen``.
        stdin: File that it reads.
        log: File to which output and errors are appended; ``stdout`` and ``stderr`` name one for each.
        env: Its whole environment, by default ``environment()``.
        preloaded: Modules that it finds imported.

    Raises:
        ValueError: For another interpreter, or a variable that the server has read with another value.
    """
    if words[0] != sys.executable:
        raise ValueError(f"{words[0]} is not {sys.executable}: use subprocess")
    env = environment() if env is None else env
    check_environment(env)
    files = (stdin or NOWHERE, stdout or log or NOWHERE, stderr or log or NOWHERE)
    return server(*preloaded).start(words, cwd, env, *files)


def popen(
    words: Sequence[str], *, env: Mapping[str, str] | None = None, stdout: Any = None, stderr: Any = None, **_: Any
) -> Child:
    """``start`` in place of ``subprocess.Popen``, for code that starts commands of this interpreter; as there, files
    are those of this process where none are given.
    """
    out = _path(1 if stdout is None else stdout)
    err = out if stderr == subprocess.STDOUT else _path(2 if stderr is None else stderr)
    return start(words, stdout=out, stderr=err, env={**(os.environ if env is None else env), **FIXED})


def _path(file: Any) -> Path:
    """Path of an open file; of one without a name, the kernel's own, to whose end both processes will write."""
    number = file if isinstance(file, int) else file.fileno()
    link = Path(f"/proc/{os.getpid()}/fd/{number}")
    if (named := link.readlink()).is_file():
        return named
    fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_APPEND)
    return link


def environment(**more: str) -> dict[str, str]:
    """The variables of this process and ``more``, with an empty cache of the Hub."""
    return {**os.environ, **FIXED, **more}


def check_environment(env: Mapping[str, str]) -> None:
    """Refuse what only a new interpreter can have."""
    for name in sorted({*env, *ENVIRONMENT}):
        if name in READ_WHEN_USED or not name.startswith(READ_AT_IMPORT):
            continue
        if env.get(name) != ENVIRONMENT.get(name):
            raise ValueError(
                f"{name} is {env.get(name)!r}, and the server was started with {ENVIRONMENT.get(name)!r}; libraries "
                "read it when they are imported: start a new interpreter with subprocess"
            )


def limit(seconds: float) -> float:
    """A time limit for what takes far fewer ``seconds`` on a quiet machine: longer where others compute, too."""
    return seconds * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Ask again and again until ``condition`` is met; TimeoutError after ``seconds`` of a quiet machine."""
    end = time.monotonic() + limit(seconds)
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not met after {limit(seconds):.0f} s")
        time.sleep(0.005)


def run(
    words: Sequence[str], *, timeout: float = 300.0, text_in: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """``start`` a command, wait for it, and read what it printed; killed with its whole session when time is out.

    Args:
        timeout: Seconds on a quiet machine, see ``limit``.
        text_in: What it reads as its input.
    """
    timeout = limit(timeout)
    with tempfile.TemporaryDirectory() as folder:
        given, out, err = (Path(folder, name) for name in ("in", "out", "err"))
        given.write_text(text_in)
        child = start(words, stdin=given, stdout=out, stderr=err, **options)
        try:
            child.wait(timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                text = f"{out.read_text(errors='replace')[-3000:]}\n{err.read_text(errors='replace')[-3000:]}"
                raise AssertionError(f"{' '.join(words)}: no end after {timeout:.0f} s\n{text}") from None
            raise
        printed = [path.read_text(errors="replace") for path in (out, err)]
        return subprocess.CompletedProcess(list(words), child.wait(), *printed)
