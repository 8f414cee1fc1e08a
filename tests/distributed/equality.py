"""The same recipe under every engine, side by side: loss curves and final encoders against one process.

    python tests/distributed/equality.py [--steps 20] [--engines ddp fsdp2 ...] [--recipes ...] [--data ...]

Each run trains the whole model of the recipe with its own batch, learning rate and warm-up, in fp32 and from one seed,
on CPU processes; what differs is printed, and the command fails above 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.distributed.launching import ENGINES, run  # noqa: E402

TOLERANCE = 1e-4
RECIPES = ("cifar10_vicreg_rot", "cifar10_ibot_rot")
CONTROL = "nudged"
# What differs from the recipes, for all engines alike, and why.
SETTINGS = {
    "cifar10_vicreg_rot": ("--training.learning_rate", "2e-4"),
    "cifar10_ibot_rot": (
        "--training.freeze_last_layer_by", "learning_rate", "--training.freeze_last_layer_epochs", "0.1",
    ),
}  # fmt: skip
REASONS = {
    "cifar10_vicreg_rot": "a tenth of the recipe's: with all of it, rounding grows beyond 1e-4 in 20 steps, on one "
    "process as well",
    "cifar10_ibot_rot": "DeepSpeed cannot drop the prototypes' gradients; they are let go after 10 steps, not 100",
}
# The gradient of these is 0 but for rounding, which Adam turns into steps of full size: attention ignores what is added
# to all keys alike, and VICReg's batch normalisation what is added to all images alike.
IDLE = {
    "cifar10_vicreg_rot": ("attention.k_proj.bias", "stem.bias"),
    "cifar10_ibot_rot": ("attention.k_proj.bias",),
}


@dataclass
class Measured:
    """What a run left.

    Attributes:
        wrapped: Class that wraps the model, and how many parameters are sharded.
        curve: Step -> the logged loss and all its parts.
        norms: Of all gradients before clipping, by step.
        encoder: Final weights.
        seconds: Per step, median without the first.
    """

    wrapped: str
    curve: dict[int, dict[str, float]]
    norms: list[float]
    encoder: dict[str, Tensor]
    seconds: float


def train(
    engine: str, recipe: str, data: str, folder: Path, steps: int, options: tuple[str, ...] = (), batch: int = 128
) -> Measured:
    """Run ``recipe`` for ``steps`` steps of ``batch`` images, over all processes, into ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    more = {"EQUISSL_NUDGE": "1"} if engine == CONTROL else {}
    engine = "single" if engine == CONTROL else engine
    each = batch if engine == "single" else batch // 2
    words = ["--recipe", recipe, "--data", data, "--output_dir", str(folder), "--training.max_steps", str(steps)]
    words += ["--training.per_device_train_batch_size", str(each), "--training.logging_steps", "1"]
    words += ["--training.save_steps", str(steps), "--training.bf16", "false", "--monitor.every_steps", "null"]
    result = run(engine, *words, *SETTINGS[recipe], *options, timeout=60.0 + 60.0 * steps, variables=more)
    if result.returncode:
        raise RuntimeError(f"{engine}, {recipe}: exit code {result.returncode}\n{result.stderr[-4000:]}")
    return read(folder, steps, result.stdout)


def read(folder: Path, steps: int, output: str) -> Measured:
    """What the run in ``folder`` left and said."""
    history = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    curve = {
        entry["step"]: {key: value for key, value in entry.items() if "loss" in key or "/" in key}
        for entry in history
        if "loss" in entry
    }
    wrapped = re.search(r"^wrapped: (\S+) (\d+)$", output, re.M)
    seconds = re.search(r"^seconds per step: (\S+)$", output, re.M)
    return Measured(
        wrapped=f"{wrapped[1]}, {wrapped[2]} sharded" if wrapped else "?",
        curve=curve,
        norms=[entry["grad_norm"] for entry in history if "grad_norm" in entry],
        encoder=load_file(folder / "encoder" / "model.safetensors"),
        seconds=float(seconds[1]) if seconds else float("nan"),
    )


def curve_difference(one: Measured, other: Measured) -> float:
    """Largest difference of the loss or one of its parts at any step, relative to the step's loss."""
    assert one.curve.keys() == other.curve.keys(), (one.curve.keys(), other.curve.keys())
    return max(
        abs(value - other.curve[step][key]) / abs(parts["loss"])
        for step, parts in one.curve.items()
        for key, value in parts.items()
    )


def encoder_difference(one: Measured, other: Measured) -> float:
    """Norm of the difference of all weights, relative to the norm of the weights."""
    assert one.encoder.keys() == other.encoder.keys(), one.encoder.keys() ^ other.encoder.keys()
    distance = sum(float((w.double() - other.encoder[n].double()).square().sum()) for n, w in one.encoder.items())
    return (distance / sum(float(w.double().square().sum()) for w in one.encoder.values())) ** 0.5


def weight_difference(one: Measured, other: Measured, but: tuple[str, ...] = ()) -> tuple[float, str]:
    """Largest difference of one weight, absolute, and its tensor; without tensors whose names end in one of ``but``."""
    names = [name for name in one.encoder if not name.endswith(but)] if but else list(one.encoder)
    return max((float((one.encoder[n].double() - other.encoder[n].double()).abs().max()), n) for n in names)


def main() -> int:
    """Print the table; returns 1 if a run differs by more than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("EQUISSL_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--data", default=f"{default}/cifar10", help="CIFAR-10: a folder, parquet files or a Hub id")
    parser.add_argument("--output_dir", help="where the runs are kept; by default they are not")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in options.recipes:
            folder = Path(options.output_dir or scratch)
            failed |= _table(recipe, [e for e in options.engines if e != "single"], options.data, folder, options.steps)
    _say(f"""
curve: largest difference to one process, of the loss or one of its parts at any step, relative to the step's loss
encoder: norm of the final weights' difference, relative to their norm
weight: largest difference of one final weight, absolute; without those whose gradient is nothing but rounding: key
  biases, and with VICReg the bias of the stem
{CONTROL}: one process, each initial weight changed in its last bit: what rounding alone comes to
pass: all three within {TOLERANCE:g}""")
    return int(failed)


def _table(recipe: str, engines: list[str], data: str, folder: Path, steps: int) -> bool:
    """Print one recipe's rows; returns whether an engine failed."""
    _say(f"{recipe}: {steps} steps of 128 images, fp32, PyTorch {torch.__version__}")
    if SETTINGS[recipe]:
        _say(f"  with {' '.join(SETTINGS[recipe])} ({REASONS[recipe]})")
    _say(
        f"  {'engine':<13} {'processes':>9}  {'wraps the model':<38} {'curve':>8} {'encoder':>8} {'weight':>8} "
        f"{'s/step':>7}"
    )
    reference, failed = None, False
    for engine in ["single", CONTROL, *engines]:
        found = train(engine, recipe, data, folder / f"{recipe}-{engine}", steps)
        reference = reference or found
        weight, name = weight_difference(reference, found, but=IDLE[recipe])
        differences = (curve_difference(reference, found), encoder_difference(reference, found), weight)
        passed = max(differences) <= TOLERANCE
        failed |= not passed
        verdict, processes = "pass" if passed else f"FAIL ({name})", 2
        if engine in ("single", CONTROL):
            verdict, processes = "", 1
        numbers = " ".join(f"{number:>8.1e}" for number in differences)
        _say(f"  {engine:<13} {processes:>9}  {found.wrapped:<38} {numbers} {found.seconds:>7.2f}  {verdict}")
    return failed


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
