"""Measure what equivariance objectives cost per training step, and the loader: see ``--help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from hf_equissl.recipes.sweep import group_by_system, is_sweep, read_sweep
from hf_equissl.training.recipe_options import RECIPES, add_import, check_data, find_recipe, load_recipe, parse_words
from hf_equissl.utils.commands import check_at_least, command_parser, path_word, say, stop
from hf_equissl.utils.files import write_text
from hf_equissl.utils.suggestions import RecipeError, check_known

BATCH_SIZE = 32

DESCRIPTION = """\
Time a training step of a recipe with lambda > 0 against the same step with lambda = 0, or with --base against that of
another recipe (views, forward, backward, optimizer; in turns, on one device). Of a sweep, time each system in this way.
With --data also time the loader, and its parts, against a plain Pillow loop that cuts the same crops. Or, with
--utilisation, measure how well steps use the device: images/s, memory, share of its peak, waits; eager and compiled."""

EPILOG = """\
On a CPU, first:
  export OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184
Threads: at most the real cores; one gives the steadiest ratios. Where other programs run, times by the clock lengthen;
with one thread the ratio of processor times stays good.

examples:
  python training/benchmark.py --recipe vits16_vicreg_rot --data ./photos --output_dir runs/benchmark
  python training/benchmark.py --recipe vits16_vicreg_rot --batch_size 8 --dtype bf16 --model.image_size 96
  python training/benchmark.py --recipe vits16_ibot_se2 --data ./photos --loader_only
  python training/benchmark.py --recipe cifar10_systems --only vicreg_rot sie_all moco_v3_essl
  python training/benchmark.py --recipe device_steps --utilisation      # a GPU, in minutes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what can be mended."""
    try:
        options, overrides = parse_words(_parser(), argv)
        _check_utilisation(options)
        check_at_least(options, repeats=1, loader_images=1, **({} if options.batch_size is None else {"batch_size": 1}))
        if options.data is not None:
            check_data(options.data)
            overrides |= {"data.source": options.data, "data.streaming": False}
        if options.loader_only:
            report = _measure_loader(overrides, options)
        elif options.utilisation:
            report = _measure_utilisation(overrides, options)
        elif is_sweep(path := find_recipe(options.recipe)):
            report = _measure_sweep(path, overrides, options)
        else:
            report = _measure_recipe(overrides, options)
        if options.output_dir is not None:
            path = Path(options.output_dir) / "benchmark.json"
            write_text(path, json.dumps(report, indent=2) + "\n")
            say(f"\nWritten to {path}")
    except (ValueError, OSError) as error:
        return stop(error, code=2)
    return 0


def _check_utilisation(options: argparse.Namespace) -> None:
    """Refuse what does not go together with ``--utilisation``, or without it.

    Raises:
        RecipeError: It names the option.
    """
    if options.device_tflops is not None and not 0 < options.device_tflops < float("inf"):
        raise RecipeError(f"--device_tflops {options.device_tflops:g}: expected a number above 0.")
    wrong = ("base", "data", "loader_only", "memory") if options.utilisation else ("modes", "device_tflops")
    if given := [name for name in wrong if getattr(options, name)]:
        word = "does not go with --utilisation" if options.utilisation else "is read with --utilisation alone"
        raise RecipeError(f"--{given[0]} {word}. Leave it out.")


def _measure_recipe(overrides: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one recipe against its base, and print it as it comes."""
    if options.only is not None:
        raise RecipeError(f"--only chooses systems of a sweep, and {options.recipe} is a recipe. Leave it out.")
    recipe = load_recipe(options.recipe, overrides)
    common = {key: value for key, value in overrides.items() if not key.startswith("objectives.")}
    options.batch_size = options.batch_size or BATCH_SIZE
    return _measure(recipe, options.base and load_recipe(options.base, common), options)


def _measure_loader(overrides: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure the loader of a recipe, with no training beside it.

    Raises:
        RecipeError: There are no images, or the recipe is a sweep.
    """
    if options.data is None:
        raise RecipeError("--loader_only reads images: name them with --data.")
    if is_sweep(find_recipe(options.recipe)):
        raise RecipeError(f"--loader_only is for one recipe, and {options.recipe} is a sweep.")
    import torch

    from hf_equissl.benchmarking.loader import find_needs
    from hf_equissl.benchmarking.timing import environment

    recipe = load_recipe(options.recipe, overrides)
    pipeline = recipe.build_pipeline(find_needs(recipe))
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "settings": {"repeats": options.repeats, "images": Path(options.data).name},
        "environment": environment(torch.device("cpu")),
    }
    say(f"{recipe.name}\n{pipeline.describe()}\n{report['environment']['cpu']}; torch {torch.__version__}")
    return report | _time_loader(recipe, pipeline, options)


def _time_loader(recipe: Any, pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Time the loader of a recipe, and print what it gave."""
    from hf_equissl.benchmarking.loader import time_loader
    from hf_equissl.data import ImageViewDataset

    dataset = ImageViewDataset(recipe.build_source(), pipeline, seed=0)
    timing = time_loader(dataset, options.loader_images, options.repeats, options.batch_size or BATCH_SIZE)
    say("\n".join(_loader_lines(timing)))
    return {"loader": timing}


def _choose_systems(path: Path, overrides: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Load the recipe of each system of a sweep, one seed of each.

    Raises:
        RecipeError: An option is not for sweeps, or a name is unknown.
    """
    from hf_equissl.recipes.recipe import Recipe

    for name in ("base", "data", "memory"):
        if getattr(options, name):
            raise RecipeError(f"--{name} is for one recipe, and {path.stem} is a sweep. Leave it out.")
    if len(options.dtype or "1") > 1:
        raise RecipeError("--dtype: of a sweep one precision is measured. Name one.")
    groups = group_by_system(read_sweep(path, [RECIPES]))
    for name in options.only or ():
        check_known(name, groups, "--only")
    chosen = {name: group[0] for name, group in groups.items() if name in (options.only or groups)}
    return {
        name: Recipe.load(member.recipe, member.overrides | overrides, search=[RECIPES])
        for name, member in chosen.items()
    }


def _measure_utilisation(overrides: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure how well steps of a recipe, or of each system of a sweep, use the device; print them as they come."""
    from hf_equissl.benchmarking import utilisation
    from hf_equissl.benchmarking.timing import environment
    from hf_equissl.utils.devices import choose_device, choose_precision

    path = find_recipe(options.recipe)
    if is_sweep(path):
        recipes = _choose_systems(path, overrides, options)
    else:
        recipes = {path.stem: load_recipe(options.recipe, overrides)}
    device = choose_device(options.device)
    dtype = (options.dtype or [choose_precision("auto", device)])[0]
    peak = utilisation.find_peak(device, dtype, options.device_tflops)
    report: dict[str, Any] = {
        "recipe": path.stem,
        "settings": {"dtype": dtype, "repeats": options.repeats, "images": "synthetic"},
        "environment": environment(device),
        "peak": asdict(peak),
        "systems": {},
    }
    where = report["environment"]
    say(f"{where['device']}; {where['cpu']}; threads: {where['threads']}; {dtype}")
    say(f"peak: {peak.tflops:.3g} TFLOP/s ({peak.source})")
    width = max(map(len, recipes))
    say(f"{'':<{width}}{utilisation.header()}")
    measured = utilisation.measure_systems(
        recipes, device, dtype, options.repeats, options.batch_size, options.modes or utilisation.MODES
    )
    for system, use in measured:
        said = use if isinstance(use, str) else asdict(use)
        report["systems"].setdefault(system, []).append(said)
        say(
            f"{system:<{width}}  {use}"
            if isinstance(use, str)
            else f"{system:<{width}}{utilisation.use_line(use, peak)}"
        )
    return report


def _measure_sweep(path: Path, overrides: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure each system of a sweep against its own base, and print them as they come."""
    from tqdm.auto import tqdm

    from hf_equissl.benchmarking.systems import time_systems
    from hf_equissl.benchmarking.timing import environment
    from hf_equissl.utils.devices import choose_device, choose_precision

    recipes = _choose_systems(path, overrides, options)
    device = choose_device(options.device)
    dtype = (options.dtype or [choose_precision("auto", device)])[0]
    report: dict[str, Any] = {
        "recipe": path.stem,
        "settings": {
            "dtype": dtype,
            "repeats": options.repeats,
            "images": "synthetic",
            "overrides": {key: value for key, value in overrides.items() if key != "imports"},
        },
        "environment": environment(device),
        "systems": {},
    }
    where = report["environment"]
    say(f"{path.stem}: each system against itself with every lambda = 0, steps in turns; {dtype}")
    say(f"{where['device']}; {where['cpu']}; threads: {where['threads']}")
    width = max(map(len, recipes))
    say(
        f"{'system':<{width}}{'batch':>7}{'base, ms':>10}{'step, ms':>10}{'more':>9}{'range':>18}{'processor time':>16}"
    )
    timings = time_systems(recipes, device, dtype, options.repeats, options.batch_size)
    for name, timing in tqdm(
        timings, desc="systems", total=len(recipes), unit="system", disable=not sys.stderr.isatty()
    ):
        report["systems"][name] = timing
        say(f"{name:<{width}}{_system_line(timing)}")
    return report


def _system_line(timing: dict[str, Any]) -> str:
    line = f"{timing['batch_size']:>7}{1000 * timing['base_wall']:>10.1f}{1000 * timing['wall']:>10.1f}"
    if "ratios" not in timing:
        return f"{line}{'a base':>9}"
    low, high = (100 * (choose(timing["ratios"]) - 1) for choose in (min, max))
    between = f"{low:+.1f} to {high:+.1f}"
    return f"{line}{100 * timing['overhead']:>+8.1f}%{between:>18}{100 * timing['cpu_overhead']:>+15.1f}%"


def _measure(recipe: Any, base: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all that was asked for, and print it as it comes."""
    from hf_equissl.benchmarking import overhead as benchmark
    from hf_equissl.benchmarking.loader import first_images
    from hf_equissl.benchmarking.timing import environment
    from hf_equissl.utils.devices import choose_device, choose_precision

    device = choose_device(options.device)
    source = None if options.data is None else recipe.build_source()
    if source is None:
        images = benchmark.synthetic_images(options.batch_size, recipe.build_encoder_config().image_size)
    else:
        images = first_images(source, options.batch_size)
    recipes = benchmark.both_recipes(recipe, base)
    sides = benchmark.build_sides(recipes, options.batch_size, device, images)
    report: dict[str, Any] = {
        "recipe": recipe.name,
        "base": f"{recipe.name} with lambda = 0" if base is None else base.name,
        "settings": {
            "model": recipe.model,
            "objectives": vars(recipe.objectives),
            "transformation": recipe.views.transformation,
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "images": "synthetic" if source is None else Path(options.data).name,
        },
        "environment": environment(device),
        "steps": {},
    }
    say(_header(report))
    for dtype in options.dtype or dict.fromkeys(("fp32", choose_precision("auto", device))):
        timing = benchmark.time_steps(sides, dtype, options.repeats)
        timing["peak_memory_mib"] = (
            benchmark.peak_memory(recipes, sides, dtype) if options.memory else "not asked for (--memory)"
        )
        report["steps"][dtype] = timing
        say("\n".join([*_step_lines(dtype, timing), _paper_line(recipe.objectives.invariance["name"])]))
    if source is not None:
        report |= _time_loader(recipe, sides[benchmark.FULL].pipeline, options)
    return report


def _header(report: dict[str, Any]) -> str:
    settings, where = report["settings"], report["environment"]
    weights = {entry["name"]: entry["weight"] for entry in settings["objectives"]["equivariance"]}
    entries = ", ".join(f"{weight:g} for {name}" for name, weight in weights.items())
    versions = ", ".join(f"{name} {where[name]}" for name in ("hf_equissl", "torch", "transformers"))
    return (
        f"{report['recipe']} (lambda: {entries}) against {report['base']}\n"
        f"batch {settings['batch_size']}, {settings['images']} images\n"
        f"{where['device']}; {where['cpu']}; threads: {where['threads']}\n"
        f"{versions}, commit {where['commit'] or 'unknown'}"
    )


def _step_lines(dtype: str, timing: dict[str, Any]) -> Iterator[str]:
    from hf_equissl.benchmarking.overhead import BASE, EQUIVARIANCE_BACKWARD, FULL, PARTS

    base, full = timing["sides"][BASE], timing["sides"][FULL]
    rows = [("step, median", "wall"), ("step, fastest", "wall_min"), ("step, processor time", "cpu")]
    values = [(label, base[key], full[key]) for label, key in rows]
    values += [(f"  {part}", base["parts"][part], full["parts"][part]) for part in PARTS]
    values.append((f"  {EQUIVARIANCE_BACKWARD}, alone", 0.0, full["parts"][EQUIVARIANCE_BACKWARD]))
    yield f"\n{dtype + ', ms':<34}{BASE:>12}{FULL:>12}{'more':>10}{'of a step':>11}"
    for label, without, with_it in values:
        more = with_it - without
        yield (
            f"{label:<34}{1000 * without:>12.1f}{1000 * with_it:>12.1f}{1000 * more:>+10.1f}"
            f"{100 * more / base['cpu' if 'processor' in label else 'wall']:>+10.2f}%"
        )
    memory = timing["peak_memory_mib"]
    if isinstance(memory, dict):
        without, with_it = memory[BASE], memory[FULL]
        share = 100 * (with_it / without - 1)
        yield f"{'peak memory, MiB':<34}{without:>12.0f}{with_it:>12.0f}{with_it - without:>+10.0f}{share:>+10.2f}%"
    else:
        yield f"peak memory: {memory}"
    each = " ".join(f"{100 * (ratio - 1):.2f}" for ratio in timing["ratios"])
    yield f"overhead of the reconstruction: {100 * timing['overhead']:+.2f} % of a step (median of {each})"
    yield (
        f"  by processor time {100 * timing['cpu_overhead']:+.2f} %; sum of its parts "
        f"{100 * timing['parts_overhead']:+.2f} %, by processor time {100 * timing['parts_cpu_overhead']:+.2f} %"
    )


def _paper_line(method: str) -> str:
    from hf_equissl.benchmarking.overhead import PAPER_OVERHEADS

    if method not in PAPER_OVERHEADS:
        return f"  the paper states no overhead for {method}"
    encoder, share = PAPER_OVERHEADS[method]
    return f"  the paper's ({encoder}, {method}, GPUs): {100 * share:+.1f} %; aim: at most half, {50 * share:+.2f} %"


def _loader_lines(loader: dict[str, Any]) -> Iterator[str]:
    from hf_equissl.benchmarking.loader import PARTS, PLAIN, PLAIN_PARTS

    yield f"\nloader, one process, one thread, {loader['images']} images; {loader['decoder']}"
    yield f"{'':<26}{'images/s':>10}{'by processor time':>20}{'against plain':>16}{'range':>16}"
    for name, rate in loader["rates"].items():
        line = f"{name:<26}{rate:>10.1f}{loader['cpu_rates'][name]:>20.1f}"
        if name != PLAIN:
            ratios = loader["cpu_ratios"][name]
            between = f"{min(ratios):.2f} to {max(ratios):.2f}"
            line += f"{median(ratios):>16.2f}{between:>16}"
        yield line
    for title, names in (("loader", PARTS), ("plain", PLAIN_PARTS)):
        parts = ", ".join(f"{name.removeprefix('plain ')} {loader['parts'][name]:.0f}" for name in names)
        yield f"microseconds of processor time per image, {title}: {parts}"


def _parser() -> argparse.ArgumentParser:
    usage = "benchmark.py --recipe NAME|PATH [options] [--section.key VALUE ...]"
    parser = command_parser("benchmark.py", usage=usage, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add(
        "--recipe",
        type=path_word,
        metavar="NAME|PATH",
        required=True,
        help="a recipe or sweep that ships, or a YAML file",
    )
    add(
        "--base",
        type=path_word,
        metavar="NAME|PATH",
        help="a recipe to compare with; default: the same with lambda = 0",
    )
    add("--only", nargs="+", metavar="SYSTEM", help="of a sweep: its members' names without the seed; default: all")
    text = f"images per step; default: {BATCH_SIZE}, of a sweep each recipe's own per device"
    add("--batch_size", type=int, metavar="N", help=text)
    add(
        "--dtype",
        nargs="+",
        choices=["fp32", "bf16"],
        help="bf16: autocast; default: both where the device has units for bf16, else fp32",
    )
    add("--repeats", type=int, default=5, metavar="N", help="timed steps of each kind, in turns; default: 5")
    add(
        "--data",
        type=path_word,
        metavar="SOURCE",
        help="images for the steps and for the loader; without: synthetic, no loader",
    )
    add("--loader_images", type=int, default=128, metavar="N", help="images per pass of the loader; default: 128")
    add("--loader_only", action="store_true", help="no training steps: the loader alone, of any recipe")
    add("--device", default="auto", help="auto (an accelerator if there is one), cpu, cuda ...")
    text = "how well steps use the device, instead; of the recipe, or of each system of the sweep"
    add("--utilisation", action="store_true", help=text)
    add("--modes", nargs="+", choices=["eager", "compiled"], help="with --utilisation; default: both")
    text = "peak of the device for --utilisation, in 10^12 operations per second; default: its data sheet, or measured"
    add("--device_tflops", type=float, metavar="N", help=text)
    add("--memory", action="store_true", help="peak memory, too; on a CPU that runs each step in a new process")
    add("--output_dir", type=path_word, metavar="DIR", help="benchmark.json goes here")
    add_import(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
