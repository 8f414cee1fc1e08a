from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from hf_equissl.encoders import FrozenEncoder, open_frozen
from hf_equissl.evaluation import EquivarianceEvaluator, EvaluationData, ImageSet, build_evaluator

from .conftest import gradient_images


class Cells(nn.Module):
    """The mean colour of each cell of 2 x 2 pixels, which moves with the image; ``how`` it is spoilt."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how

    def forward(self, pixel_values: Tensor) -> Tensor:
        cells = F.avg_pool2d(pixel_values, 2)
        if self.how == "shuffled":
            order = torch.randperm(cells[0, 0].numel(), generator=torch.Generator().manual_seed(7))
            return cells.flatten(2)[:, :, order].view_as(cells)
        if self.how == "mean":
            return cells.mean((2, 3), keepdim=True).expand_as(cells)
        return cells


def noise_data(count: int = 24, size: int = 16) -> EvaluationData:
    images = list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8))
    return EvaluationData(*(ImageSet(images, None, "noise", split, progress=False) for split in ("train", "test")))


def scores(how: str, data: EvaluationData) -> dict[tuple[str, str], float]:
    encoder = FrozenEncoder(Cells(how), image_size=16, batch_size=7)
    evaluator = build_evaluator("equivariance", data)
    evaluator.check(encoder)
    return {(record.task, record.metric): record.value for record in evaluator(encoder)}


def test_score_of_encoders_whose_answer_is_known() -> None:
    data = noise_data()
    exact, shuffled, mean = (scores(how, data) for how in ("", "shuffled", "mean"))
    for task in ("rotation", "hflip"):
        assert exact[task, "equivariance"] == pytest.approx(1, abs=1e-6)
        assert exact[task, "equivariance_floor"] < 0.7
        assert shuffled[task, "equivariance"] < 0.7
    # Resizing noise before and after averaging differs a little; a map without places does not care.
    assert exact["scale", "equivariance"] > 0.75 > shuffled["scale", "equivariance"]
    # A constant map scores 1 as well: only the floor shows that it knows nothing about places.
    assert [mean["rotation", metric.name] for metric in EquivarianceEvaluator.metrics] == pytest.approx(
        [1, 1], abs=1e-6
    )
    assert scores("", data) == exact


def test_scale_is_exact_where_interpolation_is() -> None:
    """Images that are linear in x and y resize exactly, but for their edges."""
    data = EvaluationData(*(ImageSet(gradient_images(8, seed, 64), progress=False) for seed in (0, 1)))
    encoder = FrozenEncoder(Cells(), image_size=64)
    values = [record for record in build_evaluator("equivariance", data)(encoder) if record.task == "scale"]
    assert values[0].value > 0.999 > values[1].value


def test_every_block_of_a_transformer_has_a_row() -> None:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=4
    )
    encoder = FrozenEncoder(Dinov2Model(config), image_size=16)
    data = noise_data(6)
    last = {record.task: record.value for record in build_evaluator("equivariance", data)(encoder) if record.primary}
    blocks = build_evaluator("equivariance_by_block", data)
    blocks.check(encoder)
    records = [record for record in blocks(encoder) if record.metric == "equivariance"]
    assert {record.features for record in records} == {f"block_{number}" for number in range(4)}
    assert {record.task: record.value for record in records if record.primary} == pytest.approx(last, abs=1e-6)
    assert {record.features for record in records if record.primary} == {"block_3"}
    assert not blocks.missing_seeds(encoder, "rotation", blocks(encoder))
    assert not blocks.applies_to(data)


def test_lie_derivative_of_maps_that_follow_and_that_stay() -> None:
    class Smooth(nn.Module):
        def __init__(self, moves: bool) -> None:
            super().__init__()
            self.moves = moves

        def forward(self, pixel_values: Tensor) -> Tensor:
            if self.moves:
                return pixel_values
            return torch.sin(torch.arange(32.0) / 4).expand(len(pixel_values), 1, 32, 32)

    y, x = np.mgrid[0:32, 0:32] / 32
    waves = [128 + 100 * np.sin(6 * (x * np.cos(angle) + y * np.sin(angle)) + angle) for angle in range(6)]
    images = [np.repeat(wave[..., None], 3, 2).astype(np.uint8) for wave in waves]
    data = EvaluationData(*(ImageSet(images, progress=False) for _ in range(2)))
    evaluator = build_evaluator("lie_derivative", data)
    found = {}
    for moves in (True, False):
        encoder = FrozenEncoder(Smooth(moves), image_size=32)
        evaluator.check(encoder)
        found[moves] = {record.task: record.value for record in evaluator(encoder)}
    assert set(found[True]) == {"rotation", "translation", "scale"}
    assert max(found[True].values()) < 0.1, found
    assert found[False] == pytest.approx(dict.fromkeys(found[False], 1), abs=1e-5), found
    assert not evaluator.metrics[0].higher_is_better


@pytest.mark.parametrize("name", ["equivariance", "equivariance_by_block", "lie_derivative"])
def test_an_encoder_without_a_map_is_refused_with_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=r"raw_pixels gives .* no map of features"):
        build_evaluator(name, noise_data(4)).check(open_frozen("raw_pixels", image_size=16, device="cpu"))
