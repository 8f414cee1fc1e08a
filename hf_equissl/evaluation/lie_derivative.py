"""How far each block is from moving with the image under infinitesimal motions: the Lie derivative, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.frozen import FrozenEncoder
from .base import Evaluator
from .data import EvaluationData
from .equivariance import chunks, grid_side
from .images import ImageSet
from .metrics import LIE_DERIVATIVE, Metric
from .results import ResultRecord


def _rotation(t: float) -> list[list[float]]:
    return [[math.cos(t), -math.sin(t), 0.0], [math.sin(t), math.cos(t), 0.0]]


def _translation(t: float) -> list[list[float]]:
    return [[1.0, 0.0, -t], [0.0, 1.0, 0.0]]


def _scale(t: float) -> list[list[float]]:
    return [[math.exp(-t), 0.0, 0.0], [0.0, math.exp(-t), 0.0]]


# Inverse maps in units of half the side: angle in radians, shift to the right, logarithm of the factor.
GROUPS: dict[str, Callable[[float], list[list[float]]]] = {
    "rotation": _rotation,
    "translation": _translation,
    "scale": _scale,
}


def move(values: Tensor, group: str, t: float) -> Tensor:
    """Act on images or maps (B, C, h, h) with exp(t X): the same motion whatever the side. Bilinear, edges repeated."""
    theta = torch.tensor(GROUPS[group](t), device=values.device, dtype=values.dtype).expand(len(values), 2, 3)
    grid = F.affine_grid(theta, list(values.shape), align_corners=False)
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)


class LieDerivativeEvaluator(Evaluator):
    """Lie derivative of the map after every block, relative to how much that map would move.

    After "The Lie Derivative for Measuring Learned Equivariance" (https://arxiv.org/abs/2210.02984): with exp(t X) a
    rotation about the centre, a shift to the right or a scaling, and rho its action on maps (h, w, D),

        L F (x) = d/dt rho_exp(-tX) F(exp(tX) x) at t = 0,      M F (x) = d/dt rho_exp(tX) F(x) at t = 0,

    the record is ||L F|| / ||M F||, with the squares summed over images, channels and the positions in the inscribed
    disk, a cell narrower than it. 0: the map moves with the image. 1: it stays where it is (L F = -M F). Above 1 it
    changes in other ways than by moving, as maps of patches do under motions smaller than a patch: aliasing, which is
    most of the error of vision transformers in that paper, too. There it is ||L F||^2 per output, which cannot be
    compared between blocks whose features differ in size; hence the ratio, which is ours. Derivatives are central
    differences at t = +-``step``, with bilinear interpolation.

    Blocks as in ``LayerwiseEquivarianceEvaluator``. Base images of the test sets. A map of few cells cannot move
    smoothly: compare encoders of one grid.
    """

    name: ClassVar[str] = "lie_derivative"
    metrics: ClassVar[tuple[Metric, ...]] = (LIE_DERIVATIVE,)
    reading: ClassVar[str] = "Lie derivative: 0 moves with the image, 1 stays where it is, more changes otherwise."
    has_related_tasks: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = True
    reads_stored: ClassVar[bool] = False
    tasks = tuple(GROUPS)

    def __init__(self, data: EvaluationData, *, step: float = 0.03) -> None:
        """Check the step.

        Args:
            data: Images, of which the test sets are used.
            step: Step of the differences: radians, half sides, logarithm of a factor. 0.03 is half a pixel of 32.
        """
        super().__init__(data, features=("blocks",), seeds=1)
        if not 0 < step < 1:
            raise ValueError(f"step must lie between 0 and 1, got {step}.")
        self.step = step

    @classmethod
    def applies_to(cls, data: EvaluationData) -> bool:
        """Return ``False``: so many rows are shown only when asked for."""
        return False

    def check(self, encoder: FrozenEncoder) -> None:
        """Raise ``ValueError`` where the encoder has no square map of at least 4 x 4 cells."""
        if (side := grid_side(encoder)) < 4:
            raise ValueError(f"{encoder.name} gives maps of {side} x {side}: a motion needs at least 4 x 4 to be seen.")

    def features_of(self, encoder: FrozenEncoder) -> tuple[str, ...]:
        """Name the blocks, the last one first: its number is the one to quote."""
        return tuple(f"block_{number}" for number in reversed(range(encoder.count_layers())))

    def settings(self, task: str) -> dict[str, Any]:
        """Return the definition and its step."""
        return {"definition": "||d/dt rho_-t F(g_t x)|| / ||d/dt rho_t F(x)||", "step": self.step}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Measure one kind of motion on every test set."""
        names = self.features_of(encoder)
        records = []
        for part in self.data.tests:
            ratios = self._ratios(encoder, part, task, [int(name.removeprefix("block_")) for name in names])
            for name, ratio in zip(names, ratios, strict=True):
                records += self.records(encoder, task, name, {LIE_DERIVATIVE.name: [ratio]}, seeds, test=part)
        return records

    def _ratios(self, encoder: FrozenEncoder, part: ImageSet, group: str, layers: Sequence[int]) -> list[float]:
        error, motion = torch.zeros(2, len(layers), dtype=torch.float64)
        for pixels in chunks(part, encoder, len(layers)):
            still, ahead, behind = (
                encoder.maps(move(pixels, group, t) if t else pixels, layers) for t in (0.0, self.step, -self.step)
            )
            for row, (at_rest, after, before) in enumerate(zip(still, ahead, behind, strict=True)):
                disk = _inner_disk(at_rest)
                followed = move(after, group, -self.step) - move(before, group, self.step)
                moved = move(at_rest, group, self.step) - move(at_rest, group, -self.step)
                error[row] += (followed * disk).square().sum().double().cpu()
                motion[row] += (moved * disk).square().sum().double().cpu()
        if not bool((motion > 0).all()):
            raise ValueError(
                f"{encoder.name} gives maps that are constant over each image: they have no Lie derivative under "
                f"{group}, whatever the image does."
            )
        return (error / motion).sqrt().tolist()


def _inner_disk(values: Tensor) -> Tensor:
    """Mark the cells of a map (B, D, h, h) within h / 2 - 1 cells of its centre, (h, h): edges do not reach them."""
    side = values.shape[-1]
    line = torch.arange(side, device=values.device) - (side - 1) / 2
    return ((line[:, None].square() + line.square()).sqrt() <= side / 2 - 1).to(values.dtype)
