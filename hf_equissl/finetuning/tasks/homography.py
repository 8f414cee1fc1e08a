"""Homography estimation as on S-COCO: where the corners of a patch went, from two patches, mean corner error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, PreTrainedConfig

from ...data import ImageSource
from ...evaluation.metrics import Metric
from ..settings import FineTuningSettings
from .base import Splits, Step
from .corner_pairs import FRAME, fit_homography, make_pair, mean_corner_error, patch_corners, project
from .dense import DenseTask
from .labelled_images import SourceSamples, load_sources

CHANNELS = (256, 128)


class PairedPatches(SourceSamples):
    """Images from which pairs are cut, ``image`` (grey, ``FRAME``), and the number of the pair, ``pair``."""

    def __init__(self, source: ImageSource, count: int | None = None) -> None:
        super().__init__(source)
        self.count = count or len(source)

    def __len__(self) -> int:
        """Return the number of pairs; an image may give several."""
        return self.count

    def read(self, index: int) -> dict[str, Any]:
        """Decode one image and resize it, whatever its shape, as the published protocol does."""
        image = super().read(index % len(self.source))["image"]
        return {"image": image.convert("L").resize(FRAME, Image.Resampling.BILINEAR), "pair": index}

    def item_name(self, index: int) -> str:
        """Return the name of the image of a pair."""
        return super().item_name(index % len(self.source))


class HomographyModel(nn.Module):
    """Both patches through one backbone, their feature maps one above the other through three convolutions.

    ``forward`` takes (B, 2, 3, S, S) and gives (B, 2, rows, columns): how far, in x and y and in units of rho, the
    middle of each patch of the encoder moves. Before training it is 0: nothing moves.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.backbone = AutoBackbone.from_config(config)
        width = 2 * sum(self.backbone.channels)
        self.head = nn.Sequential(
            nn.Conv2d(width, CHANNELS[0], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS[0], CHANNELS[1], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS[1], 2, 3, padding=1),
        )
        last: Any = self.head[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Estimate the field of displacements."""
        maps = torch.cat(self.backbone(pixel_values.flatten(0, 1)).feature_maps, dim=1)  # (2B, D, rows, columns)
        return self.head(maps.unflatten(0, (-1, 2)).flatten(1, 2))


class HomographyTask(DenseTask):
    """The homography between two patches of an image, from S-COCO's generator of pairs (see ``make_pair``).

    Images become grey and 320 x 240; patches are resized to the encoder's square. The head estimates the field of
    displacements, smooth L1 in pixels; a homography is fitted to it by least squares and moves the patch's corners.
    Their mean distance to the true ones is the mean corner error (MCE), in pixels of the 320 x 240 image.

    The reference, "Rethinking Planar Homography Estimation Using Perspective Fields", compares the field at every
    pixel and fits by RANSAC; here it is compared at the middles of the encoder's patches, where the head gives it: what
    lies between them, and beyond the outermost, is interpolation.

    Args:
        patch: Side of the patches in pixels of the 320 x 240 image: 128 in the reference; 112 in the EquiSSL paper.
        rho: Largest movement of a corner in x and in y.
        fixed: Cut the same pair out of an image in every epoch, as in tests; else another one each time.
        train_pairs, test_pairs: How many; ``None``: one for each image. Images serve again where pairs are more.
        pair_seed: Seed of the pairs that are the same in every epoch: those of tests follow from it and their number.
        layers: Blocks whose feature maps the head reads, from 1; ``None``: the last one.
    """

    name = "homography"
    noun = "homography estimation"
    result = "Homography estimator"
    head = "a head of three convolutions"
    metrics = (Metric("mce", "px", digits=2, higher_is_better=False, hub_type="mean_corner_error"),)
    unread = (*DenseTask.unread, "crop_scale")
    stacked = ("pixels", "offsets")

    def __init__(
        self,
        *,
        patch: int = 128,
        rho: int = 32,
        fixed: bool = False,
        train_pairs: int | None = None,
        test_pairs: int | None = None,
        pair_seed: int = 0,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        if rho < 1 or patch <= 2 * rho or patch + 2 * rho > min(FRAME):
            raise ValueError(
                f"patch and rho (--set) are {patch} and {rho}: expected rho of 1 or more, a patch of more than 2 rho "
                f"pixels, so that corners never cross, and patch + 2 rho of at most {min(FRAME)}, the lower side of "
                "the images that patches are cut from."
            )
        for name, value in (("train_pairs", train_pairs), ("test_pairs", test_pairs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} (--set) is {value}: expected 1 or more.")
        self.patch, self.rho, self.fixed = patch, rho, fixed
        self.train_pairs, self.test_pairs, self.pair_seed = train_pairs, test_pairs, pair_seed

    def options(self) -> dict[str, Any]:
        """Return all options, but for numbers of pairs that nobody gave."""
        counts = {"train_pairs": self.train_pairs, "test_pairs": self.test_pairs}
        return {
            **super().options(),
            "patch": self.patch,
            "rho": self.rho,
            "fixed": self.fixed,
            "pair_seed": self.pair_seed,
            **{name: value for name, value in counts.items() if value is not None},
        }

    def _layers_of(self, config: Any, source: str) -> list[int]:
        return super()._layers_of(config, source) if self.layers else [config.num_hidden_layers]

    # ---- data ----

    def load(self, settings: FineTuningSettings) -> Splits:
        """Open images; labels are not looked at.

        Raises:
            ValueError: source or split do not exist, or none of the first images decodes.
        """
        sources = load_sources(settings).limit(settings.train_images, settings.test_images)
        train, test = PairedPatches(sources.train, self.train_pairs), PairedPatches(sources.test, self.test_pairs)
        return Splits(train, test, sources.train_split, sources.test_split, remarks=sources.remarks())

    def blank(self) -> dict[str, Any]:
        """Return a black image."""
        return {"image": Image.new("L", FRAME), "pair": 0}

    def transform(self, sample: dict[str, Any], rng: Any) -> dict[str, Any]:
        """Cut a pair.

        Returns:
            ``pixels``, uint8 (2, 3, S, S), three equal channels; ``offsets``, float32 (4, 2), of the corners in pixels.
        """
        if rng is None or self.fixed:
            rng = np.random.default_rng([self.pair_seed, sample["pair"]])
        *patches, offsets = make_pair(sample["image"], self.patch, self.rho, rng)
        size = (self.inputs.image_size,) * 2
        grey = np.stack([np.asarray(patch.resize(size, Image.Resampling.BILINEAR)) for patch in patches])
        pixels = torch.from_numpy(grey)[:, None].expand(2, 3, *size).contiguous()
        return {"pixels": pixels, "offsets": torch.from_numpy(offsets.astype(np.float32))}

    # ---- model ----

    def build(self, backbone_config: PreTrainedConfig, classes: Sequence[str]) -> nn.Module:
        """Make the model with random weights."""
        return HomographyModel(backbone_config)

    # ---- loss and metrics ----

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Step:
        """Compare the field with the true one by smooth L1, in fp32, with the knee at one pixel, in units of rho."""
        field = model(batch["pixel_values"]).float()
        points = self._middles(field.shape[2:])
        corners = patch_corners(self.patch)
        true = project(fit_homography(corners, corners + batch["offsets"].cpu().numpy()), points) - points
        target = torch.from_numpy(true / self.rho).to(field.device, torch.float32)
        return Step(F.smooth_l1_loss(field.flatten(2).transpose(1, 2), target, beta=1 / self.rho), field)

    def judge(self, output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Fit a homography to each field, and return where it moves the corners, and where they went, (B, 4, 2)."""
        points = self._middles(output.shape[2:])
        field = output.flatten(2).transpose(1, 2).cpu().double().numpy() * self.rho
        corners = patch_corners(self.patch)
        moved = project(fit_homography(points, points + field), corners) - corners
        return torch.from_numpy(moved).to(output.device, torch.float32), batch["offsets"]

    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Compute the mean corner error, and, to be read beside it, that of saying that nothing moves."""
        predictions, targets = np.asarray(predictions), np.asarray(targets)
        return {
            "mce": mean_corner_error(predictions, targets),
            "baseline_identity": mean_corner_error(np.zeros_like(targets), targets),
        }

    def _middles(self, grid: Sequence[int]) -> np.ndarray:
        """Return the middles (rows * columns, 2) of the encoder's patches, row by row."""
        rows, columns = ((np.arange(count) + 0.5) * self.patch / count for count in grid)
        return np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
