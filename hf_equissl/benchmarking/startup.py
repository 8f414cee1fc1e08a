"""Measure how long a run on very many files takes to its first step, and the memory of each of its processes.

python -m hf_equissl.benchmarking.startup --files 10000 1281167 --processes 2 --workers 1   (--help shows everything)
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from ..utils.commands import check_at_least, command_parser, path_word, say, stop

MIB = 2**20
PER_CLASS = 1300  # as in ImageNet; a file system allows no more than some ten thousand links of one file
POLL_SECONDS = 0.25
PATIENCE = 3600.0  # seconds
LOG_TAIL = 25  # lines shown of a run that failed
DESCRIPTION = """\
Make folders of so many small JPEG files in classes (links to one file per class), pretrain a tiny model on them for one
step, and print the seconds from the command to the checkpoint of that step, by the clock and of processor time, and the
largest memory of each process (Linux): what files do not back, and of shared pages each its part. A row of few files
shows what imports and the model take."""
RECIPE = """\
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, patch_size: 8, image_size: 32,
        feature_size: 32, equivariant_size: 16}
objectives:
  invariance: {name: vicreg, expander_sizes: [32, 32]}
  equivariance: []
views: {pipeline: {name: vicreg}, transformation: null}
training: {max_steps: 1, save_steps: 1, per_device_train_batch_size: 8, use_cpu: true, report_to: none}
"""
_RUN = "hf_equissl.training.pretrain"


@dataclass
class Startup:
    """What a run took.

    Attributes:
        seconds: From its command to the end of its first step.
        peaks: Process id -> its largest memory in bytes, of all processes that the command started: its part of
            anonymous and shared memory.
        processor: Process id -> seconds of processor time, all threads.
        roles: Process id -> what it is: "launcher", "main" (a process of the run) or "worker" (of a loader).
    """

    seconds: float = 0.0
    peaks: dict[int, int] = field(default_factory=dict)
    processor: dict[int, float] = field(default_factory=dict)
    roles: dict[int, str] = field(default_factory=dict)

    def memory(self, role: str) -> list[int]:
        """List the largest memory of each process of a role, largest first."""
        return sorted((peak for process, peak in self.peaks.items() if self.roles[process] == role), reverse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what can be mended, 1 where a run fails."""
    usage = "python -m hf_equissl.benchmarking.startup [options]"
    parser = command_parser("startup.py", usage=usage, description=DESCRIPTION)
    add = parser.add_argument
    add("--files", type=int, nargs="+", default=[1000, 1_281_167], metavar="N", help="default: 1000 1281167")
    add("--processes", type=int, default=1, metavar="N", help="of the run; default: 1")
    add("--workers", type=int, default=2, metavar="N", help="of each loader; default: 2")
    add("--folder", type=path_word, metavar="DIR", help="files are made in here, and removed; default: the system's")
    options = parser.parse_args(argv)
    try:
        check_at_least(options, processes=1, workers=0)
        if min(options.files) < 8 * options.processes:
            raise ValueError(f"--files {min(options.files)}: one step reads {8 * options.processes} images.")
        if not Path("/proc/self/smaps_rollup").exists():
            raise ValueError("This measurement reads the memory of processes from Linux' /proc, which is not here.")
        for line in _measure(options):
            say(line)
    except (ValueError, OSError) as error:
        return stop(error, code=2)
    except RuntimeError as error:
        return stop(error, code=1)
    return 0


def _measure(options: argparse.Namespace) -> Iterator[str]:
    yield f"processes: {options.processes}, workers of each: {options.workers}; to the end of the first step"
    yield f"{'files':>10}{'s':>8}{'processor time, s':>20}   {'each process, MiB':<24}each worker, MiB"
    for count in options.files:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            make_files(Path(folder) / "images", count)
            taken = time_start(Path(folder), options.processes, options.workers)
        mains, workers = (
            ", ".join(f"{peak / MIB:.0f}" for peak in taken.memory(role)) or "-" for role in ("main", "worker")
        )
        busiest = max(seconds for process, seconds in taken.processor.items() if taken.roles[process] == "main")
        yield f"{count:>10}{taken.seconds:>8.1f}{busiest:>20.1f}   {mains:<24}{workers}"


def make_files(folder: Path, count: int) -> None:
    """Make ``count`` JPEG files in class folders, ``PER_CLASS`` in each: links to one file per class."""
    from .overhead import synthetic_images

    picture = synthetic_images(1, 32)[0]
    for begin in range(0, count, PER_CLASS):
        inside = folder / f"n{begin // PER_CLASS:08d}"
        inside.mkdir(parents=True)
        first = inside / f"{begin:08d}.jpg"
        picture.save(first)
        for number in range(begin + 1, min(begin + PER_CLASS, count)):
            os.link(first, inside / f"{number:08d}.jpg")


def time_start(folder: Path, processes: int, workers: int) -> Startup:
    """Pretrain on ``folder/images`` for one step; results go beside it.

    Raises:
        RuntimeError: The run fails.
    """
    recipe, output = folder / "tiny.yaml", folder / "run"
    recipe.write_text(RECIPE, encoding="utf-8")
    launch = [sys.executable]
    if processes > 1:
        config = files("hf_equissl.training.accelerate_configs") / "ddp.yaml"
        launch += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
        launch += ["--num_processes", str(processes)]
    words = ["--recipe", str(recipe), "--data", str(folder / "images"), "--output_dir", str(output)]
    words += ["--training.dataloader_num_workers", str(workers)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = output / "checkpoint-1" / "trainer_state.json"
    return watch([*launch, "-m", _RUN, *words], done.exists, folder / "log.txt", environment)


def watch(
    command: Sequence[str], done: Callable[[], bool], log: Path, environment: Mapping[str, str] | None = None
) -> Startup:
    """Start a command and look at the memory of its processes until ``done`` says so; then it is ended.

    Args:
        command: Words of the command.
        done: Whether what is waited for has happened.
        log: Where its output goes.
        environment: Its environment; by default this process's.

    Raises:
        RuntimeError: It ends before, or takes longer than ``PATIENCE``.
    """
    taken, begin = Startup(), time.perf_counter()
    with log.open("wb") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        while not done():
            _look_at(started.pid, taken)
            if (code := started.poll()) is not None and not done():
                tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
                raise RuntimeError("\n".join([f"The run ended with code {code} before its first step:", *tail]))
            if time.perf_counter() - begin > PATIENCE:
                raise RuntimeError(f"The run has not done a step after {PATIENCE:.0f} s.")
            time.sleep(POLL_SECONDS)
        taken.seconds = time.perf_counter() - begin
        _look_at(started.pid, taken)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    return taken


def _look_at(root: int, taken: Startup) -> None:
    """Note the memory of a process and of all that it has started."""
    found = [(root, "")]
    while found:
        process, parent = found.pop()
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes()
            memory = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
            ticks = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
            tasks = list(Path(f"/proc/{process}/task").iterdir())
            children = [int(child) for task in tasks for child in (task / "children").read_text("ascii").split()]
        except OSError:  # it has ended meanwhile
            continue
        # A loader's workers are forks of the run, with its words.
        role = "launcher" if b"accelerate.commands" in words else "worker" if parent in ("main", "worker") else "main"
        sizes = [int(line.split()[1]) for line in memory.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
        size = 1024 * sum(sizes)
        taken.processor[process] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        taken.peaks[process] = max(size, taken.peaks.get(process, 0))
        taken.roles[process] = role
        found += [(child, role) for child in children]


if __name__ == "__main__":
    sys.exit(main())
