"""A folder is that of one run at a time, whatever ends it; the room that it needs is what it will still write."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_equissl.checkpoints import Manifest
from hf_equissl.distributed.engines import Engine
from hf_equissl.distributed.signals import MARKER_FILE, Signals
from hf_equissl.planning.arithmetic import schedule
from hf_equissl.pretraining.arguments import EquiSSLTrainingArguments
from hf_equissl.running.output_folder import (
    LOCK_FILE,
    check_output_folder,
    check_own_texts,
    check_result_folder,
    check_shared_folder,
    estimate_disk_use,
    leave_folder,
    leave_if_refused,
    measure_checkpoints,
    take_folder,
)
from hf_equissl.utils.suggestions import RecipeError
from tests.processes import Child, start, wait_until

HOLDER = """
import os, sys, time
from hf_equissl.running.output_folder import take_folder
take_folder(sys.argv[1])
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(60)  # a loader's worker that outlives its run for a while
print("taken", flush=True)
time.sleep(60)
"""


def hold(folder: Path, how: str, seconds: int = 60) -> Child:
    log = folder.with_name(f"{folder.name}-{how}.log")
    words = [sys.executable, "-c", HOLDER.replace("60", str(seconds)), str(folder), how]
    log.touch()
    process = start(words, log=log)
    wait_until(lambda: "taken" in log.read_text())
    return process


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    saving = tmp_path / ".saving" / "checkpoint-2"
    saving.mkdir(parents=True)
    other = hold(tmp_path, "fork")
    try:
        with pytest.raises(RecipeError, match=rf"another run still writes there \(process {other.pid} on .*\)"):
            take_folder(tmp_path, patience=0.0)
        assert saving.is_dir()
        other.send_signal(signal.SIGKILL)
        other.wait()
        check_shared_folder(tmp_path)  # the killed run's; its child keeps nothing
        assert not saving.exists()
        take_folder(tmp_path, patience=0.0)
        leave_folder(tmp_path)
        third = hold(tmp_path, "alone")
        third.kill()
    finally:
        leave_folder(tmp_path)
        subprocess.run(["pkill", "-9", "-s", str(other.pid)], check=False)


def test_a_refused_start_leaves_the_folder_to_who_has_it(tmp_path: Path) -> None:
    def refuse() -> None:
        with leave_if_refused(tmp_path):
            take_folder(tmp_path)
            raise RecipeError("no")

    with pytest.raises(RecipeError):
        refuse()
    assert not list(tmp_path.iterdir())
    take_folder(tmp_path)
    with pytest.raises(RecipeError):
        refuse()
    assert (tmp_path / LOCK_FILE).read_text().startswith("process ")
    leave_folder(tmp_path)


def test_a_run_that_is_told_to_stop_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = hold(tmp_path, "alone", seconds=1)
    try:
        take_folder(tmp_path, patience=60.0)
        assert f"process {other.pid} on " in caplog.text
    finally:
        leave_folder(tmp_path)
        other.wait()


def test_what_lies_there_needs_no_more_room(tmp_path: Path) -> None:
    args = EquiSSLTrainingArguments(
        output_dir=str(tmp_path), max_steps=10, save_steps=2, per_device_train_batch_size=4, save_total_limit=2
    )
    plan = schedule(args, 1, 100)
    assert estimate_disk_use(args, plan, 1000) == 4000  # two that stay, one that is written, and the encoder
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(900))
        Manifest(Engine.SINGLE, 1, 4, step, "full", {"model.safetensors": 900}).write(folder)
    (tmp_path / "checkpoint-6").mkdir()  # not complete: nobody deletes it
    assert measure_checkpoints(tmp_path) == 1800
    assert estimate_disk_use(args, plan, 1000, 1800) == 2200
    assert estimate_disk_use(args, plan, 100, 1800) == 0


@pytest.mark.parametrize("split", [(32, 1, 1), (16, 2, 1), (4, 2, 4), (1, 1, 32)])
def test_an_epoch_has_as_many_steps_however_they_are_split(split: tuple[int, int, int], tmp_path: Path) -> None:
    per_device, processes, accumulation = split
    args = EquiSSLTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation
    )
    assert schedule(args, processes, 250).steps_per_epoch == 7
    args.dataloader_drop_last = False
    assert schedule(args, processes, 250).steps_per_epoch == 8


@pytest.mark.parametrize("name", [LOCK_FILE, ".saving", "encoder", "recipe.yaml", "run.json", "PREEMPTED", "model"])
def test_links_where_a_run_writes_are_refused(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("theirs")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(theirs if name in (".saving", "encoder", "model") else theirs / "file")
    with pytest.raises(RecipeError, match=f"{name} is a link"):
        check_shared_folder(run)
    if name == LOCK_FILE:
        with pytest.raises(RecipeError, match="is a link or a folder, no lock of a run"):
            take_folder(run)
        leave_folder(run)
    assert (run / name).is_symlink()
    assert (theirs / "file").read_text() == "theirs"


def test_the_marker_of_a_stop_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / MARKER_FILE).symlink_to(tmp_path / "theirs")
    Signals(tmp_path).leave_marker("SIGTERM")
    assert (tmp_path / "theirs").read_text() == "theirs"
    (tmp_path / MARKER_FILE).unlink()
    Signals(tmp_path).leave_marker("SIGTERM")
    assert (tmp_path / MARKER_FILE).read_text() == "SIGTERM\n"


def test_what_is_somebody_elses_is_neither_written_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("my own lock")
    with pytest.raises(RecipeError, match=r"\.lock was not written by a run"):
        take_folder(tmp_path)
    assert (tmp_path / LOCK_FILE).read_text() == "my own lock"
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "letter.txt").touch()
    with pytest.raises(RecipeError, match=r"\.saving/ holds letter\.txt, which a run would delete"):
        check_output_folder(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: mine  # hours of work\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml there was not written by a run"):
        check_own_texts(tmp_path)
    (tmp_path / "recipe.yaml").unlink()
    (tmp_path / "report.md").write_text("# What I think of it\n")
    check_own_texts(tmp_path, report=False)
    with pytest.raises(RecipeError, match=r"report\.md there was not written by a run"):
        check_own_texts(tmp_path)


@pytest.mark.parametrize("name", ["thesis.pdf", ".git", "config.json"])
def test_a_result_replaces_only_what_a_run_has_left(tmp_path: Path, name: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).touch()
    message = "no run has written there" if name == "config.json" else f"model holds {name}, which is no part"
    with pytest.raises(RecipeError, match=message):
        check_result_folder(tmp_path, "model", signs=("finetune.json",))
    (tmp_path / "finetune.json").touch()
    if name == "config.json":
        check_result_folder(tmp_path, "model", signs=("finetune.json",))
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / "config.json").mkdir(exist_ok=True)  # a folder of a file's name
    with pytest.raises(RecipeError, match=r"config\.json, which is no part"):
        check_result_folder(tmp_path, "model", signs=("finetune.json",))
