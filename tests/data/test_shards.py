"""Shards: which readers have pieces of them, what is read of a file, and by which names they are known again."""

from __future__ import annotations

import logging
import pickle
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_equissl.data import ImageSource, load_images, locations
from hf_equissl.data.shards import digest, divide, list_shards, read_amplification
from hf_equissl.views.pipelines import ViewPipeline

from .image_files import encode, picture, write_folder, write_tar
from .test_streaming import batches, make, parquets, pipeline, tars

__all__ = ["pipeline"]


def write_parquet(path: Path, groups: int, rows: int, kilobytes: int = 0) -> Path:
    """Images with so many bytes behind them, and a column that nobody asks for."""
    noise = np.random.default_rng(0)
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "depth": pa.binary()})
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for group in range(groups):
            images = [encode(picture(group * rows + row)) + noise.bytes(1000 * kilobytes) for row in range(rows)]
            columns = {"image": [{"bytes": image, "path": None} for image in images], "depth": [b"depth"] * rows}
            writer.write_table(pa.Table.from_pydict(columns, schema))
    return path


# ---- division ----


def test_every_row_has_one_reader_where_rows_are_fewer_than_readers() -> None:
    for shards in range(1, 8):
        for readers in range(1, 12):
            for rows in range(1, readers):
                seen: Counter[tuple[int, int]] = Counter()
                for reader in range(readers):
                    pieces = divide(range(shards), readers, reader)
                    own = [(s, row) for s, low, high in pieces for row in range(rows) if low <= row % readers < high]
                    seen.update(own)
                assert set(seen.values()) == {1}
                assert len(seen) == shards * rows


def test_read_amplification_is_what_readers_read() -> None:
    for shards in (*range(1, 14), 100, 600):
        for readers in (1, 2, 3, 4, 7, 8, 12, 64):
            pieces = sum(len(divide(range(shards), readers, reader)) for reader in range(readers))
            assert read_amplification(shards, readers) == pytest.approx(pieces / shards)
    assert read_amplification(100, 512) == pytest.approx(6.08)
    assert read_amplification(1024, 512) == 1


def test_much_reading_is_said(tmp_path: Path, pipeline: ViewPipeline) -> None:
    folder = tars(tmp_path / "tars", 4)
    stream = make(folder, pipeline, world_size=3)
    assert "4 shards for 3 processes x 2 workers: each shard is read 2.0 times" in str(stream.reading_note(2))
    assert "multiple of 6 shards, or more than 24" in str(stream.reading_note(2))
    assert make(folder, pipeline, world_size=2).reading_note(2) is None
    assert make(folder, pipeline, world_size=1).reading_note(0) is None
    images = write_folder(tmp_path / "images", ["0.png", "1.png"])
    assert make(images, pipeline, world_size=3).reading_note(2) is None  # only paths are read


# ---- reading ----


def test_row_groups_are_looked_up_once_for_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_images(parquets(tmp_path / "set", 5, 4), streaming=True)
    looked: Counter[str] = Counter()
    reshard = datasets.IterableDataset.reshard

    def counted(self: datasets.IterableDataset) -> datasets.IterableDataset:
        looked["up"] += 1
        return reshard(self)

    monkeypatch.setattr(datasets.IterableDataset, "reshard", counted)
    shards = list_shards(source, 1)
    assert looked["up"] == 5
    assert [(shard.file, shard.part, shard.parts) for shard in shards] == [
        (f, p, 3) for f in range(5) for p in range(3)
    ]
    assert [len(list(shard.rows())) for shard in shards] == [4] * 15
    assert [row["image"]["path"] for shard in shards for row in shard.rows(3)] == [f"{n}.jpg" for n in range(3, 60, 4)]
    assert looked["up"] == 5


def test_many_files_keep_their_order(tmp_path: Path) -> None:
    for files in (1, 2, 3, 7, 10):
        folder = tmp_path / str(files)
        folder.mkdir()
        for number in range(files):
            write_parquet(folder / f"{number:02d}.parquet", 1 + number % 3, 1)
        shards = list_shards(load_images(folder, streaming=True), 1)
        assert [(s.file, s.part, s.parts) for s in shards] == [
            (file, part, 1 + file % 3) for file in range(files) for part in range(1 + file % 3)
        ]
        assert [Path(shard.name.split(",")[0]).name for shard in shards] == [f"{s.file:02d}.parquet" for s in shards]


def test_what_was_read_of_a_parquet_file_is_let_go(tmp_path: Path) -> None:
    source = load_images(write_parquet(tmp_path / "0.parquet", 40, 4, kilobytes=100), streaming=True)
    [shard] = list_shards(source, 0)
    tracemalloc.start()
    try:
        held = max(tracemalloc.get_traced_memory()[0] for _ in shard.rows())
    finally:
        tracemalloc.stop()
    assert held < 4e6  # of 16e6


def test_other_columns_of_a_parquet_file_are_not_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "0.parquet", 2, 4)
    source = load_images(path, streaming=True)
    assert source.dataset.column_names == ["image"]
    content = bytearray(path.read_bytes())
    for group in range(2):
        column = pq.read_metadata(path).row_group(group).column(2)
        assert column.path_in_schema == "depth"
        begin = column.dictionary_page_offset or column.data_page_offset
        content[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    assert [source.content(row) for row in source.dataset] == [encode(picture(number)) for number in range(8)]


# ---- names ----


def known(source: ImageSource) -> str:
    return digest(list_shards(source, 1))


def test_shards_are_known_by_name_wherever_they_lie(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there" / "train"
    tars(here, 6)
    shutil.copytree(here, there)
    first = known(load_images(here, streaming=True))
    assert known(load_images(there, streaming=True)) == first
    assert known(load_images(f"{there}/0{{0..5}}.tar", streaming=True)) == first
    (there / "05.tar").rename(there / "06.tar")
    assert known(load_images(there, streaming=True)) != first
    images = write_folder(tmp_path / "images", ["a/0.png", "a/1.png"])
    first = known(load_images(images, streaming=True))
    (images / "a" / "0.png").rename(images / "a" / "2.png")
    assert known(load_images(images, streaming=True)) != first


def test_a_renamed_shard_begins_the_next_epoch(
    tmp_path: Path, pipeline: ViewPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(6):
        write_tar(folder / f"{number}.tar", range(5 * number, 5 * number + 5))
    one = make(folder, pipeline, world_size=1, repeat=False)
    for batch, _ in zip(batches(one, workers=0), range(12), strict=False):
        one.note_batch(batch["position"])
    one.save_positions(tmp_path, 0)
    (folder / "0.tar").rename(folder / "9.tar")
    resumed = make(folder, pipeline, world_size=1, repeat=False)
    with caplog.at_level(logging.WARNING):
        resumed.load_positions(tmp_path, 0)
    assert "The files differ: in names, order or number. It goes on with epoch 1" in caplog.text
    assert {batch["position"].epoch for batch in batches(resumed, workers=0)} == {1}


@pytest.mark.parametrize("count", [3, 16, 45])
def test_a_stream_of_a_list_is_cut_as_datasets_cuts_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of runs that go on follow from the shards; ``to_iterable_dataset`` copies the data set for each."""
    monkeypatch.setattr(locations, "_LIST_SHARDS", 16)
    monkeypatch.setattr(locations, "_ROWS_AT_ONCE", 2)
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict(
        {"image": [f"{n}.png" for n in range(count)], "label": [n % 2 for n in range(count)]}, features=features
    )
    rows = rows.select(range(count - 1, -1, -1))  # with an order of its own
    ours = locations._stream(rows, Path("x"), rows["image"][:]).rows
    theirs = rows.to_iterable_dataset(num_shards=min(16, count))
    assert (ours.num_shards, ours.features) == (theirs.num_shards, theirs.features)
    assert list(ours) == list(theirs)
    for number in {0, 1, ours.num_shards // 2, ours.num_shards - 1}:
        shard, other = (each.shard(each.num_shards, number) for each in (ours, theirs))
        assert list(shard.skip(1).iter(8)) == list(other.skip(1).iter(8))
    assert list(pickle.loads(pickle.dumps(ours)).select_columns(["image"])) == list(theirs.select_columns(["image"]))
