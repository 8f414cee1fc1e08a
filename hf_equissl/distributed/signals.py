"""A request to stop, SIGTERM, SIGUSR1 or SIGHUP: remembered until the run can stop without losing anything.

Needs no torch, so that a run listens from its first moment.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on
MARKER_FILE = "PREEMPTED"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # the last one: the terminal is gone
# A scheduler signals every process of a job, and a launcher among them passes it on: that is one request.
ONE_REQUEST_SECONDS = 5.0
# Processes that become the parent of those whose own has ended.
_ADOPTERS = ("systemd", "init", "tini", "dumb-init", "slurmstepd", "containerd-shim", "docker-init")
_PR_SET_PDEATHSIG = 1  # its number in linux/prctl.h
_BORN = os.getpid(), os.getppid()  # read before anything that takes time
# Seconds that a process goes on without its launcher: before training there is nothing to save, in training there is.
UNTIL_TRAINING, IN_TRAINING = 5.0, 600.0
_training = threading.Event()


class Preempted(BaseException):
    """The run was asked to stop and did; the same command goes on. As ``KeyboardInterrupt``, it is no ``Exception``."""


class Signals:
    """Catches SIGTERM, SIGUSR1 and SIGHUP while it is entered, and restores the handlers that were there before.

    The first one is remembered (``received``); a loop looks at it where it can stop. Before training there is nothing
    to lose, so ``Preempted`` is raised at once, if this is the only process: one of several cannot tell a scheduler
    from a launcher that ends the survivors of a process that failed. A second signal, ``ONE_REQUEST_SECONDS`` or more
    after the first, ends the process at once with ``EXIT_PREEMPTED``.

    A SIGHUP that is ignored stays so: ``nohup`` started the run. Outside of the main thread, where Python does not
    allow handlers, nothing is caught.

    Args:
        output_dir: Where the marker file goes, since launchers hide exit codes.

    Attributes:
        output_dir: Folder of the marker file, which may be set later.
        received: Name of the first signal, or ``None``.
        raises: Whether a signal raises ``Preempted``; the Trainer switches it off when training begins.
    """

    def __init__(self, output_dir: str | Path | None = None) -> None:
        self.received: str | None = None
        self.raises = int(os.environ.get("WORLD_SIZE", "1")) == 1
        self.output_dir = output_dir
        self._process = os.getpid()
        self._since = 0.0
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def begin_training(self) -> None:
        """Note that there is something to save from now on: signals and a launcher's end leave time for it."""
        self.raises = False
        _training.set()

    def leave_marker(self, text: str) -> None:
        """Write the marker file, which begins with the signal's name, for whoever decides to start the run again."""
        if self.output_dir is not None and Path(self.output_dir).is_dir():
            with contextlib.suppress(OSError):  # on a full disk the exit code must do
                flags = (
                    os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
                )  # a link is somebody else's
                with open(os.open(Path(self.output_dir) / MARKER_FILE, flags, 0o666), "w", encoding="utf-8") as file:
                    file.write(f"{text}\n")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, which handles its own signals
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self._since = name, time.monotonic()
            if self.raises:
                text = f"{name} before the first step: nothing to save."
                self.leave_marker(text)
                raise Preempted(f"{text} The same command starts again.")
        elif time.monotonic() - self._since >= ONE_REQUEST_SECONDS:
            text = f"{name} after {self.received}: stopped at once."
            self.leave_marker(text)
            # Not print: the signal may have come while something was being printed.
            os.write(2, f"\npreempted: {text} The same command goes on from the last complete checkpoint.\n".encode())
            os._exit(EXIT_PREEMPTED)


def ignore_stop_signals(start: Callable[[int], None] | None, worker: int) -> None:
    """Let a worker of a data loader ignore signals, which a scheduler sends to workers, too; then call ``start``.

    A worker that died of one would end the run; so it lives until its loader ends it, or ``kill_workers`` does. It is
    born with the signals held back (``hold_stop_signals``): one that came meanwhile is ignored, too.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if start is not None:
        start(worker)


@contextlib.contextmanager
def hold_stop_signals() -> Iterator[None]:
    """Hold back signals inside: they arrive afterwards; processes that are started inside inherit the state."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guard_workers(loader: Any) -> Any:
    """Let the workers of a ``DataLoader``, plain or accelerate's, outlive a signal, and end with this process."""
    base = getattr(loader, "base_dataloader", loader)
    if base.num_workers:
        base.worker_init_fn = partial(ignore_stop_signals, base.worker_init_fn)
        # Between its start and its first line a worker would still die of a signal.
        base._get_iterator = hold_stop_signals()(base._get_iterator)
        atexit.register(kill_workers)
    return loader


def end_workers(loader: Any) -> None:
    """End the workers that a ``DataLoader``, plain or accelerate's, keeps from epoch to epoch.

    Left to the garbage collector, each takes ten seconds: it closes the queues by which they would be told to end, and
    torch waits twice, since they ignore its SIGTERM.
    """
    base = getattr(loader, "base_dataloader", loader)
    iterator = getattr(base, "_iterator", None)
    if iterator is not None:
        base._iterator = None
        iterator._shutdown_workers()


def forget_workers() -> None:
    """Let the deaths of workers go unheard from now on, since the run ends.

    torch's handler raises for each of them, wherever Python happens to be: in what explains the first one, too.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def kill_workers() -> None:
    """End the workers that ignore signals, for which Python would wait for ever at its exit."""
    forget_workers()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def listen_to_launcher() -> None:
    """Let the end of the launcher that started this process count as SIGTERM, also one that has come already.

    `accelerate launch` with one process dies of every signal, and torchrun of SIGUSR1. The run would go on without its
    launcher, beside the one that the scheduler starts next; or wait for ever for processes that were never started.
    """
    launched = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))
    if not launched or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    adopted = os.getpid() == _BORN[0] and os.getppid() != _BORN[1]
    if adopted or not _is_launcher(parent):
        _end_without_launcher()
    # A signal does not reach Python while a library waits for other processes.
    threading.Thread(target=_outlive, args=(parent,), name="launcher", daemon=True).start()


def _is_launcher(pid: int) -> bool:
    """Return whether the parent of a process of torchrun may be torchrun or its script, and does not adopt orphans."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True  # nobody knows what else may set the variables of a launcher
    if pid == 1:
        # In a container torchrun itself may be process 1.
        return any(word in _read_process(pid, "cmdline") for word in ("python", "torch", "accelerate"))
    return _read_process(pid, "comm").strip() not in _ADOPTERS


def _read_process(pid: int, what: str) -> str:
    try:
        return Path(f"/proc/{pid}/{what}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "python" if what == "cmdline" else ""  # the system hides it from this process


def _outlive(parent: int) -> None:
    """Wait for the end of the launcher; then end this process where it does not end by itself."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(UNTIL_TRAINING)
    if _training.is_set():
        time.sleep(IN_TRAINING)
    _end_without_launcher()


def _end_without_launcher() -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"\npreempted: the launcher of this run is gone. The same command goes on.\n")
    os._exit(EXIT_PREEMPTED)


def speaks_for_failure() -> bool:
    """Return whether this process is the one that says what stopped all of them.

    Mistakes in words are answered before torch is imported and the processes know each other: one per machine speaks.
    """
    agreement = sys.modules.get("hf_equissl.distributed.agreement")
    if agreement is None or agreement.world_size() == 1:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return bool(agreement.speaks_for_all())


def end_command(code: int) -> NoReturn:
    """End a command that trains, with ``running.stops.end`` if that was imported already; nothing is imported here."""
    end = getattr(sys.modules.get("hf_equissl.running.stops"), "end", None)
    if end is not None:
        end(code)
    if "torch" in sys.modules:  # a signal may have come in the middle of an import: nothing can be taken down in order
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def remove_marker(output_dir: str | Path) -> None:
    """Delete the marker of an earlier stop, since the run goes on."""
    with contextlib.suppress(OSError):  # whether the folder can be written is found out later
        (Path(output_dir) / MARKER_FILE).unlink()
