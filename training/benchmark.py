"""Measure what the reconstruction costs per training step, and the loader: see ``--help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Time a training step of a recipe with lambda > 0 against the same step with lambda = 0 (views, forward, backward,
optimizer; in turns, on one device), and the loader against a plain PIL loop that cuts the same crops."""

EXAMPLES = """\
On a CPU, first:   export OMP_NUM_THREADS=1   (or the number of real cores; never more)
                   export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184
Other programs on the machine blur times by the clock; with one thread, the ratio of processor times stays good.

examples:
  python training/benchmark.py --recipe vits16_vicreg_rot --data ./photos --output_dir runs/benchmark
  python training/benchmark.py --recipe vits16_vicreg_rot --batch_size 8 --dtype bf16 --model.image_size 96
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what can be mended."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)

    from hf_equissl.recipes import Recipe, parse_overrides
    from hf_equissl.strict import RecipeError
    from hf_equissl.training.pretrain import RECIPES, _find_recipe

    try:
        for name in ("batch_size", "repeats", "loader_images"):
            if getattr(options, name) < 1:
                raise RecipeError(f"--{name} {getattr(options, name)}: expected at least 1.")
        overrides = parse_overrides(rest, [name for action in parser._actions for name in action.option_strings])
        if options.data is not None:
            overrides |= {"data.source": options.data, "data.streaming": False}
        recipe = Recipe.load(_find_recipe(options.recipe), overrides, search=[RECIPES])
        report = _measure(recipe, options)
        if options.output_dir is not None:
            path = Path(options.output_dir) / "benchmark.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            print(f"Written: {path}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(recipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, printed as it comes."""
    from hf_equissl.benchmark import build_sides, first_images, peak_memory, synthetic_images, time_loader, time_steps
    from hf_equissl.data import ImageViewDataset
    from hf_equissl.timing import choose_device, environment

    device = choose_device(options.device)
    size = recipe.build_encoder_config().image_size
    dataset = None
    if options.data is None:
        images = synthetic_images(min(options.batch_size, 32), size)
    else:
        source = recipe.build_source()
        images = first_images(source, options.batch_size)
    sides = build_sides(recipe, options.batch_size, device, images)
    if options.data is not None:
        dataset = ImageViewDataset(source, sides[FULL].pipeline, seed=0)
    return {"recipe": recipe.name}


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser()


if __name__ == "__main__":
    sys.exit(main())
