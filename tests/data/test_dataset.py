"""Views of sample i in epoch e depend on (seed, e, i) alone, whoever loads them; bad files are replaced and counted."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.data_loader import DataLoaderShard, prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from hf_equissl.data import (
    EpochSampler,
    ImageDecodeError,
    ImageViewDataset,
    SkippedImage,
    SkippedImages,
    StreamingViewDataset,
    TooManyBadImages,
    load_images,
)
from hf_equissl.views.collator import collate_views
from hf_equissl.views.needs import Needs
from hf_equissl.views.pipelines import ViewPipeline, build_pipeline

from .image_files import write_folder, write_tar

COUNT = 24
KEYS = ("global_crops", "crop_boxes", "draws")


@pytest.fixture
def pipeline() -> ViewPipeline:
    return build_pipeline(
        "vicreg", image_size=16, transformation=None, needs=Needs(), image_mean=(0.5,) * 3, image_std=(0.5,) * 3
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "images", [f"{number:02d}.jpg" for number in range(COUNT)])


@pytest.fixture
def dataset(folder: Path, pipeline: ViewPipeline) -> ImageViewDataset:
    return ImageViewDataset(load_images(folder), pipeline, seed=3)


def loader(dataset: ImageViewDataset, epoch: int = 0, batch_size: int = 5, **options: Any) -> DataLoader:
    sampler = dataset.sampler()
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate_views, **options)


def joined(batches: Any) -> dict[str, torch.Tensor]:
    batches = list(batches)
    return {key: torch.cat([batch[key] for batch in batches]) for key in (*KEYS, "index")}


def by_index(batches: Any) -> dict[int, tuple[torch.Tensor, ...]]:
    """Index -> its views, for comparisons that ignore the order; no index twice."""
    samples: dict[int, tuple[torch.Tensor, ...]] = {}
    for batch in batches:
        for row, index in enumerate(batch["index"].tolist()):
            assert index not in samples
            samples[index] = tuple(batch[key][row] for key in KEYS)
    return samples


def same(first: dict[int, tuple[torch.Tensor, ...]], second: dict[int, tuple[torch.Tensor, ...]]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True)
    )


@pytest.mark.parametrize(("workers", "context"), [(1, "fork"), (2, "fork"), (1, "spawn")])
def test_worker_count_changes_nothing(dataset: ImageViewDataset, workers: int, context: str) -> None:
    expected = joined(loader(dataset, epoch=2))
    loaded = joined(loader(dataset, epoch=2, num_workers=workers, multiprocessing_context=context))
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key


def test_epochs_and_batch_size(dataset: ImageViewDataset) -> None:
    first, again, later = (joined(loader(dataset, epoch)) for epoch in (0, 0, 1))
    for key, value in first.items():
        assert torch.equal(again[key], value)
        assert not torch.equal(later[key], value)
    assert sorted(first["index"].tolist()) == sorted(later["index"].tolist()) == list(range(COUNT))
    larger = joined(loader(dataset, batch_size=7))
    assert torch.equal(larger["index"], first["index"])
    assert torch.equal(larger["global_crops"], first["global_crops"])
    # The same image in another epoch looks different; another seed, too.
    other = ImageViewDataset(dataset.source, dataset.pipeline, seed=4)
    assert not torch.equal(dataset[0, 5]["draws"], dataset[1, 5]["draws"])
    assert not torch.equal(dataset[0, 5]["draws"], other[0, 5]["draws"])


def test_sample_and_batch_layout(folder: Path, pipeline: ViewPipeline) -> None:
    write_folder(folder.parent / "classes", ["a/0.jpg", "b/1.jpg", "b/2.jpg"])
    labelled = ImageViewDataset(load_images(folder.parent / "classes"), pipeline, seed=0)
    batch = collate_views([labelled[0, index] for index in (2, 0)])
    assert batch["global_crops"].shape == (2, 2, 3, 16, 16)
    assert batch["global_crops"].dtype == torch.uint8
    assert batch["crop_boxes"].shape == (2, 2, 4)
    assert batch["draws"].shape == (2, pipeline.num_draws)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["index"].tolist() == [2, 0]
    assert batch["skipped"] == []
    assert "labels" not in collate_views([ImageViewDataset(load_images(folder), pipeline, 0)[0, 1]])
    with pytest.raises(TypeError, match=r"expected|Expected \(epoch, index\)"):
        labelled[3]


def test_pickles(dataset: ImageViewDataset) -> None:
    dataset.pipeline(collate_views([dataset[0, 0]]))
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[1, 2]["global_crops"], dataset[1, 2]["global_crops"])


def test_sampler() -> None:
    sampler = EpochSampler(50, seed=1)
    first = list(sampler)
    assert len(sampler) == len(first) == 50
    assert sorted(first) == [(0, index) for index in range(50)] != first
    sampler.set_epoch(3)
    assert [epoch for epoch, _ in sampler] == [3] * 50
    assert [index for _, index in sampler] != [index for _, index in first]
    assert list(EpochSampler(3, seed=1, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_within_an_epoch(dataset: ImageViewDataset, ranks: int) -> None:
    """What accelerate does to a loader, on each rank, with and without batches to skip."""

    def prepared(rank: int) -> DataLoaderShard:
        return prepare_data_loader(
            loader(dataset, batch_size=4), num_processes=ranks, process_index=rank, put_on_device=False
        )

    for rank in range(ranks):
        whole = prepared(rank)
        whole.set_epoch(2)
        expected = [batch["index"].tolist() for batch in whole]
        resumed = skip_first_batches(prepared(rank), 1)
        resumed.set_epoch(2)
        assert [batch["index"].tolist() for batch in resumed] == expected[1:]
        assert {epoch for epoch, _ in dataset._samplers[-1]} == {2}


def test_bad_files_are_replaced(folder: Path, pipeline: ViewPipeline) -> None:
    (folder / "03.jpg").write_text("text")
    (folder / "04.jpg").write_bytes(b"")
    (folder / "05.jpg").write_bytes((folder / "06.jpg").read_bytes()[:400])
    dataset = ImageViewDataset(load_images(folder), pipeline, seed=0)
    sample, again = dataset[7, 3], dataset[7, 3]
    assert sample["index"] == again["index"] not in (3, 4, 5)
    assert torch.equal(sample["global_crops"], again["global_crops"])
    assert Path(sample["skipped"][0].name) == folder / "03.jpg"
    assert sample["skipped"][0].reason == "not an image that Pillow reads"
    # The slot keeps its draws: nothing else in the epoch changes, and the substitute is not shown twice alike.
    whole = joined(loader(dataset))
    assert len(whole["draws"].unique(dim=0)) == COUNT
    batches = list(loader(dataset, num_workers=2))
    names = {Path(record.name).name for batch in batches for record in batch["skipped"]}
    assert names == {"03.jpg", "04.jpg", "05.jpg"}
    assert torch.equal(joined(batches)["index"], whole["index"])


def test_nothing_decodes(tmp_path: Path, pipeline: ViewPipeline) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_text("text")
    with pytest.raises(ImageDecodeError, match=r"20 images in a row did not decode.*\.jpg.*Check"):
        ImageViewDataset(load_images(folder), pipeline, seed=0)[0, 0]
    with pytest.raises(ImageDecodeError, match="3 images in a row"):
        next(iter(StreamingViewDataset(load_images(folder, streaming=True), pipeline, seed=0)))


def test_skipped_images(caplog: pytest.LogCaptureFixture) -> None:
    def bad(*numbers: int) -> list[SkippedImage]:
        return [SkippedImage(f"{number}.jpg", "truncated") for number in numbers]

    health = SkippedImages(max_share=0.1, min_bad=3, num_images=1000)
    with caplog.at_level(logging.WARNING):
        health.update(bad(1, 2), seen=8)
        health.update(bad(1), seen=8)
    assert health.count == 2
    assert [record.getMessage() for record in caplog.records] == [f"Skipped {n}.jpg: truncated" for n in (1, 2)]
    with pytest.raises(
        TooManyBadImages,
        match=r"(?s)3 of 22 images.*13.6%.*10.0% are allowed.*1\.jpg: trunc.*3\.jpg.*raise max_bad_share",
    ):
        health.update(bad(3), seen=2)
    many = SkippedImages(max_share=0.1, min_bad=3)
    many.update(bad(1, 2, 3), seen=30)  # Enough good ones.
    with pytest.raises(TooManyBadImages, match="1 of 2 images"):
        SkippedImages(max_share=0.0).update(bad(1), seen=1)
    small = SkippedImages(max_share=0.2, num_images=6)
    small.update(bad(1, 2), seen=2)
    with pytest.raises(TooManyBadImages, match="2 of 6"):
        small.update(bad(1, 2), seen=12)  # All images were seen: two of six stay two of six.
    SkippedImages(max_share=1.0).update(bad(*range(50)), seen=0)
    with pytest.raises(ValueError, match="max_share is 2"):
        SkippedImages(max_share=2)


# ---- streams ----


def make_shards(folder: Path) -> Path:
    folder.mkdir()
    for shard in range(4):
        write_tar(folder / f"{shard}.tar", range(6 * shard, 6 * shard + 6))
    return folder


def make_parquet(folder: Path) -> Path:
    images = folder.parent / "for_parquet"
    write_folder(images, [f"{number:02d}.jpg" for number in range(COUNT)])
    rows = [{"image": {"bytes": path.read_bytes(), "path": None}} for path in sorted(images.iterdir())]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    folder.mkdir()
    for shard in range(3):
        table.shard(3, shard).to_parquet(folder / f"{shard}.parquet")
    return folder


def stream(dataset: StreamingViewDataset, **options: Any) -> Iterator[dict[str, Any]]:
    return iter(DataLoader(dataset, 5, collate_fn=collate_views, **options))


@pytest.mark.parametrize("make", [make_shards, make_parquet])
def test_stream_is_split_without_duplicates(make, tmp_path: Path, pipeline: ViewPipeline) -> None:
    source = load_images(make(tmp_path / "set"), streaming=True)

    def one_pass(rank: int = 0, world_size: int = 1, workers: int = 0) -> dict[int, tuple[torch.Tensor, ...]]:
        dataset = StreamingViewDataset(source, pipeline, 0, rank=rank, world_size=world_size, repeat=False)
        dataset.set_epoch(1)
        return by_index(stream(dataset, num_workers=workers))

    expected = one_pass()
    assert len(expected) == COUNT
    assert same(one_pass(workers=2), expected)
    shares = [one_pass(rank, 2, workers=rank) for rank in range(2)]
    assert not shares[0].keys() & shares[1].keys()
    assert same(shares[0] | shares[1], expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_stream_repeats_and_shuffles(tmp_path: Path, pipeline: ViewPipeline) -> None:
    source = load_images(make_shards(tmp_path / "set"), streaming=True)
    samples = iter(StreamingViewDataset(source, pipeline, seed=0))
    first, second = ([next(samples) for _ in range(COUNT)] for _ in range(2))
    order = [[sample["index"] for sample in epoch] for epoch in (first, second)]
    assert order[0] != order[1]
    assert sorted(order[0]) == sorted(order[1])
    one, other = (next(sample for sample in epoch if sample["index"] == order[0][0]) for epoch in (first, second))
    assert not torch.equal(one["draws"], other["draws"])
    # The second pass is epoch 1, as if it had been asked for; also by workers that were there before.
    dataset = StreamingViewDataset(source, pipeline, seed=0, repeat=False)
    persistent = DataLoader(dataset, COUNT, collate_fn=collate_views, num_workers=1, persistent_workers=True)
    assert next(iter(persistent))["index"].tolist() == order[0]
    dataset.set_epoch(1)
    assert next(iter(persistent))["index"].tolist() == order[1]
    # More workers than shards, and a reading in order.
    in_order = StreamingViewDataset(source, pipeline, seed=0, shuffle_buffer=0, repeat=False)
    assert len(by_index(stream(in_order, num_workers=5))) == COUNT
    assert [sample["label"] for sample in in_order] == [number % 3 for number in range(COUNT)]


def test_stream_goes_on_after_bad_files(folder: Path, pipeline: ViewPipeline) -> None:
    (folder / "03.jpg").write_text("text")
    (folder / "10.jpg").write_bytes(b"")
    dataset = StreamingViewDataset(load_images(folder, streaming=True), pipeline, seed=0, repeat=False)
    batches = list(stream(dataset))
    assert len(by_index(batches)) == COUNT - 2
    assert {Path(record.name).name for batch in batches for record in batch["skipped"]} == {"03.jpg", "10.jpg"}


def test_wrong_kind_of_source(folder: Path, pipeline: ViewPipeline) -> None:
    with pytest.raises(ValueError, match="Use StreamingViewDataset"):
        ImageViewDataset(load_images(folder, streaming=True), pipeline, 0)
    with pytest.raises(ValueError, match="Use ImageViewDataset"):
        StreamingViewDataset(load_images(folder), pipeline, 0)
    with pytest.raises(ValueError, match="rank is 2"):
        StreamingViewDataset(load_images(folder, streaming=True), pipeline, 0, rank=2, world_size=2)
    with pytest.raises(TypeError, match="has no length"):
        len(load_images(folder, streaming=True))
