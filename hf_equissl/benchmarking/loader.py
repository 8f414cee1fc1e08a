"""How fast images become samples: the loader, with each decoder, beside a plain Pillow loop; and its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import islice
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ..data import ImageSource, ImageViewDataset
from ..data.decoding import ImageDecodeError
from ..data.jpeg import name_decoder
from ..data.randomness import sample_generator
from ..planning.step import build_without_weights
from ..recipes.recipe import Recipe
from ..utils.suggestions import RecipeError
from ..views.base import Item
from ..views.collator import ViewCollator
from ..views.cropping import RESAMPLING, Box, resize_box, to_pixels
from ..views.needs import Needs
from ..views.pipelines import ViewPipeline
from ..views.view_specs import ViewSpec
from .timing import measure_seconds, take_turns

LOADER, LOADER_PILLOW, PLAIN = "loader", "loader, Pillow decodes", "plain"
READ, DECODE, CROP, RESIZE, COLLATE = PARTS = ("read", "decode", "crop", "resize", "collate")
PLAIN_DECODE, PLAIN_RESIZE = PLAIN_PARTS = ("plain decode", "plain resize")
NUM_CLASSES = 10  # where an objective needs them and no step is trained
# Side, filter and box of one crop.
Crop: TypeAlias = tuple[int, str, Box]


def first_images(source: ImageSource, count: int) -> list[Image.Image]:
    """Read the first ``count`` images that decode, or fewer.

    Raises:
        RecipeError: None does.
    """
    images = [Image.fromarray(pixels) for _, pixels in islice(_decode_all(source), count)]
    if not images:
        raise RecipeError("data: none of the images can be read.")
    return images


def _decode_all(source: ImageSource) -> Iterator[tuple[int, np.ndarray]]:
    for index in range(len(source)):
        try:
            yield index, source.decode_pixels(source.content(source.row(index)))
        except ImageDecodeError:
            continue


def find_needs(recipe: Recipe) -> Needs:
    """Find what the objectives of a recipe need of the views, without weights."""
    classes = NUM_CLASSES if recipe.reads_num_classes else None
    return build_without_weights(recipe.build_pretraining_config(classes))[1].needs


def list_crops(pipeline: ViewPipeline, sample: dict[str, Any], width: int, height: int) -> list[Crop]:
    """List the crops of a sample that ``pipeline`` made of an image; those of further views are not among them."""
    groups: list[tuple[str, Sequence[ViewSpec], int]] = [("crop_boxes", pipeline.spec.views, pipeline.image_size)]
    if (local := pipeline.local) is not None:
        groups.append(("local_boxes", [local.view] * local.count, local.size))
    return [
        (size, spec.interpolation, _to_box(fractions, width, height))
        for key, specs, size in groups
        if key in sample
        for spec, fractions in zip(specs, sample[key].tolist(), strict=True)
    ]


def _to_box(fractions: Sequence[float], width: int, height: int) -> Box:
    """Turn top, left, height and width as fractions of an image into a box in pixels; float32 has 7 digits."""
    top, left, rows, columns = fractions
    box = (left * width, top * height, (left + columns) * width, (top + rows) * height)
    return tuple(round(side, 3) for side in box)  # type: ignore[return-value]


def plain_crops(dataset: ImageViewDataset, count: int) -> tuple[list[tuple[int, int]], list[tuple[bytes, list[Crop]]]]:
    """List the first ``count`` images as keys of ``dataset``, and the same as bytes with the crops of epoch 0.

    Left out are images that do not decode, and those turned by their EXIF block, which a plain loop would ignore.

    Raises:
        RecipeError: None is left.
    """
    keys, plain = [], []
    for index, pixels in islice(_decode_all(dataset.source), count):
        content, (height, width) = dataset.source.content(dataset.source.row(index)), pixels.shape[:2]
        with Image.open(BytesIO(content)) as stored:
            if stored.size != (width, height):
                continue
        sample = dataset.pipeline.crop(Item((pixels,)), sample_generator(dataset.seed, 0, index))
        keys.append((0, index))
        plain.append((content, list_crops(dataset.pipeline, sample, width, height)))
    if not keys:
        raise RecipeError("data: none of the first images can be read as they are stored.")
    return keys, plain


def time_loader(dataset: ImageViewDataset, num_images: int, repeats: int, batch_size: int) -> dict[str, Any]:
    """Time the loader in this process, one thread, beside a plain loop that cuts the same crops, and parts of both.

    The loader reads rows, decodes, draws, crops and collates. The plain loop has bytes and boxes ready and does no more
    than ``Image.open``, ``convert``, ``resize`` and ``numpy.asarray``. All take turns.

    Args:
        dataset: Images and their views.
        num_images: Images of one pass.
        repeats: Passes of each.
        batch_size: Images that are collated at a time.

    Returns:
        ``images`` of a pass; ``decoder`` of plain JPEG files; ``rates``, images per second of each loop, and ``ratios``
        of each loader over the plain loop in each turn, both by the clock and as ``cpu_rates`` and ``cpu_ratios`` by
        processor time; ``parts``, microseconds of processor time per image. Rates and parts are medians. Where
        simplejpeg decodes, the loader is measured a second time with Pillow in its place.
    """
    keys, plain = plain_crops(dataset, num_images)
    loaders = {LOADER: dataset}
    if not name_decoder().startswith("Pillow"):
        slow = replace(dataset.source, decoding=replace(dataset.source.decoding, fast=False))
        loaders[LOADER_PILLOW] = ImageViewDataset(slow, dataset.pipeline, dataset.seed)
    tasks: dict[str, Callable[[], None]] = {
        name: partial(_load, DataLoader(each, batch_size, sampler=keys, collate_fn=ViewCollator(dataset.pipeline)))
        for name, each in loaders.items()
    }
    tasks[PLAIN] = partial(_plain_loop, plain)
    tasks |= _part_tasks(dataset, keys, plain, batch_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = take_turns({name: partial(measure_seconds, task) for name, task in tasks.items()}, repeats)
    finally:
        torch.set_num_threads(threads)
    result: dict[str, Any] = {"images": len(keys), "decoder": name_decoder()}
    for prefix, key in (("", "wall"), ("cpu_", "cpu")):
        seconds = {name: [one[key] for one in rounds] for name, rounds in runs.items()}
        result[f"{prefix}rates"] = {name: len(keys) / median(seconds[name]) for name in (*loaders, PLAIN)}
        result[f"{prefix}ratios"] = {
            name: [base / own for base, own in zip(seconds[PLAIN], seconds[name], strict=True)] for name in loaders
        }
    parts = {name: 1e6 * median(one["cpu"] for one in runs[name]) / len(keys) for name in (*PARTS, *PLAIN_PARTS)}
    parts[CROP] = max(0.0, parts[CROP] - parts[RESIZE])  # it was measured with the resizing
    return result | {"parts": parts}


def _load(loader: DataLoader[Any]) -> None:
    for _ in loader:
        pass


def _plain_loop(plain: list[tuple[bytes, list[Crop]]]) -> None:
    for content, crops in plain:
        _plain_resize(_plain_decode(content), crops)


def _plain_decode(content: bytes) -> Image.Image:
    image = Image.open(BytesIO(content)).convert("RGB")
    image.load()
    return image


def _plain_resize(image: Image.Image, crops: list[Crop]) -> None:
    for size, interpolation, box in crops:
        np.asarray(image.resize((size, size), RESAMPLING[interpolation], box))


def _part_tasks(
    dataset: ImageViewDataset, keys: list[tuple[int, int]], plain: list[tuple[bytes, list[Crop]]], batch_size: int
) -> dict[str, Callable[[], None]]:
    """Make a task of each part of the loader and of the plain loop; ``CROP`` is measured with ``RESIZE`` in it."""
    source, pipeline, collate = dataset.source, dataset.pipeline, ViewCollator(dataset.pipeline)
    items = [source.item(source.row(index), np.random.default_rng(index)) for _, index in keys]
    images = [_plain_decode(content) for content, _ in plain]

    def read() -> None:
        for _, index in keys:
            source.content(source.row(index))

    def decode() -> None:
        for content, _ in plain:
            source.decode_pixels(content)

    def crop() -> None:
        for item, (_, index) in zip(items, keys, strict=True):
            pipeline.crop(item, sample_generator(dataset.seed, 0, index))

    def resize() -> None:
        for item, (_, crops) in zip(items, plain, strict=True):
            pixels = to_pixels(item.images[0])
            for size, interpolation, box in crops:
                resize_box(pixels, box, interpolation, np.empty((size, size, 3), dtype=np.uint8))

    samples = [
        {**pipeline.crop(item, sample_generator(dataset.seed, 0, index)), "index": index}
        for item, (_, index) in zip(items, keys, strict=True)
    ]

    def collate_all() -> None:
        for begin in range(0, len(samples), batch_size):
            collate(samples[begin : begin + batch_size])

    def plain_decode() -> None:
        for content, _ in plain:
            _plain_decode(content)

    def plain_resize() -> None:
        for image, (_, crops) in zip(images, plain, strict=True):
            _plain_resize(image, crops)

    tasks = (read, decode, crop, resize, collate_all, plain_decode, plain_resize)
    return dict(zip((*PARTS, *PLAIN_PARTS), tasks, strict=True))
