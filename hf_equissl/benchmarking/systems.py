"""What each of several systems costs per step over its own base: the same recipe with every lambda = 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from PIL import Image

from ..objectives import weight_of
from ..recipes.recipe import Recipe
from ..utils.suggestions import RecipeError
from .overhead import (
    BASE,
    FULL,
    both_recipes,
    build_side,
    build_sides,
    check_random_weights,
    synthetic_images,
    time_steps,
)
from .timing import take_turns


def time_systems(
    recipes: Mapping[str, Recipe],
    device: torch.device,
    dtype: str,
    repeats: int,
    batch_size: int | None = None,
    images: Sequence[Image.Image] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Time steps of each system and of its base in turns, one system after another.

    Args:
        recipes: System -> what it trains.
        device: Where steps run.
        dtype: "fp32" or "bf16".
        repeats: Timed steps of each kind.
        batch_size: Images per step; ``None``: the recipe's, per device.
        images: RGB pictures; ``None``: synthetic ones of the encoder's size.

    Yields:
        The system with ``batch_size``, ``wall`` and ``base_wall``, seconds of a step (medians), ``overhead`` and
        ``cpu_overhead``, by how much more of the base's step it takes by the clock and of processor time (medians of
        the repeats), and ``ratios`` and ``cpu_ratios``, one per repeat. Of a system without an equivariance objective,
        which is a base itself, there are no ratios and no overhead.

    Raises:
        RecipeError: A recipe starts from an encoder, or cannot be timed; the message names the system.
    """
    for system, recipe in recipes.items():
        try:
            yield system, _time_system(recipe, device, dtype, repeats, batch_size, images)
        except RecipeError as error:
            raise RecipeError(f"{system}: {error}") from error


def _time_system(
    recipe: Recipe,
    device: torch.device,
    dtype: str,
    repeats: int,
    batch_size: int | None,
    images: Sequence[Image.Image] | None,
) -> dict[str, Any]:
    check_random_weights(recipe)
    batch_size = (
        batch_size or recipe.build_training_arguments("unused", use_cpu=True, bf16=False).per_device_train_batch_size
    )
    if images is None:
        size: Any = recipe.build_encoder_config().image_size  # the pipeline refuses pairs
        images = synthetic_images(min(batch_size, 32), size)
    if not any(weight_of(entry) > 0 for entry in recipe.objectives.equivariance):
        side = build_side(recipe, batch_size, device, images)
        seconds = median(run["wall"] for run in take_turns({BASE: partial(side.step, dtype)}, repeats)[BASE])
        return {"batch_size": batch_size, "wall": seconds, "base_wall": seconds}
    timing = time_steps(build_sides(both_recipes(recipe), batch_size, device, images), dtype, repeats)
    kept = ("overhead", "cpu_overhead", "ratios", "cpu_ratios")
    return {
        "batch_size": batch_size,
        "wall": timing["sides"][FULL]["wall"],
        "base_wall": timing["sides"][BASE]["wall"],
        **{key: timing[key] for key in kept},
    }
