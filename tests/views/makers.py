"""Small makers of further views, one for each kind that the methods of the field need."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hf_equissl.views.augmentation import VIEW_DRAWS, augment
from hf_equissl.views.cropping import crop_views
from hf_equissl.views.makers import ViewMaker
from hf_equissl.views.view_specs import PIPELINES, ViewSpec

CENTRE = PIPELINES["center"].views[0]


def pixels_of(images: tuple[Image.Image, ...], spec: ViewSpec, size: int, rng: np.random.Generator) -> Tensor:
    """One crop, uint8 (3, size, size)."""
    return torch.from_numpy(crop_views(images[:1], (spec,), size, rng)[0][0]).permute(2, 0, 1)


class UnaugmentedImage(ViewMaker):
    """EquiMod's third view."""

    def crop(self, item, rng) -> dict[str, Any]:
        return {"pixels": pixels_of(item.images, CENTRE, self.settings.image_size, rng)}

    def __call__(self, batch):
        return [batch["pixels"].float() / 255], None


class SmallTurnedCrops(ViewMaker):
    """E-SSL's small crop, turned four ways."""

    def __init__(self, settings, size: int = 16) -> None:
        super().__init__(settings)
        self.size, self.spec = size, ViewSpec(crop_scale=(0.05, 0.14))

    def crop(self, item, rng) -> dict[str, Any]:
        pixels = pixels_of(item.images, self.spec, self.size, rng)
        return {"pixels": pixels, "draws": torch.from_numpy(rng.random(len(VIEW_DRAWS), dtype=np.float32))}

    def __call__(self, batch):
        images, _ = augment(batch["pixels"], batch["draws"], self.spec)
        return [images.rot90(turns, dims=(-2, -1)) for turns in range(4)], None


class TransformedShare(ViewMaker):
    """SER's sub-batch: two photometric versions of a crop, each resized to a grid that the batch shares, and turned."""

    reads_global_crops = True

    def __init__(self, settings, images: int = 2) -> None:
        super().__init__(settings)
        self.images = images

    def takes_from_batch(self, images: int) -> int:
        return self.images

    def crop(self, item, rng) -> dict[str, Any]:
        return {"draws": torch.from_numpy(rng.random((2, len(VIEW_DRAWS)), dtype=np.float32))}

    def collate(self, own, samples, rng) -> dict[str, Any]:
        side = self.settings.image_size // self.settings.patch_size
        batch = super().collate(own, samples, rng)
        batch["crops"] = torch.stack([sample["global_crops"][0] for sample in samples])
        batch["grids"] = [tuple(rng.integers(side - 1, side + 2, 2).tolist()) for _ in range(2)]
        batch["turns"] = rng.integers(0, 4, 2).tolist()
        return batch

    def __call__(self, batch):
        views = []
        for number, (rows, columns) in enumerate(batch["grids"]):
            images, _ = augment(batch["crops"], batch["draws"][:, number], self.settings.spec.views[number])
            size = (rows * self.settings.patch_size, columns * self.settings.patch_size)
            views.append(F.interpolate(images, size, mode="bicubic").rot90(batch["turns"][number], dims=(-2, -1)))
        return views, {key: batch[key] for key in ("grids", "turns")}


class PairedCrops(ViewMaker):
    """STL's aligned views: images 2i and 2i + 1 are cropped alike."""

    replaces_global_crops = True

    def crop(self, item, rng) -> dict[str, Any]:
        size = self.settings.image_size
        pixels = np.array(item.images[0].resize((size, size), Image.Resampling.BICUBIC))
        return {"pixels": torch.from_numpy(pixels)}

    def collate(self, own, samples, rng) -> dict[str, Any]:
        views = []
        for spec in self.settings.spec.views:
            seeds = rng.integers(1 << 62, size=-(-len(own) // 2)).tolist()
            crops = [
                pixels_of(
                    (Image.fromarray(one["pixels"].numpy()),),
                    spec,
                    self.settings.image_size,
                    np.random.default_rng(seeds[number // 2]),
                )
                for number, one in enumerate(own)
            ]
            views.append(torch.stack(crops))
        return {"views": torch.stack(views)}

    def __call__(self, batch):
        return list(batch["views"].float() / 255), None
