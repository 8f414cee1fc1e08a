"""Plan a recipe on a cluster: see ``--help``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.planning.assumptions import COMPARED, Cluster, Speed, parse_engine
from hf_equissl.training.recipe_options import add_import, load_recipe, parse_words
from hf_equissl.utils.commands import command_parser, path_word, say, stop
from hf_equissl.utils.suggestions import RecipeError

if TYPE_CHECKING:
    from hf_equissl.running.run import Run

DESCRIPTION = """\
Memory, traffic and time of a step on each device of a cluster, by formula, for one engine or for all; and the largest
batch per device that fits. A step runs on tensors without memory: neither the weights nor the cluster are needed.
"""
EXAMPLES = """\
examples:
  # which engine for ViT-L/16 on one node of 8 GPUs with 40 GiB?
  python training/plan.py --recipe vitl16_dinov2_se2 --gpus 8 --memory 40
  # one engine in detail, on 8 nodes that are joined by 100 GB/s
  python training/plan.py --recipe vitl16_dinov2_se2 --gpus 64 --memory 80 --network 100 --engine fsdp2
  # what recomputing activations buys
  python training/plan.py --recipe vitl16_dinov2_se2 --gpus 8 --memory 40 --training.activation_checkpointing true
  # for a program
  python training/plan.py --recipe vits16_ibot_se2 --gpus 16 --engine ddp --json
  # can the plan be trusted? three real steps on this machine, planned beside measured
  python training/plan.py --recipe vits16_vicreg_rot --check_memory --training.per_device_train_batch_size 8
every value of the recipe can be set as for training/pretrain.py, as --section.key VALUE
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what can be mended."""
    try:
        options, overrides = parse_words(_parser(), argv)
        if options.check_memory:
            _check(options, overrides)
        else:
            _plan(options, overrides)
    except RecipeError as error:
        return stop(error, code=2, speaks=os.environ.get("LOCAL_RANK", "0") == "0")
    return 0


def _plan(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    names = ("gpus", "gpus_per_node", "memory", "reserve", "link", "network", "host_link")
    cluster = Cluster(**_given(options, *names))
    speed = Speed(**_given(options, "utilisation", "device_tflops"))
    if options.engine is not None:
        parse_engine(options.engine)
    recipe = load_recipe(options.recipe, overrides, reads_data=True)

    from hf_equissl.planning import report
    from hf_equissl.planning.cluster import Planner
    from hf_equissl.planning.optimizer_memory import optimizer_memory
    from hf_equissl.planning.step import batch_multiple, smallest_batch
    from hf_equissl.running.run import prepare

    run = prepare(recipe, None, processes=cluster.gpus, dry=True)
    smallest = smallest_batch(run.config, cluster.gpus, run.plan.per_device)
    multiple = batch_multiple(run.config)
    planner = Planner(run.cost, run.plan, cluster, speed.of(run.args), optimizer_memory(run.args), smallest, multiple)
    plans = [planner.plan(name, exact=options.engine is not None) for name in _engines(options, cluster.gpus)]
    if options.json:
        say(json.dumps(report.plan_data(run.recipe.name, planner, plans, run.args.precision), indent=2))
    else:
        say("\n".join(report.plan_lines(run.recipe.name, planner, plans, run.args.precision, _recipe_batch(run))))


def _check(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    from hf_equissl.planning import check, report
    from hf_equissl.planning.cluster import name_engine
    from hf_equissl.planning.memory import Setup, peaks_by_phase
    from hf_equissl.planning.optimizer_memory import optimizer_memory
    from hf_equissl.running.run import build_training, prepare

    world = int(os.environ.get("WORLD_SIZE", "1"))
    with check.scratch_folder(world) as scratch:
        images = scratch / os.environ.get("RANK", "0") / "images"
        recipe = load_recipe(options.recipe, overrides | check.OVERRIDES | {"data.source": str(images)})
        check.noise_images(images, check.images_needed(recipe, world))
        run = prepare(recipe, scratch / "run", resume="never")
        cost = run.cost()
        engine, offload = parse_engine(name_engine(run.args, world))
        setup = Setup(
            engine,
            world,
            offload=offload,
            accumulating=run.args.gradient_accumulation_steps > 1,
            optimizer=optimizer_memory(run.args),
            on_cpu=run.args.device.type == "cpu",
        )
        if engine.is_deepspeed:
            import deepspeed  # noqa: F401  its code takes memory too, which is none of the step's

        measured = check.measure_phases(lambda: build_training(run), check.PeakMeter(run.args.device))
    words = f"{engine.value}, {world} processes, {cost.batch} images each, {run.args.precision}"
    say("\n".join(report.check_lines(run.recipe.name, peaks_by_phase(cost, setup), measured, words)))


def _engines(options: argparse.Namespace, gpus: int) -> list[str]:
    if options.engine is not None:
        return [options.engine]
    return [name for name in COMPARED if (name == "single") == (gpus == 1)]


def _recipe_batch(run: Run) -> int:
    plan = run.plan
    return plan.per_device * plan.accumulation * (run.recipe.num_processes or plan.processes)


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _parser() -> argparse.ArgumentParser:
    usage = "plan.py --recipe NAME|PATH [--gpus N] [--memory GIB] [--engine NAME] [options] [--section.key VALUE]"
    parser = command_parser("plan.py", usage=usage, description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add(
        "--recipe",
        type=path_word,
        metavar="NAME|PATH",
        help="a recipe that ships (pretrain.py --list_recipes), or a YAML file",
    )
    add("--gpus", type=int, metavar="N", help="devices in all, one process each (8)")
    add("--gpus_per_node", type=int, metavar="N", help="devices of one machine (8)")
    add("--memory", type=float, metavar="GIB", help="memory of one device (80)")
    add(
        "--engine",
        metavar="NAME",
        help="single, ddp, fsdp2, zero1, zero2, zero3; with +offload: to the host. One in detail (all, compared)",
    )
    add("--reserve", type=float, metavar="GIB", help="left free: context, NCCL, fragmentation (1.5 + 5 %% of memory)")
    add("--utilisation", type=float, metavar="SHARE", help="of a device's peak that a step reaches (0.4)")
    add("--device_tflops", type=float, metavar="N", help="a device's peak (an A100's: bf16 312, TF32 156, fp32 19.5)")
    add("--link", type=float, metavar="GB/S", help="between devices of a machine (200, NVLink 3 as NCCL uses it)")
    add("--network", type=float, metavar="GB/S", help="of a machine to the others (50, one 400 Gb/s adapter)")
    add("--host_link", type=float, metavar="GB/S", help="between a device and its host (20, PCIe 4.0 x16)")
    add("--json", action="store_true", help="plain data instead of text; bytes and seconds")
    add(
        "--check_memory",
        action="store_true",
        help="run three real steps on this machine's device and print planned beside measured, by phase",
    )
    add_import(parser)
    return parser


def launch(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command as a process of its own, alone or started by a launcher."""
    code = main(argv)
    if "torch" in sys.modules:
        from hf_equissl.distributed.agreement import end_process

        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    launch()
