"""Renders of objects with known pose and light, as 3DIEBench has them: what evaluators of such data are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..data import load_images
from ..data.renders import RenderedPairs, read_latents
from ..data.sources import ImageSource
from ..data.splits import load_test_split
from ..data.subsets import choose_rows
from .data import EvaluationData, take_train_subset
from .images import ImageSet


@dataclass(eq=False)
class RenderedData(EvaluationData):
    """Renders object by object: the images of a set are the same number of renders of each of its objects.

    Attributes:
        latents: Split -> (objects, renders, 7): three angles in radians, hue of the floor, two angles of the light,
            its hue.
        train_renders: How many of an object's renders probes are fitted on. They are judged on all of them.
    """

    latents: dict[str, Tensor] = field(default_factory=dict)
    train_renders: ClassVar[int] = 10

    @classmethod
    def load(
        cls,
        source: str,
        *,
        train_split: str = "train",
        test_split: str | None = None,
        train_subset: Mapping[str, Any] | None = None,
        train_images: int | None = None,
        test_images: int | None = None,
        subset_seed: int = 0,
        **options: Any,
    ) -> Self:
        """Read a folder in the layout of 3DIEBench; ``train_images`` and ``test_images`` count objects here.

        Raises:
            ValueError: there is no such folder, or its images are not renders with latents.
        """
        reading: dict[str, Any] = {name: options.pop(name) for name in ("value_range", "max_pixels") if name in options}
        kept = {name: options[name] for name in ("num_workers", "cache_bytes", "progress") if name in options}
        train = load_images(source, split=train_split, **reading)
        test = load_test_split(source, train_split, test_split, reading)
        if test is None:
            raise ValueError(
                f"{source} has no split of objects to judge by: expected val_images.npy beside its objects."
            )
        train, fitted = take_train_subset(train, train_split, train_subset)
        parts = {
            fitted: (train, choose_rows(len(train), train_images, subset_seed), cls.train_renders),
            test[1]: (test[0], choose_rows(len(test[0]), test_images, subset_seed), None),
        }
        sets, latents = {}, {}
        for split, (images, rows, most) in parts.items():
            sets[split], latents[split] = _read(images, rows, most, source, split, **kept)
        return cls(sets[fitted], sets[test[1]], latents=latents)

    @property
    def is_labelled(self) -> bool:
        """Whether every object has a class."""
        return all(part.is_labelled for part in (self.train, self.test))


def _read(
    images: ImageSource, rows: Any, most: int | None, dataset: str, split: str, **options: Any
) -> tuple[ImageSet, Tensor]:
    """List renders of the objects ``rows``, ``most`` of each or all, with their latents (objects, renders, 7)."""
    if not isinstance(images.pairs, RenderedPairs):
        raise ValueError(
            f"{dataset}: expected objects with renders and latents, as 3DIEBench has them (train_images.npy, "
            "image_0.jpg, latent_0.npy, ...). Other images have other evaluators."
        )
    count = min(most or images.pairs.views, images.pairs.views)
    paths, numbers, labels = [], [], []
    for row in rows.tolist():
        entry = images.row(row)
        folder = (images.root or Path()) / PurePosixPath(entry[images.image_column]).parent
        paths += [folder / f"image_{number}.jpg" for number in range(count)]
        numbers.append([read_latents(folder, number).tolist() for number in range(count)])
        labels += [images.label(entry)] * count
    known = None if None in labels else torch.tensor(labels)
    # All of an object's renders stay together, so that none may be left out.
    made = ImageSet(paths, known, dataset, split, max_bad_share=0.0, decoding=images.decoding, **options)
    return made, torch.tensor(numbers)
