"""How well training steps use a device: images per second, memory, share of its peak, and how often the host waits."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..objectives import weight_of
from ..planning.assumptions import A100_PEAKS
from ..planning.flop_counts import CPU_ATTENTION
from ..recipes.recipe import Recipe
from ..utils.devices import synchronize
from .overhead import BASE, FULL, MIB, Side, both_recipes, build_side, check_random_weights, synthetic_images
from .timing import take_turns

EAGER, COMPILED = "eager", "compiled"
MODES = (EAGER, COMPILED)
# Dense products of matrices per second, in 10^12 operations, from data sheets: part of a device's name -> precision.
_HOPPER = {"bf16": 989.0, "fp32": 67.0}
DATA_SHEETS = {
    "H200": _HOPPER,
    "H100 80GB HBM3": _HOPPER,
    "A100": {"bf16": A100_PEAKS["bf16"], "fp32": A100_PEAKS["fp32"]},
}
# Sides of the square matrices that stand for the peak of a device without a data sheet here.
MATRIX_SIDES = {"cpu": 1024}
LARGE_MATRIX_SIDE = 8192
MATRIX_REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """What a device can do at best.

    Attributes:
        tflops: Products of matrices per second, in 10^12 operations.
        source: Where the number is from, for people.
    """

    tflops: float
    source: str


@dataclass(frozen=True)
class Use:
    """What the steps of one training took.

    Attributes:
        mode: "eager" or "compiled".
        batch_size: Images per step.
        seconds: Of a step, the median, by the clock.
        first_seconds: Of the first step, which compiles.
        flops: Operations of one step in products of matrices, convolutions and attention, as PyTorch counts them.
        overhead: By how much longer a step is than with every lambda = 0, median over turns; ``None`` of a base, and of
            compiled steps, whose base is not compiled for it.
        memory: Largest memory of a step in MiB, weights and optimizer included; ``None`` where no counter is.
        waits: How often the host waits for the device within a step; ``None`` where nobody counts.
    """

    mode: str
    batch_size: int
    seconds: float
    first_seconds: float
    flops: int
    overhead: float | None
    memory: float | None
    waits: int | None

    @property
    def images_per_second(self) -> float:
        """Divide the images of a step by its seconds."""
        return self.batch_size / self.seconds

    @property
    def tflops(self) -> float:
        """Divide the operations of a step by its seconds, in 10^12 per second."""
        return self.flops / self.seconds / 1e12


def find_peak(device: torch.device, dtype: str, given: float | None = None) -> Peak:
    """Find what a device can do at best: as given, by its data sheet, or measured with large square matrices.

    Args:
        device: Where steps run.
        dtype: "fp32" or "bf16".
        given: In 10^12 operations per second.
    """
    if given is not None:
        return Peak(given, "as given")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, peaks in DATA_SHEETS.items():
        if part in name:
            return Peak(peaks[dtype], f"data sheet of {part}")
    side = MATRIX_SIDES.get(device.type, LARGE_MATRIX_SIDE)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    seconds = []
    for _ in range(MATRIX_REPEATS + 1):
        synchronize(device)
        begin = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return Peak(2 * side**3 / min(seconds[1:]) / 1e12, f"measured: products of two {side} x {side} matrices")


def measure_systems(
    recipes: Mapping[str, Recipe],
    device: torch.device,
    dtype: str,
    repeats: int,
    batch_size: int | None = None,
    modes: Sequence[str] = MODES,
) -> Iterator[tuple[str, Use | str]]:
    """Measure steps of each system in each mode, one after another; memory of the last one is given back before.

    Args:
        recipes: System -> what it trains.
        device: Where steps run.
        dtype: "fp32" or "bf16".
        repeats: Timed steps of each kind.
        batch_size: Images per step; ``None``: the recipe's, per device.
        modes: Some of ``MODES``.

    Yields:
        The system with its use, or why it could not be measured, such as for lack of memory.

    Raises:
        RecipeError: A recipe starts from an encoder.
    """
    for system, recipe in recipes.items():
        check_random_weights(recipe)
        for mode in modes:
            gc.collect()
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                yield system, measure_use(recipe, device, dtype, repeats, batch_size, mode)
            except RuntimeError as error:  # out of memory, or nothing here compiles
                yield system, f"{mode}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def measure_use(
    recipe: Recipe, device: torch.device, dtype: str, repeats: int, batch_size: int | None = None, mode: str = EAGER
) -> Use:
    """Measure steps of one training, in turns with those of its base where both are eager; see ``measure_systems``."""
    if batch_size is None:
        arguments = recipe.build_training_arguments("unused", use_cpu=True, bf16=False)
        batch_size = arguments.per_device_train_batch_size
    size: int = recipe.build_encoder_config().image_size  # type: ignore[assignment]  # the pipeline refuses pairs
    images = synthetic_images(min(batch_size, 32), size)
    has_base = mode == EAGER and any(weight_of(entry) > 0 for entry in recipe.objectives.equivariance)
    recipes = both_recipes(recipe) if has_base else {FULL: recipe}
    sides = {name: build_side(one, batch_size, device, images, parts=False) for name, one in recipes.items()}
    full = sides[FULL]
    flops = count_operations(full, dtype)
    if mode == COMPILED:
        nn.Module.compile(full.model)
    first = full.step(dtype)["wall"]
    runs = take_turns({name: partial(side.step, dtype) for name, side in sides.items()}, repeats)
    walls = {name: [run["wall"] for run in own] for name, own in runs.items()}
    overhead = None
    if has_base:
        overhead = median(more / less for more, less in zip(walls[FULL], walls[BASE], strict=True)) - 1
    others = sum(side.own_bytes() for name, side in sides.items() if name != FULL)
    return Use(
        mode=mode,
        batch_size=batch_size,
        seconds=median(walls[FULL]),
        first_seconds=first,
        flops=flops,
        overhead=overhead,
        memory=_largest_memory(full, dtype, others),
        waits=count_waits(full, dtype),
    )


def count_operations(side: Side, dtype: str) -> int:
    """Count the operations of one step in products of matrices, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        side.step(dtype)
    return counter.get_total_flops()


def count_waits(side: Side, dtype: str) -> int | None:
    """Count how often the host waits for a CUDA device within a step; ``None`` on other devices."""
    if side.device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            side.step(dtype)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _largest_memory(side: Side, dtype: str, others: int) -> float | None:
    """Return the largest memory of a step in MiB without the ``others`` bytes; ``None`` but on CUDA."""
    if side.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(side.device)
    side.step(dtype)
    return (torch.cuda.max_memory_allocated(side.device) - others) / MIB


def header() -> str:
    """Write the titles of ``use_line``, behind the name of the system."""
    return (
        f"{'mode':>10}{'batch':>7}{'images/s':>10}{'step, ms':>10}{'first, s':>10}{'recon.':>9}{'MiB':>8}{'TFLOP/s':>9}"
        f"{'of peak':>9}{'waits':>7}"
    )


def use_line(use: Use, peak: Peak) -> str:
    """Write what was measured in one line."""
    overhead = "" if use.overhead is None else f"{100 * use.overhead:+.1f}%"
    memory, waits = ("" if value is None else f"{value:.0f}" for value in (use.memory, use.waits))
    return (
        f"{use.mode:>10}{use.batch_size:>7}{use.images_per_second:>10.1f}{1000 * use.seconds:>10.1f}"
        f"{use.first_seconds:>10.1f}{overhead:>9}{memory:>8}{use.tflops:>9.3g}{100 * use.tflops / peak.tflops:>8.1f}%"
        f"{waits:>7}"
    )
