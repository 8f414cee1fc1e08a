"""Block masks: their statistics against a slow reference, what they depend on, and what is refused."""

from __future__ import annotations

import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import skip_first_batches
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from hf_equissl.data import ImageViewDataset, load_images
from hf_equissl.views.base import Item, Views
from hf_equissl.views.collator import ViewCollator, collate_views
from hf_equissl.views.masks import MaskSpec, draw_masks
from hf_equissl.views.needs import Needs
from hf_equissl.views.pipelines import PIPELINES, ViewPipeline, build_pipeline

SIDE = 14
N = SIDE**2
IBOT, DINOV2 = PIPELINES["ibot"].masks, PIPELINES["dinov2"].masks
MASKS = Needs(masks=True, local_crops=True)


def make(name: str = "ibot", needs: Needs = MASKS, **overrides: Any) -> ViewPipeline:
    settings: dict[str, Any] = {"image_size": 32, "patch_size": 4, "local": {"count": 2, "size": 16}, **overrides}
    return build_pipeline(
        name, transformation=None, needs=needs, image_mean=(0.5,) * 3, image_std=(0.25,) * 3, **settings
    )


def reference_mask(target: float, smallest: int) -> np.ndarray:
    """One mask as the papers' text has it, cell by cell."""
    masked: set[tuple[int, int]] = set()
    while len(masked) < target:
        before = len(masked)
        for _ in range(10):
            area = random.uniform(smallest, target - len(masked))
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height >= SIDE or width >= SIDE:
                continue
            top, left = random.randint(0, SIDE - height), random.randint(0, SIDE - width)
            block = {(top + row, left + column) for row in range(height) for column in range(width)}
            if 0 < len(block - masked) <= target - len(masked):
                masked |= block
                break
        if len(masked) == before:
            break
    cells = np.zeros((SIDE, SIDE), dtype=bool)
    for cell in masked:
        cells[cell] = True
    return cells


def neighbours(masks: np.ndarray) -> float:
    """Masked neighbours (of four) of a masked patch, on average."""
    masks = masks.reshape(-1, SIDE, SIDE)
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    return float(2 * pairs / masks.sum())


@pytest.fixture(scope="module")
def ibot_masks() -> np.ndarray:
    """10,000 draws (10000, N)."""
    return draw_masks(IBOT, range(5000), 2, SIDE).reshape(-1, N)


# ---- statistics: one ratio per view ----


def test_half_of_the_views_are_masked(ibot_masks: np.ndarray) -> None:
    masked = ibot_masks.any(axis=1)
    assert masked.mean() == pytest.approx(0.5, abs=0.02)
    pairs = masked.reshape(-1, 2)
    assert pairs.all(axis=1).mean() == pytest.approx(0.25, abs=0.02)  # the views of an image draw on their own
    assert not (ibot_masks[0::2] == ibot_masks[1::2]).all(axis=1)[pairs.any(axis=1)].any()


def test_ratios_are_uniform(ibot_masks: np.ndarray) -> None:
    shares = ibot_masks.mean(axis=1)
    shares = np.sort(shares[shares > 0])
    assert shares.max() <= 0.5
    # Masks fall a little short of the ratios, which are uniform from 0.1 to 0.5.
    quantiles = np.quantile(shares, [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(quantiles, [0.12, 0.2, 0.3, 0.4, 0.48], atol=0.02)


@pytest.mark.parametrize("kind", ["per_view", "stratified"])
@pytest.mark.parametrize("side", [4, 8, 14])
@pytest.mark.parametrize("ratio", [0.1, 0.23, 0.5])
def test_never_above_the_target(kind: str, side: int, ratio: float) -> None:
    spec = MaskSpec(kind=kind, probability=1.0, ratio=(ratio, ratio))
    counts = draw_masks(spec, range(100), 2, side).sum(axis=2)
    target = math.floor(ratio * side**2)
    assert counts.max() == target
    assert counts.min() > 0
    assert counts.mean() > 0.9 * target


@pytest.mark.parametrize("spec", [IBOT, DINOV2], ids=["ibot", "dinov2"])
def test_blocks_are_those_of_the_reference(spec: MaskSpec) -> None:
    random.seed(0)
    ratios = np.linspace(*spec.ratio, 2000)
    reference = np.stack([reference_mask(ratio * N, 16 if spec is IBOT else 4) for ratio in ratios])
    count = 4000
    masks = draw_masks(spec, range(count), 2, SIDE).reshape(-1, N)
    masks = masks[masks.any(axis=1)]
    assert masks.mean() == pytest.approx(reference.mean(), abs=0.01)
    assert neighbours(masks) == pytest.approx(neighbours(reference), abs=0.03)
    # How often each place is masked: 2,000 draws say it to 0.01.
    often, expected = masks.reshape(-1, SIDE, SIDE).mean(axis=0), reference.mean(axis=0)
    assert np.abs(often - expected).max() < 0.05
    assert np.corrcoef(often.ravel(), expected.ravel())[0, 1] > 0.95


def test_every_place_is_masked_and_no_side_preferred(ibot_masks: np.ndarray) -> None:
    often = ibot_masks[ibot_masks.any(axis=1)].reshape(-1, SIDE, SIDE).mean(axis=0)
    for turns in (1, 2, 3):
        np.testing.assert_allclose(often, np.rot90(often, turns), atol=0.045)
    # Blocks lie within the grid and cover its corners least and its middle most (as the reference above does).
    corners = often[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert 0.02 < corners.min() == often.min()
    assert often.max() < 0.58
    assert often.max() == often[5:9, 5:9].max()


def test_masks_are_blocks(ibot_masks: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    scattered = rng.permuted(ibot_masks, axis=1)
    assert neighbours(scattered) < 1.5
    assert neighbours(ibot_masks) > 3.0


# ---- statistics: stratified ----


def test_stratified_masks() -> None:
    size, low, high = 32, *DINOV2.ratio
    batches = [draw_masks(DINOV2, range(first, first + size), 2, SIDE) for first in range(0, 157 * size, size)]
    counts = np.stack([batch.reshape(-1, N).sum(axis=1) for batch in batches])  # (157, 64): 10,048 crops
    assert ((counts > 0).sum(axis=1) == size).all()
    # One ratio in each of 32 bins. A mask may fall short of its ratio, which can only lower the sorted counts.
    edges = np.linspace(low, high, size + 1)
    ordered = np.sort(counts, axis=1)[:, size:]
    assert (ordered <= np.floor(edges[1:] * N)).all()
    assert (ordered >= np.floor(edges[:-1] * N)).mean() > 0.9
    assert counts.max() <= N // 2
    # Shuffled: crops of both views, at every place in the batch, are masked alike.
    assert np.abs((counts > 0).mean(axis=0) - 0.5).max() < 0.17  # four standard deviations of 157 draws
    assert (counts[:, 0::2] > 0).mean() == pytest.approx(0.5, abs=0.02)
    assert np.corrcoef(np.arange(2 * size), counts.mean(axis=0))[0, 1] < 0.5


@pytest.mark.parametrize(("batch", "views", "probability", "masked"), [(3, 2, 0.5, 3), (3, 1, 0.5, 1), (4, 2, 0, 0)])
def test_stratified_counts(batch: int, views: int, probability: float, masked: int) -> None:
    spec = MaskSpec(kind="stratified", probability=probability)
    assert draw_masks(spec, range(batch), views, 8).any(axis=2).sum() == masked


def test_smallest_area_follows_the_grid() -> None:
    assert [IBOT.smallest_area(side) for side in (2, 4, 8, 14, 24)] == [1, 1, 4, 16, 64]
    assert [DINOV2.smallest_area(side) for side in (2, 4, 8, 14, 24)] == [1, 1, 4, 4, 4]
    assert (DINOV2.min_patches, IBOT.min_patches) == (4, None)


# ---- in batches ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    return tmp_path


def loader(folder: Path, pipeline: ViewPipeline, epoch: int = 0, size: int = 4, **options: Any) -> DataLoader:
    dataset = ImageViewDataset(load_images(folder), pipeline, seed=3)
    sampler = dataset.sampler()
    sampler.set_epoch(epoch)
    return DataLoader(dataset, size, sampler=sampler, collate_fn=ViewCollator(pipeline), **options)


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_workers_and_resume_change_nothing(folder: Path, name: str) -> None:
    pipeline = make(name)
    expected = list(loader(folder, pipeline, epoch=2))
    for workers in (1, 2):
        for left, right in zip(loader(folder, pipeline, epoch=2, num_workers=workers), expected, strict=True):
            for key in ("masks", "mask_indices", "index"):
                assert torch.equal(left[key], right[key]), (key, workers)
    resumed = list(skip_first_batches(loader(folder, pipeline, epoch=2), 2))
    assert [batch["mask_indices"].tolist() for batch in resumed] == [
        batch["mask_indices"].tolist() for batch in expected[2:]
    ]
    other = next(iter(loader(folder, pipeline, epoch=3)))
    assert not torch.equal(other["masks"], expected[0]["masks"])


def test_masks_per_view_belong_to_the_sample(folder: Path) -> None:
    pipeline = make("ibot")

    def by_image(size: int) -> dict[int, torch.Tensor]:
        batches = loader(folder, pipeline, size=size)
        return {
            index: masks
            for batch in batches
            for index, masks in zip(batch["index"].tolist(), batch["masks"], strict=True)
        }

    small, large = by_image(3), by_image(7)
    assert len(small) == len(large) == 20
    assert all(torch.equal(masks, large[index]) for index, masks in small.items())
    assert len({tuple(masks.flatten().tolist()) for masks in small.values()}) > 10


def test_stratified_masks_belong_to_the_batch(folder: Path) -> None:
    pipeline = make("dinov2")
    samples = [{**sample_of(pipeline, number), "index": number} for number in range(4)]
    masks = ViewCollator(pipeline)(samples)["masks"]
    assert torch.equal(ViewCollator(pipeline)(samples[:1] + samples[3:0:-1])["masks"], masks)  # the same first sample
    assert not torch.equal(ViewCollator(pipeline)(samples[::-1])["masks"], masks)
    assert masks.any(dim=2).sum() == 4


def sample_of(pipeline: ViewPipeline, number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    pixels = np.random.default_rng(1000 + number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    return {**pipeline.crop(Item((Image.fromarray(pixels),)), rng), "index": number}


def views_of(pipeline: ViewPipeline, size: int = 8) -> Views:
    return pipeline(ViewCollator(pipeline)([sample_of(pipeline, number) for number in range(size)]))


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
@pytest.mark.parametrize("patch_size", [4, 8])
def test_views_carry_masks_and_their_positions(name: str, patch_size: int) -> None:
    views = views_of(make(name, patch_size=patch_size))
    patches = (32 // patch_size) ** 2
    assert views.masks.shape == (2, 8, patches)
    assert views.masks.dtype == torch.bool
    assert views.mask_indices.dtype == torch.int64
    assert 0 < len(views.mask_indices) <= 0.5 * views.masks.numel()
    assert torch.equal(views.mask_indices, views.masks.flatten().nonzero().squeeze(1))
    # (V, B, N), not (B, V, N): image 3 has in both views what its seed says.
    if name == "ibot":
        seed = int(sample_of(make(name, patch_size=patch_size), 3)["mask_seed"])
        alone = draw_masks(IBOT, [seed], 2, 32 // patch_size)[0]
        assert np.array_equal(views.masks[:, 3].numpy(), alone)


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_masks_change_no_crop_and_no_colour(name: str) -> None:
    masked, plain = views_of(make(name)), views_of(make(name, Needs(local_crops=True)))
    assert plain.masks is None
    assert plain.mask_indices is None
    assert torch.equal(masked.global_crops, plain.global_crops)
    assert torch.equal(masked.local_crops, plain.local_crops)


def test_a_batch_without_masks_is_refused() -> None:
    pipeline = make()
    batch = collate_views([sample_of(pipeline, 0)])
    with pytest.raises(ValueError, match=r"no masks.*ViewCollator"):
        pipeline(batch)


def test_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_equissl.views import augmentation

    monkeypatch.setattr(augmentation, "SELECTING_IS_FREE", frozenset())
    pipeline = make()
    batch = ViewCollator(pipeline)([sample_of(pipeline, number) for number in range(4)])
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) for key, value in batch.items() if isinstance(value, torch.Tensor)}
        views = pipeline(fake)
    assert views.masks.shape == (2, 4, 64)
    assert views.local_crops.shape == (2, 4, 3, 16, 16)


def test_collator_pickles() -> None:
    pipeline = make()
    samples = [sample_of(pipeline, number) for number in range(3)]
    expected = ViewCollator(pipeline)(samples)["masks"]
    assert torch.equal(pickle.loads(pickle.dumps(ViewCollator(pipeline)))(samples)["masks"], expected)


# ---- configuration ----


def test_a_block_has_an_upper_bound() -> None:
    """Masks of half the grid: from blocks of any size, or of at most three patches, which leave ragged edges."""
    edges = {}
    for share in (None, 3 / N):
        spec = MaskSpec(probability=1, ratio=(0.5, 0.5), min_patches=1, max_share=share)
        masks = draw_masks(spec, range(50), views=1, side=SIDE).reshape(-1, SIDE, SIDE)
        assert masks.mean() > 0.4
        edges[share] = (masks[:, 1:] != masks[:, :-1]).sum() + (masks[:, :, 1:] != masks[:, :, :-1]).sum()
    assert edges[3 / N] > 2 * edges[None]
    assert DINOV2.max_share == 0.5
    assert IBOT.max_share is None


def test_overrides() -> None:
    changed = make(masks={"ratio": [0.2, 0.3], "probability": 1}).masks
    assert (changed.ratio, changed.probability, changed.kind) == ((0.2, 0.3), 1, "per_view")
    assert make("dinov2", masks={"probability": 0.25}).masks.min_patches == 4
    added = make("dino", masks={"kind": "stratified"}).masks
    assert (added.kind, added.ratio) == ("stratified", (0.1, 0.5))
    assert PIPELINES["dino"].masks is None
    assert make(needs=Needs(), masks=None).spec.masks is None
    assert make(needs=Needs(), patch_size=None).masks is None  # nobody asks: no patch size is needed


def test_describe() -> None:
    assert "masks of 0.1-0.5 of 8 x 8 patches, each view with p 0.5, blocks from 4" in make().describe()
    assert "exactly the share 0.5, ratios stratified" in make("dinov2").describe()
    assert "masks" not in make(needs=Needs()).describe()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"ration": (0.1, 0.5)}, "masks.*'ratio'"),
        ({"kind": "per_images"}, r"masks\.kind.*'per_view'"),
        ({"probability": 1.5}, r"masks\.probability"),
        ({"ratio": (0.5, 0.1)}, r"masks\.ratio"),
        ({"ratio": (0, 0.5)}, r"masks\.ratio"),
        ({"ratio": 0.3}, r"masks\.ratio"),
        ({"ratio": (0.001, 0.01)}, r"up to 0\.01 need more than 8 x 8 patches"),
        ({"min_patches": 0}, r"masks\.min_patches is 0"),
        ({"min_patches": True}, r"masks\.min_patches is True"),
        ({"aspect": 0}, r"masks\.aspect"),
        ({"max_share": 2}, r"masks\.max_share"),
        (0.5, r"masks is 0\.5.*probability"),
        (None, r"views\.pipeline\.masks: \{kind"),
    ],
)
def test_wrong_settings(masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(masks=masks)


@pytest.mark.parametrize(("patch_size", "message"), [(None, "patch_size is None"), (32, "1 x 1 patches")])
def test_wrong_patch_size(patch_size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(patch_size=patch_size)
