"""Faults of a run on two processes, provoked for real: all end, one message, nothing that was saved is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_equissl.checkpoints import Manifest
from hf_equissl.data import SkippedImage, SkippedImages, TooManyBadImages
from hf_equissl.training import pretrain
from hf_equissl.training.slurm.engine import engine_variables
from tests.distributed import launching
from tests.distributed.launching import children

from .tasks import END, OPTIONS, PATIENCE, ROOT, SCRIPT, tasks

ENDLESS = ["--training.max_steps", "100000", "--training.save_steps", "2", "--training.save_total_limit", "2"]


def test_too_many_bad_images_on_one_process_stop_all(photo_folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(photo_folder, photos)
    for number in range(0, 32, 8):  # 4 of 32: 12.5 %
        (photos / f"{number:02d}.png").write_bytes(b"no picture")
    options = ["--data", str(photos), "--output_dir", str(tmp_path / "run"), *ENDLESS, "--data.max_bad_share", "0.1"]
    with tasks(tmp_path, options) as run:
        assert run.wait() == [1, 1]
        message = run.the_error()
    # All are seen once 32 images went by, of which each process had its share.
    assert message.startswith("error: 4 of ")
    assert "images seen" in message
    assert "10.0% are allowed" in message
    for number in range(0, 32, 8):
        assert f"{number:02d}.png" in run.text


def test_the_share_is_that_of_all_processes() -> None:
    """A file that two processes found bad, in different epochs, counts once; both judge alike."""
    counts = [SkippedImages(max_share=0.2, min_bad=2) for _ in range(2)]
    told: list[object] = [None, None]
    meeting = threading.Barrier(2)

    def exchange(rank: int) -> str:
        def collect(value: object) -> list[object]:
            told[rank] = value
            meeting.wait(PATIENCE)
            values = list(told)
            meeting.wait(PATIENCE)
            return values

        try:
            counts[rank].exchange(collect)
        except TooManyBadImages as error:
            return str(error).splitlines()[0]
        return f"{counts[rank].count} of {counts[rank].seen}"

    def both() -> list[str]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(exchange, range(2)))

    for rank, names in enumerate((["a"], ["a", "b"])):
        counts[rank].update([SkippedImage(name, "broken") for name in names], seen=8, judge=False)
    assert both() == ["2 of 19", "2 of 19"]
    assert both() == ["2 of 19", "2 of 19"]
    counts[0].update([SkippedImage(name, "broken") for name in ("c", "d", "e")], seen=0, judge=False)
    stopped = "5 of 22 images seen (22.7%) did not decode; 20.0% are allowed. The first:"
    assert both() == [stopped, stopped]


def test_a_loader_process_that_is_killed(photo_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["--data", str(photo_folder), "--output_dir", str(output), *ENDLESS]
    with tasks(tmp_path, [*options, "--training.dataloader_num_workers", "1"]) as run:
        run.wait_for_checkpoint(output, 2)
        workers = []
        while not workers:
            workers = [pid for pid in children(run.processes[1].pid) if is_fork(pid, run.processes[1].pid)]
        os.kill(workers[0], signal.SIGKILL)
        assert run.wait(END) == [1, 1]
        message = run.the_error()
    assert "A process that loads images died: " in message
    for word in ("memory", "/dev/shm", "dataloader_num_workers", "The same command goes on"):
        assert word in message
    check_kept(output, message)


def is_fork(pid: int, parent: int) -> bool:
    """Whether a child is a fork of its parent: a worker, and no helper of another program."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False


def check_kept(output: Path, message: str) -> None:
    """The message names a checkpoint that is complete, and no later one is."""
    named = Path(message.partition("checkpoint: ")[2].partition(". ")[0])
    newest = max((folder for folder in output.glob("checkpoint-*")), key=lambda folder: int(folder.name[11:]))
    assert named == newest
    assert Manifest.read(named).step == int(named.name[11:])
    assert not (output / "PREEMPTED").exists()
    assert not (output / "encoder").exists()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_a_loss_that_is_no_number_on_one_process(engine: str, photo_folder: Path, tmp_path: Path) -> None:
    config, wrapper = launching.ENGINES[engine]
    variables = engine_variables(str(launching.CONFIGS / f"{config}.yaml"))
    output = tmp_path / "run"
    options = ["--data", str(photo_folder), "--output_dir", str(output), *ENDLESS]
    script = ROOT / "tests" / "running" / "poisoned.py"
    count = 3 if engine == "ddp" else 2
    with tasks(tmp_path, options, script=script, variables=variables, count=count) as run:
        assert run.wait() == [1] * count
        message = run.the_error()
    assert run.text.count(f"wrapped: {wrapper}") == count
    assert f"not finite at step 3 on process 1 of {count}" in message
    assert "invariance = nan" in message
    assert "checkpoint-2" in message
    check_kept(output, message)


def test_a_process_that_is_killed(photo_folder: Path, tmp_path: Path) -> None:
    """The last one of three: the others ask the first who speaks, which stays until both have."""
    output = tmp_path / "run"
    with tasks(tmp_path, ["--data", str(photo_folder), "--output_dir", str(output), *ENDLESS], count=3) as run:
        run.wait_for_checkpoint(output, 2)
        run.processes[2].kill()
        assert run.wait(END) == [1, 1, -signal.SIGKILL]
        message = run.the_error()
    assert "Another process of this run has ended" in message
    check_kept(output, message)


def test_the_first_process_is_killed(photo_folder: Path, tmp_path: Path) -> None:
    """It keeps the store where the others would ask who speaks."""
    output = tmp_path / "run"
    with tasks(tmp_path, ["--data", str(photo_folder), "--output_dir", str(output), *ENDLESS]) as run:
        run.wait_for_checkpoint(output, 2)
        run.processes[0].kill()
        assert run.wait(END) == [-signal.SIGKILL, 1]
        message = run.the_error()
    assert "Another process of this run has ended" in message
    check_kept(output, message)


def test_a_process_that_is_killed_under_accelerate(photo_folder: Path, tmp_path: Path) -> None:
    """Its launcher sends SIGTERM to the survivors, which is no reason to save or to say that they were preempted."""
    output, log = tmp_path / "run", tmp_path / "log"
    options = [*OPTIONS, "--data", str(photo_folder), "--output_dir", str(output), *ENDLESS]
    launcher = launching.launch_really("ddp", *options, log=log)
    try:
        end = time.monotonic() + PATIENCE
        while not (output / "checkpoint-2" / "checkpoint.json").is_file():
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        os.kill(children(launcher.pid)[-1], signal.SIGKILL)
        assert launcher.wait(END) == 1
    except subprocess.TimeoutExpired:
        raise AssertionError(f"no end after {END} s:\n{log.read_text()}") from None
    finally:
        launching.kill(launcher)
    said = [line for line in log.read_text().splitlines() if line.startswith(("error:", "preempted:"))]
    assert len(said) == 1, log.read_text()
    check_kept(output, said[0])


def test_a_mistake_on_one_process_ends_all(photo_folder: Path, tmp_path: Path) -> None:
    """Here the second one finds a file where its output folder should be: a disk that is not mounted on one machine."""
    (tmp_path / "file").touch()
    # A folder is waited for, since other machines may see it late: here for a shorter time.
    script = tmp_path / "impatient.py"
    script.write_text(f"""
import runpy
from hf_equissl.running import output_folder
output_folder._PATIENCE = 1.0
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
""")
    folders = [tmp_path / "run", tmp_path / "file" / "run"]
    options = ["--data", str(photo_folder), *ENDLESS, "--output_dir"]
    with tasks(tmp_path, *([*options, str(folder)] for folder in folders), script=script) as run:
        codes = run.wait(PATIENCE)
        message = run.the_error()
    assert sorted(codes) in ([1, 2], [2, 2]), run.text
    assert "file is a file" in message or "is not seen on" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--training.per_device_train_batch_size", "1"], "1 images per process on 1. VICReg takes variances"),
        (
            ["--training.per_device_train_batch_size", "31", "--training.dataloader_drop_last", "false"],
            "the last batch of an epoch, 32 images modulo 31 = 1",
        ),
    ],
)
def test_batches_that_are_too_small_are_refused(
    options: list[str], expected: str, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--recipe", "cifar10_vicreg_rot", *options]
    code = pretrain.main([*options, "--data", str(photo_folder), "--output_dir", str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert code == 2
    assert expected in message
    assert "at least 2 images, got 1" in message
    assert "per_device_train_batch_size" in message
