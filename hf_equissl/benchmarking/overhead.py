"""What the reconstruction costs: one training step with lambda > 0 against one with lambda = 0.

Both steps are those of ``EquiSSLTrainer`` on one device: views (with the reconstruction targets where lambda > 0),
forward (of the teacher, too, where there is one), backward, clipping, optimizer, the teacher's update. They take turns,
so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..data.randomness import sample_generator
from ..objectives import weight_of
from ..objectives.progress import TrainingProgress
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLForPreTraining
from ..pretraining.optimizer import clip_gradients, clipping_parts, optimizer_groups
from ..pretraining.schedules import teacher_momentum
from ..pretraining.trainer import EquiSSLTrainer
from ..recipes.recipe import Recipe
from ..utils.machine import resident_peak
from ..utils.suggestions import RecipeError
from ..views.base import Item, map_tensors
from ..views.collator import ViewCollator
from ..views.pipelines import ViewPipeline
from .timing import Stopwatch, take_turns

BASE, FULL = "lambda = 0", "lambda > 0"
SIDES = (BASE, FULL)
# What L_recon adds to an epoch's time by base (arXiv 2503.18753, version 2): 156 -> 179 s, 230 -> 249 s, 750 -> 804 s.
PAPER_OVERHEADS = {"vicreg": ("ViT-S/16", 0.147), "ibot": ("ViT-L/16", 0.083), "dinov2": ("ViT-L/16", 0.072)}
VIEWS, TEACHER, ENCODER = "views", "teacher forward", "encoder forward"
INVARIANCE, EQUIVARIANCE, SUM = "base loss forward", "reconstruction forward", "loss sum"
BACKWARD, OPTIMIZER, UPDATE = "backward", "optimizer", "teacher update"
PARTS = (VIEWS, TEACHER, ENCODER, INVARIANCE, EQUIVARIANCE, SUM, BACKWARD, OPTIMIZER, UPDATE)
EQUIVARIANCE_BACKWARD = "reconstruction backward"
MIB = 1024**2
NUM_CLASSES = 10  # classes that the images are given, for objectives with labels
# Any point of a run will do: a step costs the same at all of them.
PROGRESS = TrainingProgress(step=0, max_steps=1, steps_per_epoch=1)


@dataclass
class Side:
    """One of the two trainings that are compared.

    Attributes:
        model, pipeline, optimizer: What the Trainer builds from the recipe.
        batch: Collated uint8 crops and draws, on the CPU.
        device: Where the step runs.
        args: Training arguments of the recipe.
        parts: Whether the parts of the forward pass are timed, by hooks, which a model that is compiled may not have.
    """

    model: EquiSSLForPreTraining
    pipeline: ViewPipeline
    optimizer: torch.optim.Optimizer
    batch: dict[str, Any]
    device: torch.device
    args: EquiSSLTrainingArguments
    parts: bool = True
    stopwatch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self.stopwatch = Stopwatch(self.device)
        if not self.parts:
            return
        hooked: list[tuple[str, nn.Module]] = [(ENCODER, self.model.student), (INVARIANCE, self.model.invariance)]
        hooked += [(TEACHER, self.model.teacher)] if self.model.teacher is not None else []
        for name, module in (*hooked, *((EQUIVARIANCE, objective) for objective in self.model.equivariance)):
            module.register_forward_hook(lambda *_, name=name: self.stopwatch.mark(name))

    def step(self, dtype: str) -> dict[str, Any]:
        """Do one training step; returns its times as ``Stopwatch.stop``."""
        watch = self.stopwatch
        watch.start()
        self.model.begin_step(PROGRESS)
        views = self.views()
        watch.mark(VIEWS)
        with self.autocast(dtype):
            loss = self.model(views=views).loss
        watch.mark(SUM)
        loss.backward()
        watch.mark(BACKWARD)
        self.clip()
        self.optimizer.step()
        self.model.zero_grad()
        watch.mark(OPTIMIZER)
        self.model.update_teacher(teacher_momentum(self.args, PROGRESS))
        watch.mark(UPDATE)
        return watch.stop()

    def clip(self) -> None:
        """Clip gradients as the Trainer does."""
        if self.args.max_grad_norm > 0:
            if self.args.grad_clipping == "global":
                nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            else:
                clip_gradients(clipping_parts(self.model, self.args.grad_clipping), self.args.max_grad_norm)

    def equivariance_alone(self, dtype: str) -> dict[str, Any]:
        """Time the equivariance objectives on given tokens: their forward, and their backward up to those tokens."""
        views, watch = self.views(), self.stopwatch
        with torch.no_grad(), self.autocast(dtype):
            given, teacher = self.model.encode(views), self.model.encode_teacher(views)
        given = given.map(lambda tokens: tokens.detach().requires_grad_())
        watch.start()
        with self.autocast(dtype):
            losses = [objective(given, teacher, views).loss for objective in self.model.equivariance]
            loss = sum(losses, torch.zeros(()))
        loss.backward()
        watch.mark(EQUIVARIANCE_BACKWARD)
        self.model.zero_grad()
        return watch.stop()

    def views(self) -> Any:
        """Make the batch's views on the device, as ``EquiSSLTrainer`` does."""
        return self.pipeline(map_tensors(self.batch, lambda tensor: tensor.to(self.device, non_blocking=True)))

    def autocast(self, dtype: str) -> AbstractContextManager[Any]:
        """Enter mixed precision as the Trainer does with ``bf16``."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bf16")

    def create_optimizer_state(self) -> None:
        """Create what the optimizer remembers, so that a first step is like any other."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.optimizer.step()
        self.model.zero_grad()

    def own_bytes(self) -> int:
        """Add up the bytes of weights, buffers and optimizer state."""
        state = (value for entry in self.optimizer.state.values() for value in entry.values())
        tensors = [*self.model.parameters(), *self.model.buffers(), *(v for v in state if isinstance(v, Tensor))]
        return sum(tensor.nbytes for tensor in tensors)


def drop_equivariance(recipe: Recipe) -> Recipe:
    """Set lambda = 0 in a recipe: the base method on the same views."""
    entries = [{**entry, "weight": 0.0} for entry in recipe.objectives.equivariance]
    return replace(recipe, objectives=replace(recipe.objectives, equivariance=entries))


def build_side(
    recipe: Recipe, batch_size: int, device: torch.device, images: Sequence[Image.Image], parts: bool = True
) -> Side:
    """Build model, pipeline, optimizer and one batch of crops.

    Args:
        recipe: The recipe that is trained.
        batch_size: Images in the batch; ``images`` are repeated to fill it.
        device: Where the step runs.
        images: RGB pictures.
        parts: As in ``Side``.
    """
    args = recipe.build_training_arguments(
        "unused", per_device_train_batch_size=batch_size, use_cpu=device.type == "cpu", bf16=False, fp16=False
    )
    classes = NUM_CLASSES if recipe.reads_num_classes else None
    model = EquiSSLForPreTraining(recipe.build_pretraining_config(classes)).train()
    cast(nn.Module, model).to(device)
    optimizer_class, arguments = EquiSSLTrainer.get_optimizer_cls_and_kwargs(args, model)
    pipeline = recipe.build_pipeline(model.needs)
    batch = crop_batch(pipeline, images, batch_size)
    if device.type == "cuda":  # as the loader does, so that no copy is waited for
        batch = map_tensors(batch, lambda tensor: tensor.pin_memory())
    return Side(
        model=model,
        pipeline=pipeline,
        optimizer=optimizer_class(optimizer_groups(model, args), **arguments),
        batch=batch,
        device=device,
        args=args,
        parts=parts,
    )


def check_random_weights(recipe: Recipe) -> None:
    """Refuse a recipe that starts from an encoder, whose architecture would replace the recipe's."""
    if (encoder := recipe.model.get("init_from")) is not None:
        raise RecipeError(
            f"model.init_from: {encoder!r} is not loaded here. What a step costs follows from the architecture: leave "
            "it out, and set that, e.g. --model.patch_size 14."
        )


def both_recipes(recipe: Recipe, base: Recipe | None = None) -> dict[str, Recipe]:
    """Choose the two recipes to compare: ``recipe``, and ``base`` or else the same with lambda = 0.

    Raises:
        RecipeError: The recipe has no equivariance objective with a weight above 0, or one starts from an encoder.
    """
    for one in (recipe, base):
        if one is not None:
            check_random_weights(one)
    if not any(weight_of(entry) > 0 for entry in recipe.objectives.equivariance):
        raise RecipeError(
            f"{recipe.name} has no equivariance objective with a weight above 0, so there is nothing to compare. "
            "Choose a recipe with one, e.g. --recipe vits16_vicreg_rot."
        )
    return {BASE: drop_equivariance(recipe) if base is None else base, FULL: recipe}


def build_sides(
    recipes: dict[str, Recipe], batch_size: int, device: torch.device, images: Sequence[Image.Image]
) -> dict[str, Side]:
    """Build both trainings, on the same crops."""
    return {name: build_side(recipes[name], batch_size, device, images) for name in SIDES}


def crop_batch(pipeline: ViewPipeline, images: Sequence[Image.Image], batch_size: int) -> dict[str, Any]:
    """Collate ``batch_size`` crops of ``images``, the same ones each time."""
    samples = []
    for index in range(batch_size):
        rng = sample_generator(0, 0, index)
        item = Item((images[index % len(images)],), label=index % NUM_CLASSES)
        samples.append({**pipeline.crop(item, rng), "index": index})
    return ViewCollator(pipeline)(samples)


def synthetic_images(count: int, size: int) -> list[Image.Image]:
    """Make images of smooth coloured noise, ``size`` pixels high and 8/7 as wide."""
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 256, (7, 8, 3), dtype=np.uint8) for _ in range(count))
    return [Image.fromarray(pixels).resize((size * 8 // 7, size), Image.Resampling.BICUBIC) for pixels in noise]


def time_steps(sides: dict[str, Side], dtype: str, repeats: int) -> dict[str, Any]:
    """Time steps of both sides in turn, after one of each that does not count.

    Returns:
        ``sides``: per side the medians ``wall``, ``cpu`` (process time, all threads), ``parts`` and ``cpu_parts`` and
        the fastest ``wall_min``, in seconds. ``ratios`` and ``cpu_ratios``: full over base, per repeat. ``overhead``
        and ``cpu_overhead``: their medians minus 1. ``parts_overhead`` and ``parts_cpu_overhead``: the same from what
        the reconstruction adds where it adds something (more views, its forward and its backward alone, more weights).
    """
    runs = take_turns({name: partial(side.step, dtype) for name, side in sides.items()}, repeats)
    full = sides[FULL]
    alone = [full.equivariance_alone(dtype) for _ in range(repeats + 1)][1:]
    backward = {key: median(run[key][EQUIVARIANCE_BACKWARD] for run in alone) for key in ("parts", "cpu_parts")}
    result: dict[str, Any] = {"sides": {}}
    for name in SIDES:
        result["sides"][name] = summary = {
            "wall": median(run["wall"] for run in runs[name]),
            "wall_min": min(run["wall"] for run in runs[name]),
            "cpu": median(run["cpu"] for run in runs[name]),
        }
        for key in ("parts", "cpu_parts"):
            summary[key] = {part: median(run[key].get(part, 0.0) for run in runs[name]) for part in PARTS}
            summary[key][EQUIVARIANCE_BACKWARD] = backward[key] if name == FULL else 0.0
    for prefix, total, parts in (("", "wall", "parts"), ("cpu_", "cpu", "cpu_parts")):
        ratios = [with_it[total] / without[total] for with_it, without in zip(runs[FULL], runs[BASE], strict=True)]
        result[f"{prefix}ratios"] = ratios
        result[f"{prefix}overhead"] = median(ratios) - 1
        base, more = result["sides"][BASE], result["sides"][FULL][parts]
        added = more[EQUIVARIANCE] + more[EQUIVARIANCE_BACKWARD]
        added += sum(more[part] - base[parts][part] for part in (VIEWS, OPTIMIZER, UPDATE))
        result[f"parts_{prefix}overhead"] = added / base[total]
    return result


def peak_memory(recipes: dict[str, Recipe], sides: dict[str, Side], dtype: str) -> dict[str, float] | str:
    """Measure the largest memory of one step of each side in MiB, weights and optimizer state included.

    On CUDA it is what PyTorch has allocated; on a CPU the resident memory of a process of its own, beyond what that
    process held before the model was built. Elsewhere a text says why it is not known.
    """
    device = sides[FULL].device
    if device.type == "cuda":
        others = {BASE: sides[FULL], FULL: sides[BASE]}
        return {name: _cuda_peak(side, others[name], dtype) for name, side in sides.items()}
    if device.type != "cpu" or not Path("/proc/self/status").exists():
        return f"not measured: no counter for {device.type} on {platform.system()}"
    batch_size = len(sides[FULL].batch["draws"])
    peaks = {}
    for name in SIDES:
        with get_context("spawn").Pool(1) as pool:  # a new process each: the counter never falls
            peaks[name] = pool.apply(_process_peak, (recipes[name], batch_size, dtype, torch.get_num_threads()))
    return peaks


def _cuda_peak(side: Side, other: Side, dtype: str) -> float:
    side.create_optimizer_state()
    torch.cuda.reset_peak_memory_stats(side.device)
    side.step(dtype)
    return (torch.cuda.max_memory_allocated(side.device) - other.own_bytes()) / MIB


def _process_peak(recipe: Recipe, batch_size: int, dtype: str, threads: int) -> float:
    torch.set_num_threads(threads)
    size = int(recipe.build_encoder_config().image_size)  # type: ignore[arg-type]  # the pipeline refuses pairs
    images = synthetic_images(min(batch_size, 4), size)
    before = resident_peak()
    side = build_side(recipe, batch_size, torch.device("cpu"), images)
    side.create_optimizer_state()
    side.step(dtype)
    return (resident_peak() - before) / MIB
