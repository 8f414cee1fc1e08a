"""The precision of a run: the one in which it began; at the first start, what its device computes fastest in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints import ENCODER_FOLDER, newest_checkpoint
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..recipes.overrides import as_mapping
from ..recipes.recipe import Recipe
from ..utils.devices import choose_precision, precision_lines
from ..utils.strict_yaml import load_yaml


def keep_precision(recipe: Recipe, folder: str | Path) -> Recipe:
    """Give ``training.bf16: auto`` the value with which the run in ``folder`` began, whatever device goes on with it.

    Unchanged where the recipe says true or false, or where ``folder`` holds no results of a run.
    """
    stored = Path(folder) / "recipe.yaml"
    has_results = newest_checkpoint(folder) is not None or (Path(folder) / ENCODER_FOLDER).is_dir()
    if not leaves_precision_open(recipe) or not stored.is_file() or not has_results:
        return recipe
    # Only this value is read: the rest may be of a version that took what is refused now.
    before = as_mapping(load_yaml(stored.read_text(encoding="utf-8"), str(stored)), str(stored))
    began_in = as_mapping(before.get("training"), "training").get("bf16", False)
    return replace(recipe, training={**recipe.training, "bf16": began_in})


def assume_precision(recipe: Recipe) -> Recipe:
    """Give ``training.bf16: auto`` the value for a plan: without an accelerator here, plans are for GPUs with bf16."""
    training = recipe.training
    if not leaves_precision_open(recipe) or training.get("use_cpu") or torch.accelerator.is_available():
        return recipe
    return replace(recipe, training={**training, "bf16": not training.get("fp16", False)})


def leaves_precision_open(recipe: Recipe) -> bool:
    """Whether the device decides about the precision."""
    return recipe.training.get("bf16") == "auto"


def describe_precision(args: EquiSSLTrainingArguments, asked: Recipe, dry: bool) -> tuple[str, ...]:
    """Say what a run or plan computes in, for people.

    Args:
        args: Arguments of the run.
        asked: The recipe as it was given.
        dry: Whether it is a plan, for devices that may not be here.
    """
    chosen = choose_precision("auto", args.device)
    kept = leaves_precision_open(asked) and not args.fp16 and args.precision != chosen
    if dry:
        here = f", which this machine would not choose ({chosen}): --training.use_cpu true plans for it" if kept else ""
        return (f"planned in {args.precision}{here}",)
    lines = precision_lines(args.precision, args.device)
    return (f"{lines[0]}{': the run began in it' if kept else ''}", *lines[1:])
