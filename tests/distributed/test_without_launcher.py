"""Processes end once the launcher that started them is gone; a hang-up of the terminal is a request to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_equissl.distributed.signals import Signals
from tests.processes import limit

# A rank that waits for others as a library does: no signal reaches Python. It says its PID first.
RANK = """
import os, signal, sys, threading, time
from hf_equissl.distributed import signals
signals.UNTIL_TRAINING = 0.1
print(os.getpid(), flush=True)
{before}
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
signals.listen_to_launcher()
print("listens", flush=True)
with signals.Signals():
    time.sleep(100)
"""
GONE_BEFORE = "while os.getppid() == signals._BORN[1]: time.sleep(0.01)"
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(100)
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize("when", ["before it listens", "while it waits for others"])
def test_a_killed_launcher_leaves_nothing_behind(when: str) -> None:
    early = when == "before it listens"
    code = RANK.format(before=GONE_BEFORE if early else "")
    words = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, code], env=words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    assert launcher.stderr is not None
    pid = int(launcher.stdout.readline())
    try:
        if not early:
            assert launcher.stdout.readline() == "listens\n"
            assert runs(pid)
        launcher.kill()
        end = time.monotonic() + limit(20)
        while runs(pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not runs(pid)
        assert "preempted: the launcher of this run is gone" in launcher.stderr.read()
    finally:
        launcher.kill()
        launcher.wait()
        if runs(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_script_may_stand_between() -> None:
    """As in ``torchrun --no-python ./bind_cores.sh``."""
    code = RANK.format(before="").replace("time.sleep(100)", "pass")
    words = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0", "CODE": code, "PYTHON": sys.executable}
    script = ["bash", "-c", '"$PYTHON" -c "$CODE"; exit $?']
    done = subprocess.run(script, env=words, capture_output=True, text=True, timeout=limit(60), check=False)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["listens"]), done.stderr


def test_a_hang_up_is_a_request_to_stop_unless_nohup_started_the_run() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # this may run under nohup itself
    try:
        with Signals() as caught:
            caught.raises = False
            os.kill(os.getpid(), signal.SIGHUP)
            assert caught.received == "SIGHUP"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            assert caught.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
