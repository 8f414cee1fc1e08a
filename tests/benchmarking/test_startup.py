"""What is seen of a run that starts: its time, the memory of its processes, and why it failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_equissl.benchmarking import startup
from hf_equissl.benchmarking.startup import MIB, PER_CLASS, make_files, watch
from hf_equissl.data import load_images
from hf_equissl.recipes.recipe import Recipe
from hf_equissl.training.recipe_options import RECIPES

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux' /proc is read")
# Takes 64 MiB, then a child takes 32 MiB beside them; says so, and goes on.
HOLD = """
import os, pathlib, sys, time
held = bytearray(os.urandom(1 << 20)) * 64
if os.fork() == 0:
    held = bytearray(os.urandom(1 << 20)) * 32
    pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_files_lie_in_classes_and_are_images(tmp_path: Path) -> None:
    make_files(tmp_path, PER_CLASS + 3)
    source = load_images(tmp_path)
    assert (len(source), source.num_classes) == (PER_CLASS + 3, 2)
    assert Image.open(tmp_path / "n00000001" / f"{PER_CLASS + 2:08d}.jpg").size == (36, 32)


def test_the_memory_of_each_process(tmp_path: Path) -> None:
    flag = tmp_path / "held"
    taken = watch([sys.executable, "-S", "-E", "-c", HOLD, str(flag)], flag.exists, tmp_path / "log.txt")
    (main,), (worker,) = taken.memory("main"), taken.memory("worker")
    assert main > 32 * MIB
    assert 32 * MIB < worker < 80 * MIB  # its own, and half of what it shares with its parent
    assert 0 < taken.seconds < 60
    assert all(not Path(f"/proc/{process}/exe").exists() for process in taken.peaks)  # nothing of it is left


def test_a_run_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with code 3 before its first step:\nno room"):
        watch(["sh", "-c", "echo no room; exit 3"], lambda: False, tmp_path / "log.txt")


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert startup.main(["--files", "10", "--processes", "2"]) == 2
    assert "--files 10: one step reads 16 images" in capsys.readouterr().err
    assert startup.main(["--workers", "-1"]) == 2
    (tmp_path / "tiny.yaml").write_text(startup.RECIPE)
    assert Recipe.load(tmp_path / "tiny.yaml", search=[RECIPES]).training["max_steps"] == 1
