"""A stream is divided without loss, shuffled anew each epoch, and goes on where training stood."""

from __future__ import annotations

import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_equissl.data import ImageSourceError, StreamingViewDataset, load_images, throughput
from hf_equissl.data.shards import FILES_PER_RANK, divide, list_shards, shuffle
from hf_equissl.views.collator import ViewCollator
from hf_equissl.views.needs import Needs
from hf_equissl.views.pipelines import ViewPipeline, build_pipeline

from .image_files import encode, picture, write_folder, write_tar

COUNT = 60
RANKS = WORKERS = 2


@pytest.fixture(scope="module")
def pipeline() -> ViewPipeline:
    return build_pipeline(
        "vicreg", image_size=8, transformation=None, needs=Needs(), image_mean=(0.5,) * 3, image_std=(0.5,) * 3
    )


def tars(folder: Path, shards: int) -> Path:
    """WebDataset shards of unequal length."""
    folder.mkdir()
    bounds = [0, *(COUNT * (n + 1) // shards + (n % 2 if n + 1 < shards else 0) for n in range(shards))]
    for number, (begin, end) in enumerate(pairwise(bounds)):
        write_tar(folder / f"{number:02d}.tar", range(begin, end))
    return folder


def parquets(folder: Path, shards: int, row_group: int) -> Path:
    """Parquet shards, ``row_group`` rows in each of their groups."""
    folder.mkdir()
    rows = [{"image": {"bytes": encode(picture(number)), "path": f"{number}.jpg"}} for number in range(COUNT)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    for number in range(shards):
        table.shard(shards, number).to_parquet(folder / f"{number:02d}.parquet", batch_size=row_group)
    return folder


# What a stream can be -> how it is written.
SETS: dict[str, Callable[[Path], Path]] = {
    "one tar": lambda folder: tars(folder, 1),
    "tars that readers do not divide": lambda folder: tars(folder, 7),
    "one parquet file": lambda folder: parquets(folder, 1, 60),
    "one parquet file with row groups": lambda folder: parquets(folder, 1, 7),
    "parquet files": lambda folder: parquets(folder, 5, 100),
    "folder": lambda folder: write_folder(folder, [f"{number:02d}.png" for number in range(COUNT)]),
}


def make(folder: Path, pipeline: ViewPipeline, rank: int = 0, **options: Any) -> StreamingViewDataset:
    options = {"shuffle_buffer": 5, "world_size": RANKS} | options
    return StreamingViewDataset(load_images(folder, streaming=True), pipeline, 3, rank=rank, **options)


def batches(dataset: StreamingViewDataset, size: int = 1, workers: int = WORKERS) -> Iterator[dict[str, Any]]:
    return iter(DataLoader(dataset, size, collate_fn=ViewCollator(dataset.pipeline), num_workers=workers))


# ---- division and order ----


def test_every_row_has_one_reader_and_shares_are_equal() -> None:
    for shards in range(1, 12):
        for readers in range(1, 12):
            rows = 3 * readers
            seen: Counter[tuple[int, int]] = Counter()
            for reader in range(readers):
                pieces = divide(range(shards), readers, reader)
                own = [(s, row) for s, low, high in pieces for row in range(rows) if low <= row % readers < high]
                seen.update(own)
                assert len(own) == rows * shards // readers
                assert sum(piece.high - piece.low < readers for piece in pieces) <= 2
            assert set(seen.values()) == {1}
            assert len(seen) == shards * rows


@pytest.mark.parametrize("kind", SETS)
def test_every_sample_once_per_epoch(kind: str, tmp_path: Path, pipeline: ViewPipeline) -> None:
    """Two ranks, two real workers each, in a stream that does not end: told apart by the epoch in the positions."""
    folder = SETS[kind](tmp_path / "set")
    orders: list[dict[int, list[int]]] = []
    for rank in range(RANKS):
        epochs: dict[int, list[int]] = {}
        for batch in islice(batches(make(folder, pipeline, rank)), COUNT + COUNT // 2):
            epochs.setdefault(batch["position"].epoch, []).append(int(batch["index"]))
        orders.append(epochs)
    for epoch in (0, 1):
        together = [index for epochs in orders for index in epochs[epoch]]
        assert len(set(together)) == len(together) == COUNT
        assert all(abs(len(epochs[epoch]) - COUNT / RANKS) <= COUNT / 6 for epochs in orders)
    assert all(epochs[0] != epochs[1] for epochs in orders)
    assert all(set(epochs[0]) != set(epochs[1]) for epochs in orders)


def test_few_parquet_files_are_cut_at_row_groups(tmp_path: Path) -> None:
    source = load_images(SETS["one parquet file with row groups"](tmp_path / "set"), streaming=True)
    assert [(shard.part, shard.parts) for shard in list_shards(source, RANKS)] == [(part, 9) for part in range(9)]
    many = load_images(tars(tmp_path / "many", FILES_PER_RANK), streaming=True)
    assert [Path(shard.name).name for shard in list_shards(many, 1)] == [f"{n:02d}.tar" for n in range(FILES_PER_RANK)]


def test_buffer_goes_on_anywhere() -> None:
    def read(first: int) -> Iterator[int]:
        return iter(range(first, 100))

    for size in (1, 7, 100, 200):
        whole = list(shuffle(read, size, np.random.default_rng(0)))
        assert sorted(row for row, _, _ in whole) == list(range(100))
        assert ([row for row, _, _ in whole] == list(range(100))) == (size == 1)
        for at in (0, 1, 40, 91, 92, 93, 98, 99):
            _, *stood = whole[at]
            assert list(shuffle(read, size, np.random.default_rng(0), *stood)) == whole[at + 1 :], (size, at)


# ---- positions ----


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    keys = ("global_crops", "crop_boxes", "draws", "index")
    others = left["position"] == right["position"] and left["skipped"] == right["skipped"]
    return others and all(torch.equal(left[key], right[key]) for key in keys)


@pytest.mark.parametrize("kind", ["tars that readers do not divide", "one parquet file with row groups", "folder"])
def test_resumed_stream_gives_the_same_batches(kind: str, tmp_path: Path, pipeline: ViewPipeline) -> None:
    """At points in three epochs, with batches that workers had made and nobody used, and images that do not decode."""
    folder = SETS[kind](tmp_path / "set")
    if kind == "folder":
        (folder / "03.png").write_text("text")
        (folder / "40.png").write_text("text")
    whole = list(islice(batches(make(folder, pipeline, 1), size=3), 28))
    assert len({batch["position"].epoch for batch in whole}) >= 3
    assert {item.reason for batch in whole for item in batch["skipped"]} == (
        {"not an image that Pillow reads"} if kind == "folder" else set()
    )
    broken = make(folder, pipeline, 1)
    for at in (1, 2, 9, 14, 23):
        broken.load_positions(None, WORKERS)
        for batch in whole[:at]:
            broken.note_batch(batch["position"])
        checkpoint = tmp_path / f"checkpoint-{at}"
        checkpoint.mkdir()
        broken.save_positions(checkpoint, WORKERS)
        resumed = make(folder, pipeline, 1)
        resumed.load_positions(checkpoint, WORKERS)
        rest = islice(batches(resumed, size=3), 5)
        assert all(same(*pair) for pair in zip(rest, whole[at : at + 5], strict=True)), at


def test_shards_behind_are_not_opened(tmp_path: Path, pipeline: ViewPipeline) -> None:
    folder = tars(tmp_path / "set", 20)
    one = make(folder, pipeline, world_size=1, shuffle_buffer=1)
    whole = list(islice(batches(one, workers=0), COUNT))
    for batch in whole[: COUNT // 2]:
        one.note_batch(batch["position"])
    one.save_positions(tmp_path, 0)
    behind = {int(batch["index"]) for batch in whole[: COUNT // 2 - 10]}
    gone = 0
    for shard in one.shards:
        content = {int(batch["index"]) for batch in _alone(shard.name, pipeline)}
        if content <= behind:
            Path(shard.name).write_text("gone")
            gone += 1
    assert gone > 3
    resumed = make(folder, pipeline, world_size=1, shuffle_buffer=1)
    resumed.load_positions(tmp_path, 1)  # one worker stands where the process itself stood
    rest = islice(batches(resumed, workers=1), COUNT // 2)
    assert all(same(*pair) for pair in zip(rest, whole[COUNT // 2 :], strict=True))
    with pytest.raises(ImageSourceError, match=r"\d\d\.tar cannot be read: .*Check that it is complete"):
        list(islice(batches(resumed, workers=1), COUNT))


def _alone(path: str, pipeline: ViewPipeline) -> Iterator[dict[str, Any]]:
    return batches(make(Path(path), pipeline, world_size=1, repeat=False), workers=0)


def test_another_layout_begins_the_next_epoch(
    tmp_path: Path, pipeline: ViewPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    folder = SETS["parquet files"](tmp_path / "set")
    for rank in range(RANKS):
        dataset = make(folder, pipeline, rank)
        for batch in islice(batches(dataset, workers=1), 31 + rank):
            dataset.note_batch(batch["position"])
        dataset.save_positions(tmp_path, 1)
    resumed = make(folder, pipeline, world_size=1, repeat=False)
    with caplog.at_level(logging.WARNING):
        resumed.load_positions(tmp_path, 2)
    assert "read by 2 processes x 1 workers" in caplog.text
    assert "start 2 processes with --training.dataloader_num_workers 1" in caplog.text
    rest = list(batches(resumed))
    assert {batch["position"].epoch for batch in rest} == {2}  # one rank had begun epoch 1
    assert len({int(batch["index"]) for batch in rest}) == len(rest) == COUNT
    resumed.load_positions(tmp_path, 2)
    resumed.save_positions(tmp_path / "set", 2)  # before any batch came: it is still the epoch that was begun
    again = make(folder, pipeline, world_size=1, repeat=False)
    again.load_positions(tmp_path / "set", 2)
    assert {batch["position"].epoch for batch in batches(again)} == {2}
    (tmp_path / "data_position-0.json").write_text("{")
    with pytest.raises(ValueError, match=r"data_position-\*\.json cannot be read"):
        resumed.load_positions(tmp_path, 2)


# ---- faults ----


@pytest.mark.parametrize("kind", ["tars that readers do not divide", "parquet files"])
def test_a_broken_shard_is_named(kind: str, tmp_path: Path, pipeline: ViewPipeline) -> None:
    folder = SETS[kind](tmp_path / "set")
    shard = sorted(folder.iterdir())[3]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2 + 100])
    with pytest.raises(ImageSourceError, match=rf"{shard.name} cannot be read.*fetch or write it again"):
        list(batches(make(folder, pipeline, world_size=1, repeat=False), workers=1))


def test_a_tar_that_ends_between_two_members_is_named(tmp_path: Path, pipeline: ViewPipeline) -> None:
    """As an interrupted copy or a killed writer leaves it; the reader of tar files sees nothing wrong."""
    shard = write_tar(tmp_path / "0.tar", range(6))
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[6].offset
    shard.write_bytes(shard.read_bytes()[:end])
    with tarfile.open(shard) as tar:
        assert len(tar.getmembers()) == 6
    with pytest.raises(ImageSourceError, match=r"0\.tar cannot be read: .*cut off or never closed.*write it again"):
        list(batches(make(tmp_path, pipeline, world_size=1, repeat=False), workers=1))


def test_more_readers_than_rows(tmp_path: Path, pipeline: ViewPipeline) -> None:
    write_tar(tmp_path / "0.tar", range(3))
    with pytest.raises(ImageSourceError, match="There are fewer than 1 processes x 5 workers"):
        list(islice(batches(make(tmp_path, pipeline, world_size=1), workers=5), 30))


# ---- throughput ----


def test_throughput(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    measured = throughput.Throughput(torch.device("cpu"), workers=2)

    def step(wait: float, compute: float) -> None:
        with measured.waiting():
            clock[0] += wait
        measured.add(images=8, seconds=4.0)
        clock[0] += compute

    step(100.0, 1.0)  # workers start
    step(0.125, 0.875)
    expected = {"images_per_second": 8.0, "data_wait": 0.0625, "loader_images_per_second": 4.0}
    assert measured.drain() == expected
    monkeypatch.setattr(throughput.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        for warnings in (0, 0, 1, 1):
            step(1.0, 1.0)
            assert measured.drain()["data_wait"] == 0.5
            assert len(caplog.records) == warnings
    assert "Raise dataloader_num_workers (now 2 in each process" in caplog.text
