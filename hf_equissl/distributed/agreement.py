"""What the processes of one run tell each other outside the loss: who writes, who failed, who asked to stop."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from .collectives import T, _is_initialized, is_main_process, rank, world_size

_LEFT_TO_MAIN = itertools.count()
# Keys of the rendezvous store: the rank that speaks for all, and how many processes have asked who does.
_SPEAKER, _ASKED = "hf_equissl/speaker", "hf_equissl/asked"
_asked: list[str] = []  # holds the own rank once this process has asked


def end_process(code: int) -> NoReturn:
    """Close the process group, if there is one, and end this process.

    With several processes the interpreter is not taken down in order: wrappers and DeepSpeed keep process groups, whose
    threads may still use it, and the process would abort after all its work is done.
    """
    several = world_size() > 1
    if _is_initialized():
        dist.destroy_process_group()
    if several:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def leave_to_main(work: Callable[[], T]) -> T | None:
    """Do ``work`` on the main process while the others wait, however long it takes. All processes have to call it.

    A barrier of the process group would end them after its timeout, and an upload may take longer.

    Returns:
        What ``work`` returns; ``None`` on the other processes.
    """
    if world_size() == 1:
        return work()
    store, key = _get_default_store(), f"hf_equissl/left_to_main/{next(_LEFT_TO_MAIN)}"
    if is_main_process():
        try:
            return work()
        finally:
            store.set(key, "over")
    while not store.check([key]):  # not store.wait, which no signal interrupts
        time.sleep(0.2)
    return None


def first_message(message: str | None) -> str | None:
    """Give all processes the message of the lowest rank that has one, or ``None``. All have to call it."""
    return next((text for text in gather_objects(message) if text is not None), None)


def gather_objects(value: Any) -> list[Any]:
    """Give all processes the values of all of them, by rank. They are pickled: small ones only. All have to call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def lost_a_process(error: BaseException) -> bool:
    """Return whether ``error`` is what torch.distributed raises when another process has ended or cannot be reached."""
    text = str(error)
    spoken_by_backend = isinstance(error, dist.DistError) or "/gloo/" in text or "ProcessGroup" in text
    return isinstance(error, RuntimeError) and world_size() > 1 and spoken_by_backend


def speaks_for_all(patience: float = 5.0) -> bool:
    """Return whether this process is the first that asked, and so says for all what stopped them.

    It is, too, where nobody can be asked: with one process, or where the one that keeps the rendezvous store is gone or
    does not answer within ``patience`` seconds.
    """
    if world_size() == 1:
        return True
    own = str(rank())
    answers: list[bool] = []

    def ask() -> None:
        with suppress(RuntimeError):
            store = _get_default_store()
            speaker = store.compare_set(_SPEAKER, "", own).decode()
            if not _asked:
                _asked.append(own)
                store.add(_ASKED, 1)
            answers.append(speaker == own)

    # In a thread: asking the store has no time limit, and a process that was stopped never answers.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience)
    return answers[0] if answers else True


def answer_others(seconds: float) -> None:
    """Stay until all processes have asked who speaks, at most ``seconds``, if this one may keep the store."""
    if world_size() == 1 or rank() != 0:
        return
    end = time.monotonic() + seconds
    with suppress(RuntimeError):
        store = _get_default_store()
        while store.add(_ASKED, 0) < world_size() and time.monotonic() < end:
            time.sleep(0.05)


class SharedFlag:
    """A flag that any process may raise, and that all of them see raised at the same step.

    The flags of a step are exchanged between hosts, over gloo, while the next step computes: nobody waits for a device,
    and a host waits only until the others have finished the step before. All processes have to make the same calls.

    Args:
        timeout: Seconds after which a process that does not answer is an error.
    """

    def __init__(self, timeout: float) -> None:
        several = world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        self._pending: tuple[Any, Tensor] | None = None

    def in_step(self, raised: bool) -> bool:
        """Return whether a process had raised it in the step before (with one process: by now). Call it once a step."""
        if self._group is None:
            return raised
        earlier = self._wait()
        self._send(raised)
        return earlier

    def now(self, raised: bool) -> bool:
        """Return whether a process has raised it by now. Waits for the other hosts."""
        if self._group is None:
            return raised
        earlier = self._wait()
        self._send(raised)
        return self._wait() or earlier

    def _send(self, raised: bool) -> None:
        value = torch.tensor([float(raised)])
        self._pending = dist.all_reduce(value, group=self._group, async_op=True), value

    def _wait(self) -> bool:
        if self._pending is None:
            return False
        work, value = self._pending
        self._pending = None
        work.wait()
        return bool(value)
