"""Processes that are forked from a server end, die and look around like new interpreters, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.processes import BARE, ENVIRONMENT, ROOT, Server, limit, wait_until

LOOK = """
import json, os, sys, threading
__name__, own = __name__, sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path, "variables": dict(os.environ),
    "main": own.__dict__ is globals(),
    "file": globals().get("__file__"), "name": __name__, "threads": threading.active_count(),
    "stdin": sys.stdin.read(), "files": sorted(os.listdir("/proc/self/fd"))[:3], "hidden": sys.flags.isolated,
}))
"""
# What a command does at its end -> its code.
ENDS = {
    "print('out'); import sys; sys.stderr.write('err')": 0,
    "raise SystemExit": 0,
    "raise SystemExit(1)": 1,
    "raise SystemExit(2)": 2,
    "raise SystemExit(75)": 75,
    "raise SystemExit(130)": 130,
    "raise SystemExit('what went wrong')": 1,
    "raise ValueError('what went wrong')": 1,
    "import os; print('lost'); os._exit(7)": 7,
    "import os; os.kill(os.getpid(), 9)": -signal.SIGKILL,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)": -signal.SIGUSR1,
    "import atexit; atexit.register(print, 'at the end'); print('first')": 0,
    "import threading, time; threading.Thread(target=lambda: time.sleep(0.1) or print('late')).start()": 0,
    "def f(:": 1,
}


@pytest.mark.parametrize("code", ENDS)
def test_ends_as_an_interpreter_ends(code: str) -> None:
    """Code, output and errors; of a traceback, all but the lines of the server."""
    words = [sys.executable, "-c", code]
    real, ours = subprocess.run(words, capture_output=True, text=True, check=False), processes.run(words)
    assert real.returncode == ours.returncode == ENDS[code]
    assert ours.stdout == real.stdout
    assert ours.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


@pytest.mark.parametrize("kind", ["script", "module", "code"])
def test_looks_around_as_an_interpreter_does(kind: str, tmp_path: Path) -> None:
    (tmp_path / "look_around.py").write_text(LOOK)
    words = {"script": ["look_around.py"], "module": ["-m", "look_around"], "code": ["-c", LOOK]}[kind]
    words = [sys.executable, *words, "--some", "word"]
    variables = {**ENVIRONMENT, "RANK": "1", "SOME": "thing"}
    variables.pop("HOME", None)
    real = subprocess.run(
        words, cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    ours = processes.run(words, cwd=tmp_path, env=variables)
    expected, found = json.loads(real.stdout), json.loads(ours.stdout)
    assert {key for key in expected if expected[key] != found[key]} <= {"path"}
    assert found["path"][0] == expected["path"][0]
    assert set(found["path"][1:]) == set(expected["path"][1:])


WAIT = "import pathlib, time, sys; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_real(number: int, tmp_path: Path) -> None:
    child = processes.start([sys.executable, "-c", WAIT, str(tmp_path / "ready")])
    wait_until((tmp_path / "ready").exists)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
    child.send_signal(number)
    assert child.wait(limit(60.0)) == -number
    assert child.poll() == -number
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


def test_a_handler_of_its_own_decides(tmp_path: Path) -> None:
    code = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n{WAIT}"
    child = processes.start([sys.executable, "-c", code, str(tmp_path / "ready")])
    wait_until((tmp_path / "ready").exists)
    child.terminate()
    assert child.wait(limit(60.0)) == 75


def test_many_at_once_each_with_its_own_log(tmp_path: Path) -> None:
    code = "import sys, time; print('I am', sys.argv[1]); time.sleep(0.1); sys.exit(int(sys.argv[1]))"
    logs = [tmp_path / f"{number}.log" for number in range(8)]
    children = [processes.start([sys.executable, "-c", code, str(number)], log=log) for number, log in enumerate(logs)]
    assert [child.wait(limit(60.0)) for child in reversed(children)] == list(range(8))[::-1]
    assert [log.read_text() for log in logs] == [f"I am {number}\n" for number in range(8)]


@pytest.mark.parametrize("number", [signal.SIGKILL, None])
def test_nothing_is_left_behind(number: int | None, tmp_path: Path) -> None:
    """The server is killed, or the process that it serves goes away."""
    server = Server(["torch"])
    words = [sys.executable, "-c", WAIT, str(tmp_path / "ready")]
    child = server.start(words, ROOT, ENVIRONMENT, *[Path(os.devnull)] * 3)
    wait_until((tmp_path / "ready").exists)
    if number:
        server.process.send_signal(number)
        server.process.wait(limit(60.0))
        with pytest.raises(RuntimeError, match="the server of processes has ended"):
            child.wait(limit(60.0))
    else:
        server.close()
    wait_until(lambda: not is_alive(child.pid))


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_needs_a_new_interpreter_is_refused() -> None:
    with pytest.raises(ValueError, match="HF_DEBUG is '1', and the server was started with None"):
        processes.start([sys.executable, "-c", ""], env={**ENVIRONMENT, "HF_DEBUG": "1"})
    with pytest.raises(ValueError, match="use subprocess"):
        processes.start(["bash", "-c", ""])


def test_variables_of_the_hub_and_the_input_are_those_of_the_command(tmp_path: Path) -> None:
    code = """
import datasets, sys, transformers.dynamic_module_utils as dynamic
from huggingface_hub import constants, hf_api, hf_hub_url
print(hf_hub_url("a", "b"), hf_api.api.endpoint, datasets.config.HF_ENDPOINT, constants.is_offline_mode(), input())
print(constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, dynamic.HF_MODULES_CACHE)
"""
    hub, home = "http://127.0.0.1:9", tmp_path / "home"
    env = {**ENVIRONMENT, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = processes.run([sys.executable, "-c", code], env=env, text_in="words")
    assert done.stdout.splitlines() == [
        f"{hub}/a/resolve/main/b {hub} {hub} False words",
        f"{home / 'hub'} {home / 'datasets'} {home / 'modules'}",
    ], done.stderr


def test_a_bare_server_has_imported_nothing_of_ours() -> None:
    code = "import sys; print([name for name in sys.modules if name.startswith(('hf_equissl', 'transformers'))])"
    assert processes.run([sys.executable, "-c", code], preloaded=BARE).stdout == "[]\n"
