"""SIGTERM and SIGUSR1: a checkpoint, a code and a marker; the same command then ends where the unbroken run ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_equissl.distributed.signals import (
    EXIT_PREEMPTED,
    MARKER_FILE,
    STOP_SIGNALS,
    Preempted,
    Signals,
)
from hf_equissl.training import pretrain
from tests import processes
from tests.distributed.launching import children
from tests.processes import environment, limit

from .tasks import OPTIONS, PATIENCE, ROOT, tasks

STEPS = 14
FAKE_SRUN = """\
#!/bin/bash
# Two tasks on this machine; like srun's, the code is the largest of theirs.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" &
    pids[task]=$!
done
echo "${pids[@]}" > "$FAKE_SLURM/tasks"
code=0
for pid in "${pids[@]}"; do
    wait "$pid"
    one=$?
    [ "$one" -gt "$code" ] && code=$one
done
exit "$code"
"""
FAKE_SCONTROL = """\
#!/bin/bash
case "$1 $2" in
    "show hostnames") echo 127.0.0.1 ;;
    "show job") echo "JobState=$FAKE_STATE" ;;
    *) echo "$@" >> "$FAKE_SLURM/scontrol" ;;
esac
"""


def same_weights(left: Path, right: Path) -> None:
    """Bit for bit."""
    for file in (f"checkpoint-{STEPS}/model.safetensors", "encoder/model.safetensors"):
        first, second = load_file(left / file), load_file(right / file)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert torch.equal(value, second[key]), f"{file}: {key}"


def record(folder: Path) -> dict[str, object]:
    """``run.json``."""
    return json.loads((folder / "run.json").read_text())


@contextlib.contextmanager
def signalled(number: int, output: Path) -> Iterator[None]:
    """Send this process a signal once training in ``output`` has begun."""

    def send() -> None:
        end = time.monotonic() + limit(PATIENCE)
        while not (output / "run.json").is_file() and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_one_process_stops_and_goes_on(photo_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [*OPTIONS, "--data", str(photo_folder), "--training.max_steps", str(STEPS)]
    options += ["--training.save_strategy", "epoch"]  # 8 steps: the epoch's end must not save what is saved already
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pretrain.main([*options, "--output_dir", str(whole)]) == 0
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with signalled(signal.SIGUSR1, broken):
        assert pretrain.main([*options, "--output_dir", str(broken)]) == EXIT_PREEMPTED
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert "preempted: SIGUSR1: stopped at step" in capfd.readouterr().err
    checkpoints = [folder.name for folder in broken.glob("checkpoint-*")]
    assert len(checkpoints) == 1
    assert f"at step {checkpoints[0][11:]} of {STEPS}" in (broken / MARKER_FILE).read_text()
    assert not (broken / "encoder").exists()
    stopped = record(broken)
    assert stopped["preempted"] is not None
    assert stopped["finished"] is None
    assert pretrain.main([*options, "--output_dir", str(broken)]) == 0
    assert not (broken / MARKER_FILE).exists()
    finished = record(broken)
    assert (finished["preempted"], finished["starts"]) == (None, 2)
    assert finished["finished"] is not None
    same_weights(whole, broken)


def test_a_signal_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(Preempted, match="SIGTERM before the first step"), Signals(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert "nothing to save" in (tmp_path / MARKER_FILE).read_text()


def test_two_signals_are_one_request_or_end_at_once(tmp_path: Path) -> None:
    """A job's signal reaches a process twice, from the scheduler and its launcher; one that comes later means it."""
    code = f"""
import os, signal, time
from hf_equissl.distributed import signals
with signals.Signals({str(tmp_path)!r}) as caught:
    caught.raises = False
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert caught.received == "SIGUSR1"
    print("still here", flush=True)
    signals.ONE_REQUEST_SECONDS = 0.0
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached", flush=True)
"""
    ended = processes.run([sys.executable, "-c", code], timeout=PATIENCE)
    assert ended.returncode == EXIT_PREEMPTED, ended.stderr
    assert ended.stdout == "still here\n"
    assert "SIGTERM after SIGUSR1: stopped at once" in ended.stderr
    assert (tmp_path / MARKER_FILE).is_file()


def test_the_slurm_script_puts_a_stopped_run_back_into_the_queue(photo_folder: Path, tmp_path: Path) -> None:
    """The script with stand-ins for Slurm's two commands, and real processes: DDP on two tasks with a worker each.

    What it runs when the job starts again are forks, without the script, of which the next test says what it does then.
    One image is broken, and the last batches are not full.
    """
    photos, tools = tmp_path / "photos", tmp_path / "bin"
    shutil.copytree(photo_folder, photos)
    (photos / "07.png").write_bytes(b"no picture")
    (photos / "31.png").unlink()
    tools.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = ["--data", str(photos), "--training.max_steps", str(STEPS), "--training.dataloader_drop_last", "false"]
    options += ["--training.dataloader_num_workers", "1", "--data.max_bad_share", "0.5"]
    script = ["bash", "training/slurm/pretrain.sbatch", *OPTIONS, *options]

    def start(job: int, output: Path) -> subprocess.Popen[bytes]:
        folder = tmp_path / str(job)
        folder.mkdir(exist_ok=True)
        slurm = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "here", "SLURM_SUBMIT_DIR": str(ROOT)}
        slurm["SLURM_JOB_NUM_NODES"] = "1"
        variables = environment(PATH=path, FAKE_SLURM=str(folder), **slurm)
        with (folder / "log").open("ab") as log:
            words = [*script, "--output_dir", str(output)]
            return subprocess.Popen(words, env=variables, stdout=log, stderr=log, start_new_session=True)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with tasks(tmp_path / "1", [*options, "--output_dir", str(whole)]) as unbroken:
        assert unbroken.wait() == [0, 0], unbroken.text
    job = start(2, broken)
    try:
        end = time.monotonic() + limit(PATIENCE)
        while not (broken / "run.json").is_file():
            assert time.monotonic() < end, (tmp_path / "2" / "log").read_text()
            time.sleep(0.02)
        second = int((tmp_path / "2" / "tasks").read_text().split()[1])
        for pid in (*children(second), second):  # Slurm's signal reaches workers, too; here one task's only
            os.kill(pid, signal.SIGUSR1)
        log = tmp_path / "2" / "log"
        assert job.wait(limit(PATIENCE)) == EXIT_PREEMPTED, log.read_text()
        assert (tmp_path / "2" / "scontrol").read_text() == "requeue 2\n"
        assert (broken / MARKER_FILE).is_file()
        assert not (broken / "encoder").exists()
        assert log.read_text().count("preempted: ") == 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    with tasks(tmp_path / "3", [*options, "--output_dir", str(broken)]) as again:
        assert again.wait() == [0, 0], again.text
    assert (tmp_path / "2" / "scontrol").read_text() == "requeue 2\n"
    assert not (broken / MARKER_FILE).exists()
    same_weights(whole, broken)
    logged = json.loads((whole / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    assert logged[-1]["images_skipped"] == 1  # over both processes


# How the tasks of a start end: the marker's text, whether a checkpoint is written. What Slurm says of the job then.
ENDS = {
    "before the time limit": (["SIGUSR1: stopped"], "RUNNING", ["requeue 3"], EXIT_PREEMPTED),
    "preempted, with time to end": (["SIGTERM: stopped"], "RUNNING", ["requeue 3"], EXIT_PREEMPTED),
    "at the time limit": (["SIGTERM: stopped"], "COMPLETING Reason=TimeLimit", ["requeue 3"], EXIT_PREEMPTED),
    "cancelled": (["SIGTERM: stopped"], "COMPLETING Reason=None", [], EXIT_PREEMPTED),
    "never far enough": (["SIGUSR1: nothing to save"] * 3, "RUNNING", ["requeue 3"] * 2, 1),
    "failed": ([""], "RUNNING", [], 1),
    "finished by the next start": (["SIGUSR1: stopped", "finished"], "RUNNING", ["requeue 3"], 0),
}


@pytest.mark.parametrize("case", ENDS)
def test_which_jobs_go_back_into_the_queue(case: str, tmp_path: Path) -> None:
    """The script alone, around tasks that only end."""
    markers, state, queued, code = ENDS[case]
    tools, output = tmp_path / "bin", tmp_path / "run"
    tools.mkdir()
    srun = """#!/bin/bash
if [ -z "$MARKER" ]; then exit 1; fi
if [ "$MARKER" = finished ]; then exit 0; fi
case $MARKER in *stopped) mkdir -p "$RUN/checkpoint-7" && touch "$RUN/checkpoint-7/checkpoint.json" ;; esac
echo "$MARKER" > "$RUN/PREEMPTED"; exit 75
"""
    for name, text in (("srun", srun), ("scontrol", FAKE_SCONTROL), ("python", "#!/bin/bash\ntrue\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "here", "SLURM_SUBMIT_DIR": str(ROOT)}
    more = {"PATH": f"{tools}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path), "RUN": str(output)}
    for marker in markers:
        ended = subprocess.run(
            ["bash", "training/slurm/pretrain.sbatch", "--output_dir", str(output)],
            cwd=ROOT,
            env={**os.environ, **slurm, **more, "MARKER": marker, "FAKE_STATE": state},
            capture_output=True,
            text=True,
            timeout=limit(PATIENCE),
            check=False,
        )
    assert ended.returncode == code, ended.stderr
    calls = tmp_path / "scontrol"
    assert (calls.read_text().splitlines() if calls.exists() else []) == queued
    assert ("not queued again" in ended.stdout + ended.stderr) == (case in ("cancelled", "never far enough"))


def test_the_end_of_a_command_imports_nothing() -> None:
    """A signal in the middle of an import leaves modules that cannot be imported on top of."""
    code = """
import sys
sys.modules["torch"] = None  # begun, and broken
from hf_equissl.distributed.signals import end_command
print("end", flush=True)
end_command(75)
"""
    words = [sys.executable, "-c", code]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=limit(PATIENCE), check=False)
    assert (ended.returncode, ended.stdout) == (EXIT_PREEMPTED, "end\n"), ended.stderr


def test_workers_ignore_what_their_run_obeys() -> None:
    """Also a signal that comes before the worker's first line, while its run listens."""
    code = """
import os, signal
from torch.utils.data import DataLoader
from hf_equissl.distributed.signals import STOP_SIGNALS, Signals, guard_workers

def signal_all():
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)

def work(samples):
    signal_all()
    return samples

os.register_at_fork(after_in_child=signal_all)
with Signals() as caught:
    print(list(guard_workers(DataLoader(range(4), 2, num_workers=1, collate_fn=work))))
    print(caught.received, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""
    words = [sys.executable, "-c", code]
    ended = processes.run(words, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (0, "[[0, 1], [2, 3]]\nNone set()\n"), ended.stderr
