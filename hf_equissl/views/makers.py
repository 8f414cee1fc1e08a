"""Further images that an objective asks for beside the usual crops: each objective's file holds their maker."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

if TYPE_CHECKING:
    from .base import Item
    from .view_specs import PipelineSpec

__all__ = ["ViewMaker", "ViewSettings", "derived_generator"]


@dataclass(frozen=True)
class ViewSettings:
    """What a maker may want to know of the pipeline that it works for.

    Attributes:
        image_size: Side of the global crops, in pixels.
        patch_size: Side of the encoder's patches, in pixels; ``None`` where the pipeline was not told.
        spec: What happens to each of the usual views; ``spec.views[0]`` are the colours of view 1.
    """

    image_size: int
    patch_size: int | None
    spec: PipelineSpec


class ViewMaker(ABC):
    """Makes one set of further images, in three places: per image, per batch, and on the device.

    ``crop`` and ``collate`` run in a DataLoader's worker, ``__call__`` where the model is. Randomness comes from the
    generators that are handed in and from nowhere else, so that a batch is the same whatever the number of workers, and
    after a resume. A maker's generators are its own: it moves neither the usual crops nor another maker's.

    Args:
        settings: Settings of the pipeline. Subclasses take keyword arguments after it, ``ExtraViews.options``.

    Attributes:
        replaces_global_crops: The images become the global crops themselves: one for each view of the pipeline, all
            of its size. The pipeline then makes none, applies g to the last of these, and normalises them.
        reads_global_crops: ``collate`` takes them from its samples, so nothing may replace them.
    """

    replaces_global_crops: ClassVar[bool] = False
    reads_global_crops: ClassVar[bool] = False

    def __init__(self, settings: ViewSettings) -> None:
        self.settings = settings

    def takes_from_batch(self, images: int) -> int | None:
        """Count the images of a batch, its last ones, that these views take away from the usual ones.

        With ``None``, the default, the maker sees the images of the usual views, and takes none away. A maker that
        takes a share of the batch may find that this is 0 images: it then makes views of none.
        """
        return None

    def crop(self, item: Item, rng: np.random.Generator) -> dict[str, Any]:
        """Cut what is needed from one image; draw what belongs to it alone.

        Args:
            item: The decoded image or images.
            rng: Follows from (seed, epoch, image) and is this maker's own.

        Returns:
            Tensors and plain values by name, for ``collate``.
        """
        return {}

    def collate(
        self, own: Sequence[dict[str, Any]], samples: Sequence[Mapping[str, Any]], rng: np.random.Generator
    ) -> dict[str, Any]:
        """Put images together, and draw what a batch shares, such as a shape.

        Args:
            own: What ``crop`` returned for each image.
            samples: What ``ViewPipeline.crop`` made of the same images, such as ``global_crops``.
            rng: The batch's, and this maker's own. It follows from the first image of the batch in its epoch, so it is
                another one for each (step, micro-batch, process), and the same again after a resume.

        Returns:
            Tensors, which travel to the device, and plain values, which stay as they are. By default ``own``, stacked.
        """
        return dict(default_collate(list(own)))

    @abstractmethod
    def __call__(self, batch: dict[str, Any]) -> tuple[Sequence[Tensor], Any]:
        """Make the images on the device, without waiting for it and without gradient.

        Args:
            batch: What ``collate`` returned, its tensors on the device.

        Returns:
            One tensor per view (M, 3, H, W), fp32 in [0, 1]: the pipeline normalises them. Sizes may differ between
            views, and M is the same. And the facts that the objective needs to know of them, for
            ``Views.facts``; ``None`` where there are none.
        """


def derived_generator(seed: int, purpose: str, batch: bool = False) -> np.random.Generator:
    """Open a generator for one purpose from a sample's seed: purposes do not disturb each other.

    Args:
        seed: ``seed`` of a sample, which ``ViewPipeline.crop`` drew.
        purpose: Any name.
        batch: Whether the numbers are those of the batch that this sample leads, not of the sample.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), int(batch)])
