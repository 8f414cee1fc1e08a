"""The data set of a run, and the views of its first images: what cannot be read is found before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from datasets.exceptions import DatasetsError
from torch.utils.data import IterableDataset

from ..data import ImageSource, ImageViewDataset, StreamingViewDataset
from ..data.shared_walk import walked_once
from ..pretraining.arguments import EquiSSLTrainingArguments
from ..pretraining.model import EquiSSLForPreTraining
from ..recipes.recipe import Recipe
from ..utils.suggestions import RecipeError
from ..views.base import Views
from ..views.collator import ViewCollator
from ..views.pipelines import ViewPipeline
from .checks import require_labels

FIRST_IMAGES = 8
ASSUMED_CLASSES = 1000  # number of classes in a dry run without a data set
ViewDataset = ImageViewDataset | StreamingViewDataset


def open_source(recipe: Recipe) -> ImageSource:
    """Open the data set of ``recipe``.

    Raises:
        RecipeError: It cannot be opened, with the reason.
    """
    try:
        with walked_once(recipe.data.get("source")):
            return recipe.build_source()
    except (OSError, ValueError, DatasetsError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"data: {error}") from error


def build_dataset(
    source: ImageSource, recipe: Recipe, pipeline: ViewPipeline, args: EquiSSLTrainingArguments
) -> tuple[ViewDataset, ViewDataset]:
    """Build the data set for training, and one to look at the first images: a stream in its own order."""
    seed = args.seed if args.data_seed is None else args.data_seed
    if not source.streaming:
        dataset = ImageViewDataset(source, pipeline, seed)
        return dataset, dataset
    buffer = {key: recipe.data[key] for key in ("shuffle_buffer",) if key in recipe.data}
    ranks = {"rank": args.process_index, "world_size": args.world_size}
    return (
        StreamingViewDataset(source, pipeline, seed, **buffer, **ranks),
        StreamingViewDataset(source, pipeline, seed, shuffle_buffer=0, repeat=False),
    )


def make_first_views(
    dataset: ViewDataset, pipeline: ViewPipeline, count: int = FIRST_IMAGES
) -> tuple[Views, tuple[str, ...]]:
    """Make the views of the first images, as epoch 0 does; also the names of images that do not decode.

    Raises:
        RecipeError: There are no images, or none of the first ones can be read.
    """
    try:
        if isinstance(dataset, IterableDataset):
            samples = list(islice(dataset, count))
        else:
            samples = [dataset[0, index] for index in range(min(count, len(dataset)))]
    except (OSError, ValueError, DatasetsError) as error:
        raise RecipeError(f"data: the first images cannot be read. {error}") from error
    if not samples:
        raise RecipeError("data: the data set is empty.")
    with _blame_views():
        batch = ViewCollator(pipeline)(samples)
        return pipeline(batch), tuple(record.name for record in batch["skipped"])


def make_blank_views(pipeline: ViewPipeline, batch: int) -> Views:
    """Make views of two grey images, and of those that further views take of a ``batch``: the shapes of training.

    Raises:
        RecipeError: the objectives ask for what the pipeline cannot make.
    """
    with _blame_views():
        return pipeline.blank(2 + sum(maker.takes_from_batch(batch) or 0 for maker in pipeline.makers.values()))


@contextmanager
def _blame_views() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"views: {error}") from error


def count_classes(recipe: Recipe, source: ImageSource | None) -> int | None:
    """Return how many classes the objectives are built for, where they ask; without a data set a usual number."""
    if not recipe.reads_num_classes:
        return None
    if source is None:
        return ASSUMED_CLASSES
    require_labels(source.num_classes, " and ".join(recipe.reads_num_classes))
    return source.num_classes


def describe_assumptions(recipe: Recipe, model: EquiSSLForPreTraining) -> tuple[str, ...]:
    """Say what a dry run without a data set takes for granted of it."""
    if recipe.reads_num_classes:
        return (f"no data set is named (--data): images of {ASSUMED_CLASSES} classes are assumed",)
    return ("no data set is named (--data): images with a class are assumed",) if model.needs.labels else ()
