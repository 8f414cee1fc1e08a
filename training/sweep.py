"""Run the members of a sweep one after another: see ``--help``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.training.recipe_options import (
    RECIPES,
    add_import,
    check_data,
    find_recipe,
    import_words,
    parse_words,
    set_value,
)
from hf_equissl.utils.commands import command_parser, path_word, say, stop
from hf_equissl.utils.suggestions import RecipeError

PRETRAIN = Path(__file__).resolve().parent / "pretrain.py"
SECONDS_TO_SAVE, SECONDS_TO_END = 120, 20
LAUNCHER = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]

EPILOG = """\
what stands behind -- goes to `accelerate launch`; every --section.key VALUE goes to all runs, after their own values.
Run the same command again to go on: finished runs are skipped, an interrupted one resumes from its newest checkpoint.
A run that SIGTERM, SIGUSR1 or SIGHUP stops (pretrain.py --help) stops the sweep, with code 75.

examples:
  python training/sweep.py --recipe vits16_ibot_sweep --list
  python training/sweep.py --recipe vits16_ibot_sweep --data ILSVRC/imagenet-1k --output_dir runs/sweep \\
      -- --num_machines 2 --num_processes 16
  python training/sweep.py --recipe vits16_ibot_sweep --only weight-1.0_equivariant-2048 --dry_run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 2 for what can be mended before the first run, 1 if a run failed, 75 if stopped."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    try:
        options, overrides = parse_words(_parser(), words[:split])
        members = read_members(options, overrides)
        if options.list:
            say(_listing(members))
            return 0
        if options.dry_run:
            return dry_run(members, overrides, options)
        check_output_dir(options)
        recipes = load_recipes(members, overrides)
    except RecipeError as error:
        return stop(error, code=2)
    try:
        return _run_all(members, recipes, overrides, words[split + 1 :], options)
    except KeyboardInterrupt:
        return stop("the same command goes on from here", code=130, word="stopped")


def read_members(options: argparse.Namespace, overrides: dict[str, Any]) -> list[Any]:
    """Read the chosen members, and put ``--data`` among the overrides for all of them."""
    from hf_equissl.recipes.sweep import choose, read_sweep

    members = choose(read_sweep(find_recipe(options.recipe), [RECIPES]), options.only or [])
    for member in members:
        if clash := overrides.keys() & member.overrides.keys():
            key = min(clash)
            raise RecipeError(f"--{key} would replace what {member.name} sets: {member.overrides[key]!r}.")
    if options.data is not None and not options.list:
        check_data(options.data)
    set_value(overrides, "data.source", "--data", options.data)
    return members


def check_output_dir(options: argparse.Namespace) -> None:
    """Raise ``RecipeError`` where no folder is named."""
    if options.output_dir is None:
        raise RecipeError("--output_dir is missing: each run gets a folder in it.")


def load_recipes(members: Sequence[Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Load the members' recipes, so that all are checked before the first one runs."""
    from hf_equissl.recipes.recipe import Recipe

    recipes = {}
    for member in members:
        try:
            recipes[member.name] = Recipe.load(member.recipe, member.overrides | overrides, search=[RECIPES])
        except RecipeError as error:
            raise RecipeError(f"{member.name}: {error}") from error
    return recipes


def _run_all(
    members: Sequence[Any],
    recipes: dict[str, Any],
    overrides: dict[str, Any],
    launch_options: list[str],
    options: argparse.Namespace,
) -> int:
    """Run one member after another; one that fails does not stop the next ones, one that was asked to stop does."""
    from hf_equissl.distributed.signals import EXIT_PREEMPTED, MARKER_FILE
    from hf_equissl.running.resume import is_finished

    failed: list[str] = []
    for number, member in enumerate(members, start=1):
        folder = Path(options.output_dir) / member.name
        head = f"[{number}/{len(members)}] {member.name}"
        try:
            finished = is_finished(recipes[member.name], folder)
        except (OSError, ValueError) as error:  # its folder is damaged
            say(f"{head}: failed: {error}")
            failed.append(member.name)
            continue
        if finished:
            say(f"{head}: finished before, skipped ({folder})")
            continue
        say(f"{head}: running in {folder}")
        start = time.monotonic()
        code = _launch(
            [*LAUNCHER, *launch_options, str(PRETRAIN), *pretrain_words(member, overrides, folder)],
            folder / MARKER_FILE,
        )
        minutes = (time.monotonic() - start) / 60
        if code == EXIT_PREEMPTED:
            say(f"{head}: stopped by a signal after {minutes:.1f} min; the same command goes on from here")
            return EXIT_PREEMPTED
        say(f"{head}: {'done' if code == 0 else f'failed with code {code}'} after {minutes:.1f} min")
        if code != 0:
            failed.append(member.name)
    if failed:
        return stop(f"{len(failed)} of {len(members)} runs failed: {', '.join(failed)}", code=1)
    say(f"all {len(members)} runs are finished")
    return 0


def _launch(words: list[str], marker: Path) -> int:
    """Run one member, and pass a request to stop on to it; the code is the launcher's, or ``EXIT_PREEMPTED``."""
    from hf_equissl.distributed.signals import EXIT_PREEMPTED, STOP_SIGNALS, Signals, remove_marker

    remove_marker(marker.parent)  # an earlier start may have left it, and this one may end before it removes it
    with Signals() as signals:
        signals.raises = False
        process, told = subprocess.Popen(words), False
        try:
            while (code := process.poll()) is None:
                if signals.received and not told:
                    process.terminate()
                    told = True
                time.sleep(0.1)
        except KeyboardInterrupt:
            wait_for_end(process)
            raise
    if signals.received or -code in STOP_SIGNALS:
        # A launcher may die at once, while the run still saves: nobody must start it again meanwhile.
        end = time.monotonic() + SECONDS_TO_SAVE
        while not marker.exists() and time.monotonic() < end:
            time.sleep(0.5)
        return EXIT_PREEMPTED
    return EXIT_PREEMPTED if marker.exists() else code  # the launcher's code is its own


def wait_for_end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a launcher that Ctrl-C reached, too, so that nothing of it runs on; one that stays is made to end."""
    for end, seconds in ((None, SECONDS_TO_END), (process.terminate, SECONDS_TO_SAVE), (process.kill, None)):
        if end is not None:
            end()
        try:
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue


def pretrain_words(member: Any, overrides: dict[str, Any], folder: Path) -> list[str]:
    """Write the words after ``pretrain.py`` that train one member in ``folder``."""
    from hf_equissl.recipes.sweep import Member

    dotted = {key: value for key, value in overrides.items() if key != "imports"}
    everywhere = [*Member(member.name, member.recipe, dotted).words, *import_words(overrides)]
    return ["--recipe", str(member.recipe), "--output_dir", str(folder), *member.words, *everywhere]


def dry_run(members: Sequence[Any], overrides: dict[str, Any], options: argparse.Namespace) -> int:
    """Print a line for each run; of a single one all that pretrain.py says."""
    from hf_equissl.planning.assumptions import Speed
    from hf_equissl.training import pretrain

    if len(members) == 1:
        words = pretrain_words(members[0], overrides, Path(options.output_dir or "") / members[0].name)
        if options.output_dir is None:
            at = words.index("--output_dir")
            del words[at : at + 2]
        say(f"[1/1] {members[0].name}")
        return pretrain.main([*words, "--dry_run"])
    width = max(len(member.name) for member in members)
    for name, recipe in load_recipes(members, overrides).items():
        try:
            say(f"{name:<{width}}  {_cost_line(recipe)}")
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}") from error
    share = f"{100 * Speed().utilisation:g} %"
    say(f"{len(members)} runs, times at {share} of an A100's peak; --only NAME shows the whole plan of one")
    return 0


def _cost_line(recipe: Any) -> str:
    from hf_equissl.planning.assumptions import Speed
    from hf_equissl.running.run import prepare

    run = prepare(recipe, None, dry=True)
    plan, cost, speed = run.plan, run.cost(), Speed().of(run.args)
    size = f"{cost.parameters / 1e6:.4g} M parameters, {cost.flops / 1e9:.4g} GFLOP/image"
    hours = plan.hours(cost.flops, speed.utilisation, speed.peak)
    length = "steps unknown" if hours is None else f"{plan.steps} steps, {hours:.3g} h on {plan.processes} devices"
    return f"batch {plan.batch}, learning rate {plan.learning_rate:.4g}, {size}, {length}"


def _listing(members: Sequence[Any]) -> str:
    lines = []
    for member in members:
        lines += [member.name, f"    --recipe {member.recipe.stem}"]
        lines += [f"    --{key} {json.dumps(value)}" for key, value in member.overrides.items()]
    return "\n".join([*lines, f"{len(members)} runs"])


def _parser() -> argparse.ArgumentParser:
    usage = "sweep.py --recipe NAME|PATH --data SOURCE --output_dir DIR [options] [--section.key VALUE ...] [-- ...]"
    description = "Run the members of a sweep one after another, each in a folder of its own."
    parser = command_parser("sweep.py", usage=usage, description=description, epilog=EPILOG)
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser, listed: str = "names of the runs and what they set") -> None:
    """Add the options that say which runs of which sweep are meant, and where they go; ``listed``: by ``--list``."""
    add = parser.add_argument
    add("--recipe", type=path_word, metavar="NAME|PATH", help="a sweep that ships (vits16_ibot_sweep), or a YAML file")
    add("--data", type=path_word, metavar="SOURCE", help="as pretrain.py's, for all runs")
    add("--output_dir", type=path_word, metavar="DIR", help="each run gets the folder DIR/NAME")
    add("--list", action="store_true", help=f"{listed}; runs nothing")
    add("--only", nargs="+", metavar="NAME", help="these runs alone; a name without its seed: all of its seeds")
    add("--dry_run", action="store_true", help="size and cost of each run, of one its whole plan; trains nothing")
    add_import(parser)


if __name__ == "__main__":
    sys.exit(main())
