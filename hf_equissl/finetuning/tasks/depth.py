"""Monocular depth: metres for every pixel, a linear head on the encoder's feature maps, RMSE and AbsRel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, PreTrainedConfig

from ...evaluation.metrics import Metric
from ...views.cropping import Box, random_box
from ..settings import FineTuningSettings
from .base import Splits, Step
from .dense import DenseTask
from .depth_maps import DEPTH_COLUMNS, DEPTH_FOLDERS, HOLE, DepthSamples, DepthUnits
from .masks import load_masked_sources

# Number of blocks -> those that DINOv2's configurations of linear heads on four layers read (``linear4`` of its depth
# checkpoints: 2, 5, 8, 11 of ViT-S and -B, 4, 11, 17, 23 of ViT-L, 9, 19, 29, 39 of ViT-g, from 0).
DINOV2_LAYERS = {12: (3, 6, 9, 12), 24: (5, 12, 18, 24), 40: (10, 20, 30, 40)}
MIN_DEPTH = 1e-3
NUM_BINS = 256
UPSAMPLING = 4
# Weight of the mean error of the logarithm beside its variance, and what keeps the logarithm of 0 finite.
MEAN_WEIGHT, LOG_EPSILON = 0.15, 1e-3
# Upper, lower, left and right edge of what is judged, as shares of the image: Eigen's crop of NYU-Depth v2 (rows 45 to
# 471 of 480, columns 41 to 601 of 640), and Garg's of KITTI.
EVAL_CROPS = {
    "eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}


class DepthErrors(NamedTuple):
    """How far depths are from the true ones, in the measures of Eigen et al. (https://arxiv.org/abs/1406.2283).

    Attributes:
        rmse: Root of the mean squared error, in metres.
        abs_rel: Mean of |p - t| / t.
        delta1: Share of pixels whose ratio to the truth, or the truth's to them, is below 1.25.
    """

    rmse: float
    abs_rel: float
    delta1: float


def depth_errors(predicted: Tensor, true: Tensor) -> DepthErrors:
    """Compute the errors of positive depths in metres (n,), (n,), in float64.

    Raises:
        ValueError: the shapes differ, there are no pixels, or a true depth is not positive.
    """
    predicted, true = predicted.double(), true.double()
    if predicted.shape != true.shape or not true.numel() or bool((true <= 0).any()):
        raise ValueError(
            f"Depths must have one shape and be above 0, got {tuple(predicted.shape)} and {tuple(true.shape)}; leave "
            "out the pixels whose depth is not known."
        )
    difference = predicted - true
    ratio = torch.maximum(predicted / true, true / predicted.clamp(min=1e-12))
    return DepthErrors(
        difference.square().mean().sqrt().item(),
        (difference.abs() / true).mean().item(),
        (ratio < 1.25).double().mean().item(),
    )


def scale_invariant_log_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Compute sqrt(Var(g) + 0.15 mean(g)^2), g = log(p + 0.001) - log(t + 0.001), over pixels (n,), (n,), n > 1.

    The scale-invariant error of Eigen et al. in the form that AdaBins gave it (https://arxiv.org/abs/2011.14141), with
    the constants of the toolbox that DINOv2 trains its depth heads with.
    """
    g = (predicted + LOG_EPSILON).log() - (true + LOG_EPSILON).log()
    return (g.var(correction=0) + MEAN_WEIGHT * g.mean().square() + 1e-12).sqrt()


class DepthModel(nn.Module):
    """A backbone, and one linear map of its feature maps' channels to bins of depth.

    ``forward`` takes (B, 3, S, S) and gives depth in metres, float32 (B, 4 rows, 4 columns) of the maps: the mean of
    the middles of 256 bins, equally wide from 0.001 to ``max_depth``, weighted by max(logit, 0) + 0.1.
    """

    def __init__(self, config: PreTrainedConfig, max_depth: float) -> None:
        super().__init__()
        self.backbone = AutoBackbone.from_config(config)
        self.bins = nn.Conv2d(sum(self.backbone.channels), NUM_BINS, 1)
        self.max_depth = max_depth

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Estimate depth."""
        maps = torch.cat(self.backbone(pixel_values).feature_maps, dim=1)
        # A linear map and an interpolation of what goes into it may change places; 256 channels are fewer.
        logits = F.interpolate(self.bins(maps).float(), scale_factor=UPSAMPLING, mode="bilinear", align_corners=False)
        weights = logits.relu() + 0.1
        depths = torch.linspace(MIN_DEPTH, self.max_depth, NUM_BINS, device=weights.device)
        return torch.einsum("bkhw,k->bhw", weights, depths) / weights.sum(1)


class DepthTask(DenseTask):
    """Metres for every pixel, by the linear head of DINOv2's protocol on four layers (https://arxiv.org/abs/2304.07193).

    It differs from that in what it leaves out: CLS beside each patch, which backbones do not give, the gradient
    matching loss, and the second pass over the mirrored image.

    Images are resized to the encoder's square as a whole, and half of the training images mirrored. They are cropped
    only if ``--crop_scale`` says so: what is cropped and resized looks nearer than it is. The estimate is resized,
    bilinearly, to the stored size and judged there, image by image, where depth is known: above 0 and at most
    ``max_depth``.

    Args:
        depth_scale: What a metre is in the stored numbers: 1000 for millimetres, as of NYU-Depth v2; 256 for KITTI; 1
            for metres.
        max_depth: Largest depth, in metres, that is learned and judged: 10 for NYU-Depth v2, 80 for KITTI.
        eval_crop: Key of ``EVAL_CROPS``: the part of an image that is judged; ``None``: all of it.
        depth_column: Column of the depth maps; ``None``: the first of ``DEPTH_COLUMNS`` that exists.
        layers: As in ``DenseTask``; ``None``: the four of ``DINOV2_LAYERS``.
    """

    name = "depth"
    published_layers = DINOV2_LAYERS
    noun = "depth estimation"
    result = "Depth estimator"
    head = "a linear head"
    metrics = (
        Metric("rmse", "m", higher_is_better=False, hub_type="rmse"),
        Metric("abs_rel", higher_is_better=False, hub_type="abs_rel"),
        Metric("delta1", "%", digits=2),
    )
    pipeline_tag = "depth-estimation"

    def __init__(
        self,
        *,
        depth_scale: float = 1000.0,
        max_depth: float = 10.0,
        eval_crop: str | None = None,
        depth_column: str | None = None,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(layers=layers)
        if not depth_scale > 0 or not max_depth > MIN_DEPTH:
            raise ValueError(
                f"depth_scale and max_depth (--set) are {depth_scale:g} and {max_depth:g}: expected more than 0, and "
                f"more than {MIN_DEPTH:g} metres."
            )
        if eval_crop is not None and eval_crop not in EVAL_CROPS:
            raise ValueError(f"eval_crop (--set) is {eval_crop!r}: choose among {', '.join(EVAL_CROPS)}.")
        self.units, self.eval_crop, self.depth_column = DepthUnits(depth_scale, max_depth), eval_crop, depth_column

    def options(self) -> dict[str, Any]:
        """Return the options, but for the name of the column, which others say."""
        crop = {} if self.eval_crop is None else {"eval_crop": self.eval_crop}
        units = {"depth_scale": self.units.scale, "max_depth": self.units.max_depth}
        return {**super().options(), **units, **crop}

    def protocol(self) -> dict[str, Any]:
        """Say what is learned and judged, and how images were cropped."""
        scale = self.settings.crop_scale
        return {
            **self.options(),
            **({} if self.layers else {"layers": "as DINOv2"}),
            **({} if scale is None else {"crop_scale": list(scale)}),
            "flip_probability": 0.5 if self.settings.flip else 0.0,
        }

    # ---- data ----

    def load(self, settings: FineTuningSettings) -> Splits:
        """Open images and depth maps, as ``load_masked_sources``: in folders ``images`` and ``depth``, or columns.

        Raises:
            ValueError: as there; none of the first depth maps can be used.
        """
        columns = DEPTH_COLUMNS if self.depth_column is None else (self.depth_column,)
        sources = load_masked_sources(settings, columns, what="depth map", folders=DEPTH_FOLDERS)
        sources = sources.limit(settings.train_images, settings.test_images)
        train, test = DepthSamples(sources.train, self.units), DepthSamples(sources.test, self.units)
        for samples in (train, test):
            samples.check()
        return Splits(train, test, sources.train_split, sources.test_split, remarks=sources.remarks())

    def blank(self) -> dict[str, Any]:
        """Return a black image without any depth."""
        side = self.inputs.image_size
        return {"image": Image.new("RGB", (side, side)), "depth": np.full((side, side), HOLE, np.float32)}

    def transform(self, sample: dict[str, Any], rng: Any) -> dict[str, Any]:
        """Resize an image to the square, and its depth with it in training, by nearest neighbours: holes stay holes.

        Returns:
            ``pixels``, uint8 (3, S, S); ``depth``, float32 (S, S), or of the stored size at evaluation.
        """
        image, depth, size = sample["image"], sample["depth"], (self.inputs.image_size,) * 2
        width, height = image.size
        box: Box = (0, 0, width, height)
        mirrored = False
        if rng is not None:
            if self.settings.crop_scale is not None:
                box = random_box(width, height, self.settings.crop_scale, (width / height,) * 2, rng)
            mirrored = bool(rng.random() < 0.5) and self.settings.flip
            depth = np.asarray(Image.fromarray(depth).resize(size, Image.Resampling.NEAREST, box=box))
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))
        if mirrored:
            pixels, depth = pixels[:, ::-1], depth[:, ::-1]
        return {
            "pixels": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
            "depth": torch.from_numpy(depth.copy()),
        }

    # ---- model ----

    def build(self, backbone_config: PreTrainedConfig, classes: Sequence[str]) -> nn.Module:
        """Make the model with random weights."""
        return DepthModel(backbone_config, self.units.max_depth)

    def image_processor(self) -> Any:
        """Make the processor that resizes whole images to the square."""
        from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

        side = self.inputs.image_size
        mean, std = list(self.inputs.image_mean), list(self.inputs.image_std)
        return SegformerImageProcessorPil(size={"height": side, "width": side}, image_mean=mean, image_std=std)

    # ---- loss and metrics ----

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Step:
        """Compute the scale-invariant logarithmic error over the pixels of the batch whose depth is known, in fp32."""
        depth = model(batch["pixel_values"]).float()
        size = batch["pixel_values"].shape[2:]
        maps = [true[None, None] for true in batch["depth"]]
        fitted = [true if true.shape[2:] == size else F.interpolate(true, size, mode="nearest-exact") for true in maps]
        true = torch.cat(fitted)[:, 0]
        known = true > HOLE
        guess = F.interpolate(depth[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        # The variance of no pixels is not a number; the sum of none is 0, and so is its gradient.
        enough = int(known.sum()) > 1
        return Step(scale_invariant_log_loss(guess[known], true[known]) if enough else guess[known].sum() * 0, depth)

    def judge(self, output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compare at the stored size.

        Returns:
            float32 (B, 3): ``DepthErrors`` of each image; (B, 3): of its true depths number, mean and mean square. All
            0 where no depth is known.
        """
        found, facts = [], []
        for depth, stored in zip(output, batch["depth"], strict=True):
            guess = F.interpolate(depth[None, None], stored.shape, mode="bilinear", align_corners=False)[0, 0]
            rows, columns = self._judged(*stored.shape)
            guess, true = guess[rows, columns], stored[rows, columns]
            known = true > HOLE
            values = true[known].double()
            errors = depth_errors(guess[known].clamp(MIN_DEPTH, self.units.max_depth), values) if len(values) else None
            found.append(torch.tensor(errors or (0.0, 0.0, 0.0)))
            moments = (len(values), values.mean().item(), values.square().mean().item()) if errors else (0.0, 0.0, 0.0)
            facts.append(torch.tensor(moments))
        return torch.stack(found).to(output.device), torch.stack(facts).to(output.device)

    def measure(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Average over images where depth is known somewhere, beside the RMSE of saying the mean depth everywhere.

        Raises:
            ValueError: depth is known nowhere.
        """
        errors, (counts, means, squares) = np.asarray(predictions, np.float64), np.asarray(targets, np.float64).T
        known = counts > 0
        if not known.any():
            raise ValueError("No test image has a known depth in the part that is judged: there is nothing to measure.")
        constant = means[known].mean()
        spread = np.sqrt(np.maximum(squares - 2 * constant * means + constant**2, 0))
        values = dict(zip(DepthErrors._fields, errors[known].mean(0).tolist(), strict=True))
        return {**values, "baseline_mean_depth": float(spread[known].mean())}

    def _judged(self, height: int, width: int) -> tuple[slice, slice]:
        """Return rows and columns of the part of an image that is judged."""
        if self.eval_crop is None:
            return slice(height), slice(width)
        upper, lower, left, right = EVAL_CROPS[self.eval_crop]

        def edge(share: float, side: int) -> int:
            return int(share * side + 1e-6)  # cut off, as the published code does; whole pixels stay whole

        return slice(edge(upper, height), edge(lower, height)), slice(edge(left, width), edge(right, width))
