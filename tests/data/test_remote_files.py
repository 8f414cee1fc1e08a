"""Files behind addresses: numbered ones, connections that break, and images whose addresses fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from hf_equissl.data import ImageDecodeError, ImageSourceError, load_images, shards
from hf_equissl.data.shards import Shard, list_shards

from .file_server import FileServer, serving
from .image_files import encode, picture, write_folder, write_tar

COUNT = 40


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Of ``tmp_path``. Nobody waits before asking again."""
    for name in ("READ_RETRY_INTERVAL", "OPEN_RETRY_INTERVAL"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}", 0.001)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
    monkeypatch.setattr(shards, "_PAUSE", 0.001)
    with serving(tmp_path) as server:
        yield server


def contents(shard: Shard, first: int = 0) -> list[bytes]:
    return [shard.source.content(row) for row in shard.rows(first)]


def test_a_broken_connection_is_opened_again_behind_the_last_row(server: FileServer, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", range(COUNT))
    [shard] = list_shards(load_images(f"{server.address}/0.tar?signed=yes", streaming=True), 1)
    whole = contents(shard)
    assert whole == [encode(picture(number)) for number in range(COUNT)]
    for first in (0, 7, COUNT - 1):
        before = server.answers["0.tar"]
        server.breaks["0.tar"] = 3
        assert contents(shard, first) == whole[first:]
        assert server.answers["0.tar"] == before + 4


def test_a_host_that_always_hangs_up_ends_the_run(server: FileServer, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", range(COUNT))
    [shard] = list_shards(load_images(f"{server.address}/0.tar", streaming=True), 1)
    before = server.answers["0.tar"]
    server.breaks["0.tar"] = 100
    with pytest.raises(ImageSourceError, match=r"0\.tar cannot be read: ConnectionError"):
        contents(shard)
    assert server.answers["0.tar"] == before + 1 + shards._REOPENINGS


def test_a_missing_file_is_not_asked_for_again(server: FileServer, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", range(2))
    [shard] = list_shards(load_images(f"{server.address}/0.tar", streaming=True), 1)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(ImageSourceError, match=r"0\.tar cannot be read: FileNotFoundError"):
        contents(shard)


def test_an_address_whose_answer_breaks_off_is_one_bad_image(server: FileServer, tmp_path: Path) -> None:
    write_folder(tmp_path, ["0.jpg", "1.jpg"])
    addresses = [f"{server.address}/{name}.jpg" for name in ("0", "1", "missing")]
    datasets.Dataset.from_dict({"image": addresses}).to_parquet(tmp_path / "rows.parquet")
    source = load_images(tmp_path / "rows.parquet", streaming=True)
    rows = list(source.dataset)
    assert source.content(rows[0]) == encode(picture(0))
    server.breaks["1.jpg"] = 1
    for row in rows[1:]:
        with pytest.raises(ImageDecodeError):
            source.content(row)


def test_numbered_files(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number in (8, 9, 10, 11):
        write_tar(tmp_path / f"a-{number:03d}.tar", range(number, number + 1))
    for place in (str(tmp_path), server.address):
        source = load_images(place + "/a-{008..010}.tar", streaming=True)
        assert source.files == tuple(f"{place}/a-{number:03d}.tar" for number in (8, 9, 10))
        found = [source.content(row) for row in source.dataset]
        assert found == [encode(picture(number)) for number in (8, 9, 10)]
    assert len(load_images(tmp_path / "a-0{1..1}{0..1}.tar")) == 2
    with pytest.raises(ImageSourceError, match=r"a-012\.tar: no file matches"):
        load_images(tmp_path / "a-{010..012}.tar")
    with pytest.raises(ImageSourceError, match=r"\{3\.\.1\} is empty"):
        load_images(tmp_path / "a-{3..1}.tar")
