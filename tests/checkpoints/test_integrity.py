"""Checkpoints whose files are as long as they were, and are not what was written."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_equissl.checkpoints import (
    MANIFEST,
    IncompleteCheckpointError,
    Manifest,
    newest_checkpoint,
    read_checkpoint_weights,
)
from hf_equissl.checkpoints.integrity import checksums, find_damage
from hf_equissl.distributed.engines import Engine
from tests.hub.tiny_run import copy_of, run
from tests.running.test_changes import go_on

__all__ = ["run"]  # a fixture
FILES = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "shards/0.distcp")


def write(folder: Path, known: bool) -> Path:
    """A checkpoint with a file of each type; without checksums it is one of an earlier version."""
    folder.mkdir(parents=True)
    step = int(folder.name[11:])
    numbers = torch.full((64,), float(step))
    save_file({"weight": numbers}, folder / "model.safetensors")
    (folder / "shards").mkdir()
    for name in ("optimizer.pt", "rng_state.pth", "shards/0.distcp"):
        torch.save({"state": numbers}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": [{"loss": 0.25}] * 9}))
    files = {name: (folder / name).stat().st_size for name in FILES}
    sums = checksums(folder, list(FILES)) if known else {}
    Manifest(Engine.SINGLE, 1, 8, step, "full", files, sums).write(folder)
    return folder


def overwrite(path: Path, content: bytes) -> None:
    """Write as long a content at a later time: clocks of file systems are coarse, and tests are not."""
    later = path.stat().st_mtime_ns + 10**9
    assert len(content) == path.stat().st_size
    path.write_bytes(content)
    os.utime(path, ns=(later, later))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    overwrite(path, content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0, 0.4, -1])
def test_a_bit_anywhere(name: str, part: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "checkpoint-3", known=True)
    path = write(tmp_path / "checkpoint-20", known=True) / name
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    flip(path, int(part * path.stat().st_size) if part >= 0 else -1)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert f"checkpoint-20 is not complete and is passed over: {path} is not what was written" in caplog.text
    assert Manifest.read(path.parents[len(Path(name).parts) - 1]).step == 20  # what costs nothing to read


def test_weights_of_another_step(tmp_path: Path) -> None:
    old, new = (write(tmp_path / f"checkpoint-{step}", known=True) for step in (3, 20))
    overwrite(new / "model.safetensors", (old / "model.safetensors").read_bytes())
    assert newest_checkpoint(tmp_path) == str(old)
    assert torch.equal(read_checkpoint_weights(old)["weight"], torch.full((64,), 3.0))
    with pytest.raises(OSError, match=r"the weights in .*checkpoint-20 cannot be used: .*is not what was written"):
        read_checkpoint_weights(new)
    (old / "optimizer.pt").unlink()  # weights alone may still be read
    assert read_checkpoint_weights(old).keys() == {"weight"}


def test_checkpoints_without_checksums_are_complete_by_their_sizes(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-3", known=False)
    path = write(tmp_path / "checkpoint-20", known=False) / "optimizer.pt"
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    path.write_bytes(path.read_bytes()[:-1])
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_file_is_read_once(tmp_path: Path) -> None:
    """What a file's times say is unchanged is not read again; a damage that shows in them is found all the same."""
    path = write(tmp_path / "checkpoint-3", known=True) / "optimizer.pt"
    known = checksums(path.parent, ["optimizer.pt"])
    about = path.stat()
    path.write_bytes(b"\x00" * about.st_size)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert find_damage(path.parent, ["optimizer.pt"], known) is None
    overwrite(path, b"\x00" * about.st_size)
    assert "is not what was written" in str(find_damage(path.parent, ["optimizer.pt"], known))
    path.unlink()
    assert "cannot be read" in str(find_damage(path.parent, ["optimizer.pt"], known))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": None}, "cannot be read"),
        ({"files": ["model.safetensors"]}, "cannot be read"),
        ({"files": {"model.safetensors": "776"}}, "where a number belongs"),
        ({"files": {"../../secret": 3}}, "outside of its folder"),
        ({"step": None}, "where a number belongs"),
        ({"step": 21}, "is that of step 21"),
        ({"global_batch": True}, "where a number belongs"),
        ({"format": 3}, "where a text belongs"),
        ({"checksums": None}, "cannot be read"),
        ({"checksums": {"model.safetensors": 5}}, "where a text belongs"),
        ({"engine": None}, "cannot be read"),
        ({"colour": "red"}, "cannot be read"),
    ],
)
def test_manifests_that_mean_nothing(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-3", known=True)
    path = write(tmp_path / "checkpoint-20", known=True) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    with pytest.raises(IncompleteCheckpointError, match=said):
        Manifest.read(path.parent)


def test_a_run_goes_on_from_the_checkpoint_before(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.read(run / "checkpoint-4", verify=True)
    assert manifest.checksums.keys() == manifest.files.keys() > {"model.safetensors", "trainer_state.json"}
    output = copy_of(run, tmp_path / "run", "encoder")
    weights = output / "checkpoint-4" / "model.safetensors"
    whole = weights.read_bytes()
    flip(weights, -5)
    with caplog.at_level(logging.WARNING):
        assert go_on(output, run) == 0
    assert "checkpoint-4 is not complete and is passed over" in caplog.text
    assert f"resuming from {output / 'checkpoint-2'}" in capsys.readouterr().out
    assert weights.read_bytes() == whole
    flip(weights, -5)
    capsys.readouterr()
    assert go_on(tmp_path / "other", run, "--resume", str(weights.parent)) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert go_on(tmp_path / "other", run, "--init_from", str(weights.parent)) == 2
    assert "is not what was written" in capsys.readouterr().err
