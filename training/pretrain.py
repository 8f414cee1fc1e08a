"""Pretrain an encoder from a recipe: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.distributed.signals import (
    EXIT_PREEMPTED,
    Preempted,
    Signals,
    end_command,
    listen_to_launcher,
    speaks_for_failure,
)
from hf_equissl.planning.assumptions import Speed
from hf_equissl.recipes.overrides import check_processes, resolve_recipe
from hf_equissl.training.recipe_options import (
    RECIPES,
    add_import,
    check_places,
    find_recipe,
    parse_words,
    recipe_lines,
    set_value,
)
from hf_equissl.utils.commands import command_parser, is_first_process, path_word, say, stop
from hf_equissl.utils.suggestions import RecipeError

EXAMPLES = """\
examples:
  # your own photographs, one GPU (or CPU)
  python training/pretrain.py --recipe vits16_vicreg_rot --data ./photos --output_dir runs/rot \\
      --training.per_device_train_batch_size 64 --training.num_train_epochs 100
  # what would that cost? shapes, parameters, FLOPs, memory, hours; trains nothing
  python training/pretrain.py --recipe vits16_vicreg_rot --data ./photos --dry_run --num_processes 1 \\
      --training.per_device_train_batch_size 64
  # and the largest recipe as it was written, without its data set: 64 GPUs
  python training/pretrain.py --recipe vitl16_dinov2_se2 --dry_run
  # go on from an encoder that exists, with the reconstruction added: a Hub id, a folder, or a .pth file of its authors
  python training/pretrain.py --recipe vits16_ibot_se2 --init_from facebook/dinov2-small --data ./photos \\
      --output_dir runs/dinov2_se2 --views.pipeline.local.size 98
  # as in the paper: 16 GPUs on 2 machines
  accelerate launch --num_machines 2 --num_processes 16 training/pretrain.py \\
      --recipe vits16_vicreg_rot --data ILSVRC/imagenet-1k --output_dir runs/rot
  # installed, without a checkout
  python -m hf_equissl.training.pretrain --recipe my_recipe.yaml --data data.parquet --output_dir runs/mine
"""

OVERRIDES = """\
every value of a recipe can be set on the command line, as --section.key VALUE (VALUE is read as YAML):
  --model.*        preset, and the fields of EquiSSLConfig: --model.image_size 96; beside --init_from also
                   --model.init_revision, --model.init_subfolder: see hf_equissl/running/initial_weights.py
  --objectives.*   --objectives.equivariance.0.weight 0.5, --objectives.equivariance '[]'
  --views.*        --views.transformation.name translation, --views.pipeline.crop_scale '[0.35, 1]'
  --data.*         source, split, column, streaming, max_bad_share ...: --data.column photo
  --monitor.*      kNN and effective rank during training: --monitor.every_steps 500 --monitor.test_images 1000
  --training.*     every field of EquiSSLTrainingArguments: --training.max_steps 1000 --training.bf16 true
"""


EXIT_CODES = """\
exit codes:
  0    finished
  1    stopped by an error; the message names the last complete checkpoint
  2    something can be mended before training: nothing was trained
  75   stopped by SIGTERM, SIGUSR1 or SIGHUP, with a checkpoint: the same command goes on as if nothing had been
  130  stopped by Ctrl-C, without a checkpoint: the same command goes on from the last one
A second signal, 5 s or more after the first, ends the run at once. Launchers answer with codes of their own, so code 75
also leaves DIR/PREEMPTED, which is gone when the run goes on. With several processes `accelerate launch` and torchrun
pass SIGTERM on and kill after 30 s (torchrun: --shutdown-timeout). SIGUSR1 kills the launcher, as any signal does
with one process; the run then stops as after SIGTERM. One process needs no launcher.
For Slurm: training/slurm/pretrain.sbatch.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (``EXIT_CODES``)."""
    try:
        with Signals() as signals:
            options, overrides = parse_words(_parser(), argv)
            if options.list_recipes:
                say(recipe_lines())
                return 0
            signals.output_dir = None if options.dry_run else options.output_dir
            return _run(*_read(options, overrides), options, signals)
    except RecipeError as error:
        return stop(error, code=2, speaks=speaks_for_failure())
    except Preempted as stopped:
        return stop(stopped, code=EXIT_PREEMPTED, word="preempted", speaks=is_first_process())
    except KeyboardInterrupt:
        reason = "The same command goes on from the last complete checkpoint."
        return stop(reason, code=130, word="interrupted", speaks=is_first_process())


def _read(options: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Read the recipe as plain data: its file, what it says, the overrides in it.

    Needs no torch, so that mistakes in words are answered at once.
    """
    set_value(overrides, "data.source", "--data", options.data)
    set_value(overrides, "model.init_from", "--init_from", options.init_from)
    path = find_recipe(options.recipe)
    raw = resolve_recipe(path, overrides, [RECIPES])
    if options.num_processes is not None and not options.dry_run:
        raise RecipeError("--num_processes belongs to --dry_run. To train on several, use `accelerate launch`.")
    for name in ("utilisation", "device_tflops"):
        if getattr(options, name) is not None and not options.dry_run:
            raise RecipeError(f"--{name} belongs to --dry_run: it is an assumption about time.")
    if options.num_processes is not None:
        check_processes(options.num_processes, f"--num_processes {options.num_processes}")
    _speed(options)
    if options.output_dir is None and not options.dry_run:
        raise RecipeError("--output_dir is missing: checkpoints and the encoder need a place.")
    check_places(raw, starts=options.output_dir is None or not Path(options.output_dir).exists())
    if options.resume not in ("auto", "never") and not Path(options.resume).is_dir():
        reason = "no complete checkpoint: there is no such folder"
        raise RecipeError(f"--resume {options.resume}: {reason}. Use auto, never or a folder checkpoint-N.")
    return path, raw, overrides


def _run(
    path: Path, raw: dict[str, Any], overrides: dict[str, Any], options: argparse.Namespace, signals: Signals
) -> int:
    from hf_equissl.recipes.recipe import Recipe
    from hf_equissl.running.stops import AGREED, STOPS

    recipe = Recipe.from_dict(raw, str(path), overrides)
    try:
        if options.dry_run:
            _dry_run(recipe, options)
        else:
            _train(recipe, options, signals)
    except STOPS as error:
        speaks = speaks_for_failure()  # all ask: the process that answers stays until they have
        return stop(error, code=1, speaks=is_first_process() if isinstance(error, AGREED) else speaks)
    return 0


def _train(recipe: Any, options: argparse.Namespace, signals: Any) -> None:
    from hf_equissl.running.run import prepare, pretrain
    from hf_equissl.running.stops import explain_stops, run_on_all

    with explain_stops(options.output_dir):
        run = run_on_all(lambda: prepare(recipe, options.output_dir, options.resume))
    say(_summary(run))
    folder = pretrain(run, signals)
    load = f"AutoModel.from_pretrained({str(folder)!r})"
    say(f"The encoder lies in {folder}. Load it with {load} after `import hf_equissl`.")


def _dry_run(recipe: Any, options: argparse.Namespace) -> None:
    from hf_equissl.running.dry_run import PICTURE, dry_run_report, save_picture
    from hf_equissl.running.run import prepare

    run = prepare(recipe, options.output_dir, options.resume, processes=options.num_processes, dry=True)
    say(dry_run_report(run, _speed(options)))
    if options.output_dir is not None and run.dataset is not None and is_first_process():
        picture = save_picture(run.first, run.pipeline, Path(options.output_dir) / PICTURE)
        say(f"\nPicture of the first views: {picture}")


def _speed(options: argparse.Namespace) -> Speed:
    given = {name: getattr(options, name) for name in ("utilisation", "device_tflops")}
    return Speed(**{name: value for name, value in given.items() if value is not None})


def _summary(run: Any) -> str:
    plan = run.plan
    batch = f"batch {plan.per_device} x {plan.processes} x {plan.accumulation} = {plan.batch}"
    lines = [f"{run.recipe.name}: {batch}, learning rate {plan.learning_rate:.4g}, {plan.steps} steps"]
    if run.recipe.num_processes not in (None, plan.processes):
        lines.append(
            f"note: the recipe was written for {run.recipe.num_processes} processes, this launch has {plan.processes}"
        )
    if run.unreadable:
        lines.append(f"note: of the first images these are not readable: {', '.join(run.unreadable)}")
    if run.finished:
        lines.append(f"{run.checkpoint} is the last step of this run: nothing to train, the encoder is exported")
    else:
        lines.append(f"resuming from {run.checkpoint}" if run.checkpoint else f"starting in {run.args.output_dir}")
    lines += run.notes
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "pretrain.py",
        usage="pretrain.py --recipe NAME|PATH --data SOURCE --output_dir DIR [options] [--section.key VALUE ...]",
        description="Pretrain an encoder from a recipe. Everything that can be wrong is checked before the first step.",
        epilog=lambda: f"{OVERRIDES}\n{EXIT_CODES}\nrecipes:\n{recipe_lines()}\n\n{EXAMPLES}",
    )
    add = parser.add_argument
    add("--recipe", type=path_word, metavar="NAME|PATH", help="a recipe that ships (below), or a YAML file")
    add(
        "--data",
        type=path_word,
        metavar="SOURCE",
        help="image folder, parquet or tar files, save_to_disk folder, Hub id (data.source)",
    )
    add(
        "--init_from",
        type=path_word,
        metavar="ENCODER",
        help="start from this encoder, a Hub id, a folder or a .pth file, instead of random weights (model.init_from)",
    )
    add(
        "--output_dir", type=path_word, metavar="DIR", help="checkpoints, recipe.yaml and the finished encoder/ go here"
    )
    add(
        "--resume",
        default="auto",
        type=path_word,
        metavar="auto|never|PATH",
        help="auto (default): go on from the newest complete checkpoint in DIR, if there is one",
    )
    add("--dry_run", action="store_true", help="check everything, print the plan and its cost, train nothing")
    add("--num_processes", type=int, metavar="N", help="with --dry_run: plan for N processes (the recipe's otherwise)")
    add("--utilisation", type=float, metavar="SHARE", help="with --dry_run: of a device's peak (0.4 otherwise)")
    add("--device_tflops", type=float, metavar="N", help="with --dry_run: a device's peak (312 otherwise, an A100's)")
    add("--list_recipes", action="store_true", help="names of the recipes that ship, one line each")
    add_import(parser)
    return parser


def launch(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command as a process of its own, alone or started by a launcher."""
    listen_to_launcher()
    end_command(main(argv))


if __name__ == "__main__":
    launch()
