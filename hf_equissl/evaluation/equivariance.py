"""Whether a map of features turns, flips and grows with the image: the equivariance score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.frozen import FrozenEncoder
from .actions import ACTIONS, Action
from .base import Evaluator
from .data import EvaluationData
from .images import ImageSet
from .metrics import EQUIVARIANCE, EQUIVARIANCE_FLOOR, Metric
from .results import ResultRecord

# What records call the map of the last block, after the final norm.
LAST = "tokens"


class EquivarianceEvaluator(Evaluator):
    """Cosine between the map of the transformed image and the transformed map of the image.

    With F(x) (h, w, D) the patch tokens after the final norm, and rho_g what g does to a map:

        score_g = mean over images x and positions p of  cos( F(g x)_p , (rho_g F(x))_p )

    - rotation: 90, 180 and 270 degrees, averaged. Nothing is resampled, no corner is empty.
    - hflip: left and right.
    - scale: the square is resized (bilinear, antialiased) to every other whole grid of 0.7 to 1.3 times its area,
      averaged; rho_g resizes the map in the same way. The encoder interpolates its positions, if it has any.

    1 is exact equivariance. Images are the base images of the test sets, without any other augmentation. SER
    (https://arxiv.org/abs/2603.06693) tabulates such scores and does not publish their definition: this one is ours,
    and only the order of encoders can be compared with theirs.

    Tokens that resemble each other all over the image score high without being equivariant, up to 1 for a map that is
    constant. ``equivariance_floor`` is therefore recorded beside it: the same cosine with the positions of rho_g F(x)
    in a fixed random order, which is what remains of the score when it is not known what is where.
    """

    name: ClassVar[str] = "equivariance"
    metrics: ClassVar[tuple[Metric, ...]] = (EQUIVARIANCE, EQUIVARIANCE_FLOOR)
    unmeasured: ClassVar[str] = "whether token maps turn, flip and grow with the image"
    reading: ClassVar[str] = (
        "Equivariance: cosine of F(g x) and rho_g F(x), 1 is exact; its floor is the same with tokens in random order."
    )
    has_related_tasks: ClassVar[bool] = True
    needs_tokens: ClassVar[bool] = True
    reads_stored: ClassVar[bool] = False
    tasks = tuple(ACTIONS)

    def __init__(self, data: EvaluationData) -> None:
        """Keep the images, of which the test sets are used."""
        super().__init__(data, features=(LAST,), seeds=1)

    def check(self, encoder: FrozenEncoder) -> None:
        """Raise ``ValueError`` where the encoder has no square map, or one of another size than an image asks for."""
        grid = grid_side(encoder)
        for action in ACTIONS["scale"](encoder.image_size, grid):
            made = encoder.maps(action.image(_black_image(encoder)))[0].shape[-2:]
            expected = action.map(torch.zeros(1, 1, grid, grid)).shape[-2:]
            if made != expected:
                raise ValueError(
                    f"{encoder.name} gives a map of {tuple(made)} for a resized image, where one of {tuple(expected)} "
                    "was expected: scale has no equivariance score."
                )

    def settings(self, task: str) -> dict[str, Any]:
        """Return the version of the definition, which its docstring states."""
        return {"definition": "cosine of F(g x) and rho_g F(x), mean over tokens and images"}

    def layers(self, encoder: FrozenEncoder) -> dict[str, int]:
        """Name the layers whose maps are judged, and number them as ``FrozenEncoder.maps`` does."""
        return {LAST: -1}

    def evaluate(self, encoder: FrozenEncoder, task: str, seeds: Sequence[int]) -> list[ResultRecord]:
        """Score one kind of transformation on every test set."""
        layers = self.layers(encoder)
        actions = ACTIONS[task](encoder.image_size, grid_side(encoder))
        records = []
        for part in self.data.tests:
            scores = self._score(encoder, part, actions, tuple(layers.values()))
            for name, (score, floor) in zip(layers, scores.tolist(), strict=True):
                values = {EQUIVARIANCE.name: [score], EQUIVARIANCE_FLOOR.name: [floor]}
                records += self.records(encoder, task, name, values, seeds, test=part)
        return records

    def _score(self, encoder: FrozenEncoder, part: ImageSet, actions: list[Action], layers: Sequence[int]) -> Tensor:
        """Compute score and floor of each layer, (L, 2) float64."""
        total, count = torch.zeros(len(layers), 2, dtype=torch.float64), 0
        for pixels in chunks(part, encoder, len(layers)):
            maps = encoder.maps(pixels, layers)
            for action in actions:
                turned = encoder.maps(action.image(pixels), layers)
                for row, (before, after) in enumerate(zip(maps, turned, strict=True)):
                    expected = action.map(before).flatten(2)
                    found = after.flatten(2)
                    order = torch.randperm(found.shape[2], generator=torch.Generator().manual_seed(0))
                    pair = (expected, expected[:, :, order.to(expected.device)])
                    cosines = [F.cosine_similarity(found, other, dim=1).mean(1).double().sum() for other in pair]
                    total[row] += torch.stack(cosines).cpu()
            count += len(pixels)
        return total / (count * len(actions))


class LayerwiseEquivarianceEvaluator(EquivarianceEvaluator):
    """``EquivarianceEvaluator`` of the map after every block: which block still knows where things are.

    Maps are taken as the block leaves them, that of the last block after the final norm. One row per block, ``block_1``
    and so on; ``block_0`` is what enters the first one, position embeddings included.
    """

    name: ClassVar[str] = "equivariance_by_block"
    unmeasured: ClassVar[str] = ""

    @classmethod
    def applies_to(cls, data: EvaluationData) -> bool:
        """Return ``False``: so many rows are shown only when asked for."""
        return False

    def layers(self, encoder: FrozenEncoder) -> dict[str, int]:
        """Name the output of each block of the encoder: name -> its number, counted from 0."""
        return {f"block_{number}": number for number in range(encoder.count_layers())}

    def features_of(self, encoder: FrozenEncoder) -> tuple[str, ...]:
        """Name the blocks, the last one first: its number is the one to quote."""
        return tuple(reversed(self.layers(encoder)))


def grid_side(encoder: FrozenEncoder) -> int:
    """Find the side of the map that the encoder gives of its square images, by one pass over a black image.

    Raises:
        ValueError: it gives one vector per image, or a map that is not square.
    """
    size = encoder.image_size
    rows, columns = encoder.maps(_black_image(encoder))[0].shape[-2:]
    if rows != columns or size % rows:
        raise ValueError(
            f"{encoder.name} gives maps of {rows} x {columns} for images of {size} x {size} pixels: equivariance needs "
            "a square map whose cells are whole pixels."
        )
    return rows


def _black_image(encoder: FrozenEncoder) -> Tensor:
    size = encoder.image_size
    return torch.zeros(1, len(encoder.image_mean), size, size, device=encoder.device)


def chunks(part: ImageSet, encoder: FrozenEncoder, num_layers: int) -> Iterator[Tensor]:
    """Yield normalised images on the encoder's device, fewer at a time the more maps are kept of each."""
    for _, pixels in part.batches(encoder.image_size):
        for chunk in pixels.split(max(1, encoder.batch_size // num_layers)):
            yield encoder.normalise(chunk)
