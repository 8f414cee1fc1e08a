"""Measure how a training step scales over processes, and what communication takes of it: see ``--help``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.training.recipe_options import add_import, check_data, find_recipe, load_recipe, parse_words
from hf_equissl.utils.commands import check_at_least, command_parser, path_word, say, stop
from hf_equissl.utils.files import write_text
from hf_equissl.utils.suggestions import RecipeError

CONFIGS = Path(__file__).resolve().parent / "accelerate_configs"
QUIET = 0.95  # share of a core's time that a process gets which waits for nothing
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")

DESCRIPTION = """\
Weak scaling on one machine: seconds of a recipe's training step with the same images per process on more processes,
for each engine. Every measurement trains with the Trainer of pretrain.py in processes of its own, under an engine by
`accelerate launch` with its file in training/accelerate_configs; measurements take turns, --repeats times."""

EPILOG = """\
A step: views, forward, backward, clipping, optimizer, the teacher's update. Reading images is not in it. All processes
begin a step together, and it is over when the last one is done. On CPUs each process has one thread and, if there are
enough, a core of its own. What the columns say, with t1 the step of one process alone, side that of N processes at the
same time without any exchange, and tN that of N processes under the engine:
  s/step         tN, median of all steps of all rounds, with the smallest and the largest
  CPU s          processor time of one process, all its threads; waiting is not in it
  efficiency     t1 / tN
  sharing        (side - t1) / tN: lost because processes share memory, caches and power
  exposed        (tN - side) / tN: what the engine adds to the same computations side by side: communication that
                 no computation hides, copies into buckets or shards, loss terms of the whole batch
  in collectives share of the step in which a collective is under way, hidden or not, waiting for others included; by
                 PyTorch's profiler, in --profiled further steps
efficiency + sharing + exposed = 1. They are medians of the rounds, the smallest and the largest in brackets: where
those are far apart, something else runs on the machine.

examples:
  python training/scaling.py --recipe vits16_vicreg_rot --engines ddp fsdp2 --processes 2 4 8 --batch_size 64
  python training/scaling.py --recipe cifar10_vicreg_rot --processes 2 --batch_size 32 --output_dir runs/scaling
"""


def main(argv: Sequence[str] | None = None, script: Path | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for what can be mended, 1 for a measurement that failed.

    Args:
        argv: Words of the command line.
        script: What is launched to measure: it calls this function. By default this file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        options, overrides = parse_words(_parser(), words)
        check_at_least(options, batch_size=1, steps=1, warmup=1, profiled=0, repeats=1, processes=1)
        find_recipe(options.recipe)
        if options.data is not None:
            check_data(options.data)
    except ValueError as error:
        return stop(error, code=2)

    from hf_equissl.benchmarking import scaling, step_clock
    from hf_equissl.distributed.agreement import end_process

    try:
        task = step_clock.given_task()
        recipe, steps = _read(options, overrides, task)
        if task is not None:
            step_clock.measure(recipe, task, steps)
            end_process(0)
        _check(recipe, options, script)
        report = _measure(recipe, steps, options, script or Path(__file__).resolve(), words)
        if options.output_dir is not None:
            path = Path(options.output_dir) / "scaling.json"
            write_text(path, json.dumps(report, indent=2) + "\n")
            say(f"\nWritten to {path}")
    except (ValueError, OSError) as error:
        return stop(error, code=2)
    except scaling.MeasurementError as error:
        return stop(error, code=1)
    return 0


def _read(options: argparse.Namespace, overrides: dict[str, Any], task: Any) -> tuple[Any, Any]:
    """Read the recipe as it is measured, and the steps."""
    from hf_equissl.benchmarking.overhead import check_random_weights
    from hf_equissl.benchmarking.scaling import settings
    from hf_equissl.benchmarking.step_clock import Steps

    steps = Steps(options.warmup, options.steps, options.profiled)
    own = settings(steps, options.batch_size)
    if clash := overrides.keys() & (own.keys() | {"data.source"}):
        options_of = {"training.per_device_train_batch_size": "--batch_size", "training.max_steps": "--steps"}
        options_of["data.source"] = "--data"
        key = min(clash)
        hint = f" Use {options_of[key]}." if key in options_of else ""
        raise RecipeError(f"--{key}: the measurement sets this itself.{hint}")
    source = options.data or (task and task.images)
    recipe = load_recipe(options.recipe, overrides | own | {"data.source": source})
    check_random_weights(recipe)
    return recipe, steps


def _check(recipe: Any, options: argparse.Namespace, script: Path | None) -> None:
    """Refuse what every measurement would, before the first one."""
    import torch

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else None
    if devices is not None and max(options.processes) > devices:
        raise RecipeError(f"--processes {max(options.processes)}: this machine has {devices} devices.")
    if devices is None and "fsdp2" in options.engines and script is None:
        raise RecipeError("--engines fsdp2: accelerate has no FSDP2 on CPUs. Measure ddp, or use a machine with GPUs.")
    if options.data is not None:
        recipe.build_source()


def _measure(
    recipe: Any, steps: Any, options: argparse.Namespace, script: Path, words: Sequence[str]
) -> dict[str, Any]:
    """Measure all that was asked for, and print it as it comes."""
    from hf_equissl.benchmarking import scaling
    from hf_equissl.benchmarking.timing import environment
    from hf_equissl.distributed.engines import Engine
    from hf_equissl.training.side_by_side import ENVIRONMENT
    from hf_equissl.utils.devices import choose_device

    device = choose_device("auto")
    args = recipe.build_training_arguments("unused")
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps
    wanted = scaling.setups([Engine(name) for name in dict.fromkeys(options.engines)], options.processes)
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "settings": {
            "model": recipe.model,
            "objectives": vars(recipe.objectives),
            "images_per_process_and_step": images,
            "steps": vars(steps),
            "repeats": options.repeats,
            "images": "synthetic" if options.data is None else Path(options.data).name,
        },
        "environment": {**environment(device), "threads": 1},
    }
    say(_header(report, options))
    with tempfile.TemporaryDirectory(prefix="equissl-scaling-") as folder:
        files = None
        if options.data is None:
            count = options.batch_size * max(setup.count for setup in wanted) * args.gradient_accumulation_steps
            files = scaling.write_images(Path(folder) / "images", count, recipe.build_encoder_config().image_size)
        launcher = scaling.Launcher(script, words, CONFIGS, Path(folder), files, ENVIRONMENT, say)
        results = scaling.measure_rounds(launcher, wanted, options.repeats)
    report["setups"] = scaling.summarize(results, images)
    say("\n".join(_table(report["setups"])))
    return report


def _header(report: dict[str, Any], options: argparse.Namespace) -> str:
    settings, where = report["settings"], report["environment"]
    steps = settings["steps"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("hf_equissl", "torch", "transformers", "accelerate"))
    return (
        f"{report['recipe']}: {settings['images_per_process_and_step']} images per process and step, "
        f"{settings['images']} images\n"
        f"{options.repeats} rounds of {steps['timed']} steps after {steps['warmup']}, and {steps['profiled']} more "
        "under the profiler\n"
        f"{where['device']}; {where['cpu']}\n"
        f"{versions}, commit {where['commit'] or 'unknown'}"
    )


def _table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    names = [f"{row['setup']} ({row['wrapped']})" for row in rows]
    width = max(map(len, names))
    shares = ("efficiency", "sharing", "exposed", "collectives")
    heads = (*shares[:3], "in collectives")
    yield f"\n{'':<{width}}{'s/step':>9}{'smallest, largest':>20}{'images/s':>10}{'CPU s':>8}" + "".join(
        f"{head:>24}" for head in heads
    )
    for name, row in zip(names, rows, strict=True):
        spread = f"{row['seconds_min']:.3f}, {row['seconds_max']:.3f}"
        cells = "".join(f"{_share(row, share):>24}" for share in shares)
        yield (
            f"{name:<{width}}{row['seconds']:>9.3f}{spread:>20}{row['images_per_second']:>10.1f}"
            f"{row['cpu_seconds']:>8.2f}{cells}"
        )
    if rows[0]["cores"] is None:
        return
    shared = [row["setup"] for row in rows if row["cores"] > 1]
    yield "each process: 1 thread, and a core of its own" + (f" except in {', '.join(shared)}" if shared else "")
    got = min(row["cpu_seconds"] / row["seconds"] for row in rows if row["engine"] == "single" and row["cores"] == 1)
    if got < QUIET:
        yield f"note: without any exchange processes got {100 * got:.0f} % of their cores: something else runs on them"


def _share(row: dict[str, Any], name: str) -> str:
    rounds = row[f"{name}_rounds"]
    if rounds is None:
        return "-"
    low, high = 100 * min(rounds), 100 * max(rounds)
    return f"{100 * row[name]:.1f} % ({low:.1f}, {high:.1f})"


def _parser() -> argparse.ArgumentParser:
    usage = "scaling.py --recipe NAME|PATH [options] [--section.key VALUE ...]"
    parser = command_parser("scaling.py", usage=usage, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("--recipe", type=path_word, metavar="NAME|PATH", required=True, help="a recipe that ships, or a YAML file")
    add("--engines", nargs="+", default=["ddp"], choices=ENGINES, help="default: ddp")
    add(
        "--processes",
        nargs="+",
        type=int,
        default=[1, 2],
        metavar="N",
        help="numbers of processes; default: 1 2. One alone, without an engine, is always measured: the baseline",
    )
    add("--batch_size", type=int, default=8, metavar="N", help="images per process (and accumulated part); default: 8")
    add("--steps", type=int, default=10, metavar="N", help="timed steps in each round; default: 10")
    add("--warmup", type=int, default=3, metavar="N", help="steps before them that do not count; default: 3")
    add("--profiled", type=int, default=2, metavar="N", help="steps after them under the profiler; default: 2; 0: none")
    add("--repeats", type=int, default=3, metavar="N", help="rounds; default: 3")
    add("--data", type=path_word, metavar="SOURCE", help="images as pretrain.py takes them; without: synthetic ones")
    add("--output_dir", type=path_word, metavar="DIR", help="scaling.json goes here")
    add_import(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
