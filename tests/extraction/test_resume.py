"""Interruptions, several processes, and what may not go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hf_equissl import EquiSSLModel, save_encoder
from hf_equissl.extraction.cli import main
from tests.distributed import launching
from tests.processes import start, wait_until

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "training/extract_features.py"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "data").iterdir()}


def test_killed_then_on_two_processes_gives_the_same_files(
    pictures: Path, tmp_path: Path, command: Callable[..., list[str]]
) -> None:
    """Killed with -9 on one process, continued on two by accelerate: the bytes are those of an undisturbed process."""
    photos, output, alone = tmp_path / "photos", tmp_path / "output", tmp_path / "alone"
    for number in range(8):  # enough that the first shard is not the last moment
        shutil.copytree(pictures, photos / str(number), ignore=shutil.ignore_patterns("*.txt"))
    small = ["--shard_size", "16", "--batch_size", "2"]
    words = [SCRIPT, *command(output, *small, data=photos)]
    process = start([sys.executable, *words], log=tmp_path / "log")
    wait_until(lambda: process.poll() is not None or list((output / "data").glob("train-*")), 300.0)
    assert process.poll() is None, (tmp_path / "log").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {name: data for name, data in content(output).items() if name.startswith("train-")}
    shards = -(-8 * 41 // 16)
    assert 0 < len(kept) < shards
    stamps = {name: (output / "data" / name).stat().st_mtime_ns for name in kept}

    done = launching.run("ddp", *words[1:], script=ROOT / SCRIPT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"images/s \([\d.]+ \+ [\d.]+\)", done.stdout), done.stdout
    assert main(command(alone, *small, data=photos)) == 0
    assert content(output) == content(alone)  # no leftovers of the killed process either
    assert {name: (output / "data" / name).stat().st_mtime_ns for name in kept} == stamps
    record = json.loads((output / "extraction.json").read_text())["splits"]["train"]
    assert record["runs"][0]["processes"] == 2
    assert len(record["runs"][0]["images_per_second_of_processes"]) == 2
    assert record["rows"] == 8 * 40
    assert len(record["skipped"]) == 8


def test_a_finished_extraction_is_left_as_it_is(
    copy: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before, record = content(copy), json.loads((copy / "extraction.json").read_text())
    extract(copy)
    assert "nothing was left to do" in capsys.readouterr().out
    assert content(copy) == before
    assert (
        json.loads((copy / "extraction.json").read_text())["splits"]["train"]["runs"]
        == record["splits"]["train"]["runs"]
    )


@pytest.mark.parametrize("batch", ["5", "1", "7", "64"])
def test_a_missing_shard_is_made_again_whatever_the_batch(batch: str, copy: Path, extract: Callable[..., Path]) -> None:
    """The same batches: the same bytes. Others: the same rows, up to the order in which matrix products add up."""
    before = content(copy)
    missing = copy / "data" / "train-00002-of-00004.parquet"
    wanted = pq.read_table(missing)
    missing.unlink()
    (copy / "data" / ".train-00002-of-00004.parquet.elsewhere.123.tmp").write_bytes(b"left behind")
    extract(copy, "--num_workers", "1", "--batch_size", batch)
    after = content(copy)
    if batch == "5":
        assert after == before
    found = pq.read_table(missing)
    assert found.schema.equals(wanted.schema, check_metadata=True)
    assert found.select(["index", "name", "label"]).equals(wanted.select(["index", "name", "label"]))
    for name in ("cls", "patches"):
        np.testing.assert_allclose(found[name].to_pylist(), wanted[name].to_pylist(), rtol=0, atol=1e-5)
    del before[missing.name], after[missing.name]
    assert after == before
    assert len(json.loads((copy / "extraction.json").read_text())["splits"]["train"]["runs"]) == 2


def test_another_encoder_other_data_or_options_are_refused(
    copy: Path,
    encoders: Path,
    pictures: Path,
    tmp_path: Path,
    extract: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = content(copy)

    def refused(*more: str, **options: object) -> str:
        extract(copy, *more, code=2, **options)
        assert content(copy) == before
        return capsys.readouterr().err

    assert "dtype = 'float32', and this command says 'float16'" in refused("--dtype", "float16")
    assert "shard_size = 12, and this command says 8" in refused("--shard_size", "8")
    assert "features.patches = [16], and this command says None" in refused("--features", "cls")
    assert "precision = 'fp32'" in refused("--precision", "bf16")
    assert "encoder_class = 'EquiSSLModel'" in refused(encoder="vit")
    assert "limit = None, and this command says 7" in refused("--limit", "7")
    encoder = EquiSSLModel.from_pretrained(encoders / "ours")
    with torch.no_grad():
        next(encoder.parameters()).add_(1.0)
    save_encoder(encoder, tmp_path / "trained", image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    assert "encoder_digest = " in refused("--encoder", str(tmp_path / "trained"))
    swapped = Path(shutil.copytree(pictures, tmp_path / "swapped"))
    shutil.copy(swapped / "apple" / "00.png", swapped / "cat" / "02.png")
    assert "data_digest = " in refused(data=swapped)
    moved = Path(shutil.copytree(pictures, tmp_path / "moved"))  # the same images at another place go on
    extract(copy, data=moved)
    assert content(copy) == before


def test_files_of_others_are_not_touched(
    copy: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shard = copy / "data" / "train-00001-of-00004.parquet"
    shard.write_bytes(shard.read_bytes()[:-30])
    extract(copy, code=2)
    assert "train-00001-of-00004.parquet cannot be read" in (message := capsys.readouterr().err)
    assert "it is damaged. Delete it" in message
    (copy / "extraction.json").unlink()
    shard.unlink()
    extract(copy, "--dtype", "float16", code=2)
    assert "is of another extraction" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "extraction.json", "data"])
def test_what_somebody_else_wrote_is_neither_overwritten_nor_followed(
    tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("# My project\n")
    if name == "README.md":
        extract(tmp_path / "theirs", code=2)
        assert "README.md was not written by this command" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["README.md"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "theirs" / ("" if name == "data" else name))
    extract(tmp_path / "out", code=2)
    assert f"{name} is a link" in capsys.readouterr().err
    assert (tmp_path / "theirs" / "README.md").read_text() == "# My project\n"
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["README.md"]


def test_too_many_bad_images_stop_it_and_nothing_is_lost(
    whole: Path, tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = extract(tmp_path / "out", "--max_bad_share", "0", code=1)
    assert "broken.png" in (message := capsys.readouterr().err)
    assert "1 of 41 images" in message
    assert "raise --max_bad_share" in message
    stamps = {file.name: file.stat().st_mtime_ns for file in (folder / "data").iterdir()}
    assert stamps  # what was whole by then
    assert not any(name.startswith(".") for name in stamps)
    extract(folder)
    assert content(folder) == content(whole)
    assert stamps.items() <= {file.name: file.stat().st_mtime_ns for file in (folder / "data").iterdir()}.items()


def test_a_stream_goes_on_when_a_broken_shard_is_mended(
    tars: Path, tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(tars, tmp_path / "tars"))
    whole = (data / "part-3.tar").read_bytes()
    (data / "part-3.tar").write_bytes(whole[: len(whole) // 2 + 100])
    folder = extract(tmp_path / "out", "--streaming", "--num_workers", "1", code=1, data=data)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: \S+part-3.tar cannot be read: ", message)
    assert set(content(folder)) == {f"train-{shard:05d}-of-00005.parquet" for shard in range(3)}
    (data / "part-3.tar").write_bytes(whole)
    extract(folder, "--streaming", data=data)
    assert content(folder) == content(extract(tmp_path / "alone", "--streaming", data=tars))


def test_a_further_split_has_the_numbers_of_the_classes_before_it(
    copy: Path, pictures: Path, tmp_path: Path, extract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bear", "cat"):
        shutil.copytree(pictures / name, tmp_path / "set" / "test" / name, ignore=shutil.ignore_patterns("broken*"))
    extract(copy, "--split", "test", data=tmp_path / "set")
    shards = (copy / "data").glob("test-*.parquet")
    assert {label for shard in shards for label in pq.read_table(shard)["label"].to_pylist()} == {1, 2}
    (tmp_path / "set" / "test" / "bear").rename(tmp_path / "set" / "test" / "bee")
    extract(copy, "--split", "test", data=tmp_path / "set", code=2)
    assert re.search("1 class that split train in .* does not have: 'bee'", capsys.readouterr().err)
