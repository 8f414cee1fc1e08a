"""Pretrain a small encoder twice on photographs, without and with reconstruction, probe both, draw pictures.

python training/quickstart.py --output_dir DIR   (``make quickstart`` installs what is needed and runs this)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCRIPTS = Path(__file__).resolve().parent
RECIPE = SCRIPTS / "recipes" / "quickstart.yaml"
STEPS = 400
CROPS_PER_PHOTOGRAPH = 300
TESTS = ("rotation", "color_jitter", "gaussian_blur", "translation")
PROBE = ("--epochs", "20", "--num_draws", "10", "--precision", "fp32")

# Photographs inside the wheels of scikit-image, scikit-learn and matplotlib: module -> files. Whole photographs are
# held out for the probes and the pictures: no encoder and no probe has seen any part of them.
TRAIN_PHOTOGRAPHS = {
    "skimage": [
        f"data/{name}"
        for name in (
            "astronaut.png",
            "brick.png",
            "camera.png",
            "coins.png",
            "grass.png",
            "gravel.png",
            "ihc.png",
            "moon.png",
            "motorcycle_left.png",
            "retina.jpg",
            "rocket.jpg",
        )
    ],
    "sklearn": ["datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}
TEST_PHOTOGRAPHS = {"skimage": ["data/chelsea.png", "data/coffee.png"], "sklearn": ["datasets/images/china.jpg"]}
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}

TILE = 64  # pixels; the recipe's crops of 32 px come from these
SMALLEST_WINDOW = 64
LARGEST_WINDOW = 0.7  # of the photograph's shorter side
# Windows with less contrast (standard deviation of grey values in 0..255) are left out: sky does not look turned.
SMALLEST_CONTRAST = 16.0


class QuickstartError(RuntimeError):
    """Something that its message says how to mend."""


@dataclass
class Lane:
    """One encoder's way through pretraining and probes, on one core.

    Attributes:
        title: Name in tables and pictures.
        name: Name of its folders.
        output: Folder of everything.
        overrides: What its command line says beyond the recipe.
        cpus: Where it runs; empty: anywhere.
        stage: What it is doing, for people.
        log: Output of the running command.
        process: The running command.
    """

    title: str
    name: str
    output: Path
    overrides: tuple[str, ...] = ()
    cpus: frozenset[int] = frozenset()
    stage: str = "waiting"
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def run(self) -> Path:
        """Folder of the pretraining run."""
        return self.output / "runs" / self.name

    @property
    def encoder(self) -> Path:
        """Folder of the finished encoder."""
        return self.output / self.name

    @property
    def probes(self) -> Path:
        """Folder of its probes' results."""
        return self.run / "probes"

    def is_pretrained(self, steps: int) -> bool:
        """Whether a run of ``steps`` is finished and exported."""
        finished = self.run / f"checkpoint-{steps}" / "trainer_state.json"
        return finished.is_file() and (self.encoder / "model.safetensors").is_file()

    def progress(self) -> str:
        """The stage, and how far it is by the last progress bar in its log."""
        if self.log is None or not self.log.is_file():
            return self.stage
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            text = file.read().decode(errors="replace")
        bars = re.findall(r"(\d+)/(\d+) \[[^\]]*(?:it|s/it|task|s/task)", text)
        return f"{self.stage} {bars[-1][0]}/{bars[-1][1]}" if bars else self.stage

    def call(self, stage: str, script: str, *words: object) -> None:
        """Run a script of this folder to its end, with its output in a file.

        Raises:
            QuickstartError: With the end of that output, if the script fails.
        """
        command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
        self.run.mkdir(parents=True, exist_ok=True)
        self.log = self.run / f"{Path(script).stem}.log"
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())
            if self.cpus and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(self.process.pid, self.cpus)
            self.stage = stage
            code = self.process.wait()
        if code:
            last = "\n".join(deque(self.log.read_text(errors="replace").splitlines(), maxlen=15))
            raise QuickstartError(f"{script} stopped with code {code} ({self.title}). The end of {self.log}:\n{last}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        check_packages()
        run(Path(options.output_dir), options.steps, options.crops_per_photograph)
    except QuickstartError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\nstopped. The same command goes on from the last checkpoint.", file=sys.stderr, flush=True)
        return 130
    return 0


def run(output: Path, steps: int, crops_per_photograph: int) -> None:
    """Everything, from photographs to pictures; what ``output`` already holds is not made again."""
    start = time.monotonic()
    claim(output, {"steps": steps, "crops_per_photograph": crops_per_photograph})
    counts = cut_tiles(output / "tiles", crops_per_photograph)
    print(
        f"{counts['train']} crops of photographs to train on, {counts['test']} of others to test on: {output / 'tiles'}"
    )
    lanes = make_lanes(output)
    print(f"pretraining {steps} steps without and with reconstruction, then probing; logs: {output / 'runs'}/*/*.log")
    follow(lanes, lambda lane: pretrain_and_probe(lane, steps))
    table = write_results(lanes)
    draw(lanes)
    print(summary(lanes, table, time.monotonic() - start), flush=True)


def pretrain_and_probe(lane: Lane, steps: int) -> None:
    """Both commands of one lane."""
    tiles = lane.output / "tiles"
    if not lane.is_pretrained(steps):
        shutil.rmtree(lane.probes, ignore_errors=True)
        words = ("--recipe", RECIPE, "--data", tiles / "train", "--output_dir", lane.run, "--training.use_cpu", "true")
        settings = ("--training.max_steps", steps, "--training.bf16", str(has_fast_bf16()).lower())
        lane.call("pretraining", "pretrain.py", *words, *settings, *lane.overrides)
        copy_folder(lane.run / "encoder", lane.encoder)
    words = ("--encoder", lane.encoder, "--data", tiles, "--output_dir", lane.probes, "--device", "cpu")
    lane.call("probing", "probe.py", *words, "--tests", *TESTS, *PROBE)
    lane.stage = "done"


# ---- photographs ----


def check_packages() -> None:
    """Raise ``QuickstartError`` if a package is missing, with what to do."""
    missing = [name for module, name in {**PACKAGES, "hf_equissl": "hf-equissl"}.items() if find_spec(module) is None]
    if missing:
        raise QuickstartError(
            f"{', '.join(missing)} missing from {sys.executable}. Run `make quickstart`, which installs everything into "
            "an environment of its own, or `pip install -e '.[quickstart]'`."
        )


def photographs(files: Mapping[str, Sequence[str]]) -> list[Path]:
    """Paths of files inside installed packages.

    Raises:
        QuickstartError: If a package has no longer such a file.
    """
    found = []
    for module, names in files.items():
        spec = find_spec(module)
        folder = Path((spec.submodule_search_locations or [""])[0] if spec else "")
        for name in names:
            if not (folder / name).is_file():
                raise QuickstartError(
                    f"{PACKAGES[module]} has no {name}. Install the versions of constraints.txt: "
                    "pip install -c constraints.txt -e '.[quickstart]'."
                )
            found.append(folder / name)
    return found


def cut_tiles(folder: Path, per_photograph: int, seed: int = 0) -> dict[str, int]:
    """Fill ``folder`` with crops: ``train/`` and ``test/``, each a flat folder as a user's own images would be.

    Returns:
        Number of crops in either.
    """
    if not folder.exists():
        from hf_equissl.files import move_into_place

        staging = folder.with_name(".tiles")
        shutil.rmtree(staging, ignore_errors=True)
        for split, files in (("train", TRAIN_PHOTOGRAPHS), ("test", TEST_PHOTOGRAPHS)):
            (staging / split).mkdir(parents=True)
            for path in photographs(files):
                for number, tile in enumerate(random_windows(Image.open(path).convert("RGB"), per_photograph, seed)):
                    tile.save(staging / split / f"{path.stem}_{number:04d}.png", compress_level=1)
        move_into_place(staging, folder)
    return {split: sum(1 for _ in (folder / split).iterdir()) for split in ("train", "test")}


def random_windows(photograph: Image.Image, count: int, seed: int) -> list[Image.Image]:
    """Square windows at random places, sides log-uniform from 64 px to 0.7 of the shorter side, resized to 64 px."""
    rng = np.random.default_rng(seed)
    width, height = photograph.size
    grey = np.asarray(photograph.convert("L"), dtype=np.float32)
    windows: list[Image.Image] = []
    while len(windows) < count:
        side = round(np.exp(rng.uniform(np.log(SMALLEST_WINDOW), np.log(LARGEST_WINDOW * min(width, height)))))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        if grey[top : top + side, left : left + side].std() >= SMALLEST_CONTRAST:
            box = (left, top, left + side, top + side)
            windows.append(photograph.resize((TILE, TILE), Image.Resampling.LANCZOS, box=box))
    return windows


# ---- two runs side by side ----


def make_lanes(output: Path) -> list[Lane]:
    """The base and the same with reconstruction, with half of the cores each."""
    from hf_equissl.recipes import Recipe

    weight = Recipe.load(RECIPE).objectives.equivariance[0]["weight"]
    without = ("--objectives.equivariance.0.weight", "0")
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    half = len(cpus) // 2
    return [
        Lane("lambda = 0", "encoder_lambda0", output, without, cpus=frozenset(cpus[:half])),
        Lane(f"lambda = {weight:g}", "encoder", output, cpus=frozenset(cpus[half:] if half else ())),
    ]


def follow(lanes: Sequence[Lane], work: Callable[[Lane], None]) -> None:
    """Do the work of all lanes side by side, or one after the other on a single core, and say how far they are.

    Raises:
        QuickstartError: The first one of a lane; the other lanes are stopped.
    """
    start, live = time.monotonic(), sys.stdout.isatty()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=min(cores, len(lanes))) as pool:
        futures: list[Future[None]] = [pool.submit(work, lane) for lane in lanes]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5 if live else 15.0, return_when=FIRST_EXCEPTION)
                _say_progress(lanes, time.monotonic() - start, live)
                for future in done:
                    future.result()
        finally:
            for future in futures:
                future.cancel()
            for lane in lanes:
                if lane.process is not None and lane.process.poll() is None:
                    lane.process.terminate()
            if live:
                print()


def _say_progress(lanes: Sequence[Lane], seconds: float, live: bool) -> None:
    text = f"[{clock(seconds)}]  " + "   |   ".join(f"{lane.title}: {lane.progress()}" for lane in lanes)
    print(f"\r{text:<100}" if live else text, end="" if live else "\n", flush=True)


def environment() -> dict[str, str]:
    """One thread per command, and large buffers kept by the allocator: returned, each step would fault them in again."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "8589934592",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**defaults, **os.environ}


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16; others would emulate it, slower than float32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


# ---- results ----


def write_results(lanes: Sequence[Lane]) -> str:
    """``results.json``, ``results.md`` and ``r2.png`` of all lanes; returns the table as text."""
    from hf_equissl.evaluation import load_records, markdown_table, plain_table, plot_r2, save_records
    from hf_equissl.files import write_text

    output = lanes[0].output
    records = {lane.title: load_records(lane.probes / "results.json") for lane in lanes}
    save_records([record for found in records.values() for record in found], output / "results.json")
    shown = [
        replace(record, encoder=title) for title, found in records.items() for record in found if record.metric == "r2"
    ]
    write_text(output / "results.md", markdown_table(shown))
    figure = plot_r2(shown)
    figure.axes[0].set_title("What frozen features say about g, on held-out photographs", fontsize="medium")
    figure.savefig(output / "r2.png", dpi=150)
    return plain_table(shown)


def draw(lanes: Sequence[Lane]) -> None:
    """``loss.png`` and ``reconstructions.png``."""
    from hf_equissl.figures import plot_losses

    output = lanes[0].output
    panels = {"loss_ssl": "VICReg loss", "reconstruction/loss_recon": "reconstruction error (MSE)"}
    plot_losses({lane.title: loss_history(lane.run) for lane in lanes}, panels, output / "loss.png")
    draw_reconstructions(lanes[-1], output / "reconstructions.png")


def loss_history(run: Path) -> list[dict[str, Any]]:
    """Everything that a pretraining run has logged."""
    from hf_equissl.trainer import newest_checkpoint

    checkpoint = newest_checkpoint(run)
    return (
        [] if checkpoint is None else json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"]
    )
