"""The server of ``processes``: imports, then forks a process for each request and says how it ended."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import runpy
import signal
import sys
import threading
import types
from contextlib import suppress
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1
# What libraries read when they are imported, and a fork reads again where it is another than the server's.
HUB_VARIABLES = (
    *("HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_MODULES_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
)


def serve(connection: Connection) -> list[str]:
    """Fork on request and tell who ended. Returns in each child, with the words of the command that it is to become."""
    running: dict[int, int] = {}  # descriptor of a process -> its number
    while True:
        for ready in wait([connection, *running]):
            if isinstance(ready, int):
                os.close(ready)
                pid = running.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(BrokenPipeError):
                    connection.send(("ended", pid, code))
                continue
            try:
                request = connection.recv()
            except (EOFError, ConnectionError):
                kill_all(list(running.values()))
            pid = os.fork()
            if not pid:
                connection.close()
                return settle_in(*request)
            running[os.pidfd_open(pid)] = pid
            connection.send(("started", pid))


def kill_all(groups: list[int]) -> NoReturn:
    """End all sessions that were started, and this process."""
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    os._exit(0)


def settle_in(words: list[str], cwd: str, env: dict[str, str], stdin: str, stdout: str, stderr: str) -> list[str]:
    """Make a fork what a new process is: alone in its session, with its own files, folder and environment."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(cwd)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    if any(before.get(name) != env.get(name) for name in HUB_VARIABLES):
        read_hub_variables()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they put in the background ignore it
    sys.modules["numpy"].random.seed()  # Python seeds its own generator anew in a fork; torch begins with a fixed seed
    return words


def read_hub_variables() -> None:
    """Let libraries read again where the Hub and their caches are."""
    constants = importlib.reload(importlib.import_module("huggingface_hub.constants"))
    importlib.import_module("huggingface_hub.hf_api").api.endpoint = constants.ENDPOINT
    importlib.reload(importlib.import_module("datasets.config"))
    modules = os.environ.get("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules"))
    for name in ("transformers.utils.hub", "transformers.dynamic_module_utils"):
        if name in sys.modules:
            vars(sys.modules[name])["HF_MODULES_CACHE"] = modules


def become(words: list[str]) -> None:
    """Run what comes behind the interpreter's name as the interpreter would, in a ``__main__`` of its own."""
    kind, *rest = words[1:]
    if kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.path[0], sys.argv = str(Path(kind).resolve().parent), [kind, *rest]
        main.__file__ = os.path.abspath(kind)
        code = compile(Path(kind).read_bytes(), main.__file__, "exec")
    exec(code, main.__dict__)


class Fork:
    """A process that ``fork`` has made; the names are those of ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it runs. To be asked until there is one."""
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)


def fork(words: list[str]) -> Fork:
    """Start a command from a process that a server has started, as long as that has one thread only."""
    pid = os.fork()
    if not pid:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run(words)
    return Fork(pid)


def run(words: list[str]) -> NoReturn:
    """Become a command, and end as it does."""
    try:
        become(words)
    except BaseException as error:
        end(error)
    end(None)


def end(error: BaseException | None) -> NoReturn:
    """End as the interpreter does, but for taking its modules apart, which lasts a second for so many."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            sys.stderr.write(f"{error.code}\n")
    elif error is not None:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError):  # closed
            stream.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def main(address: str, *modules: str) -> NoReturn:
    """Import ``modules`` and serve; each fork runs its command and ends."""
    connection = Client(address)
    gc.disable()  # nothing that is imported goes away
    for name in modules:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(f"importing {', '.join(modules)} started a thread: a fork would not be safe")
    gc.freeze()  # the collector of a fork then leaves the shared memory alone
    gc.enable()
    words = serve(connection)
    run(words)


if __name__ == "__main__":
    main(*sys.argv[1:])
