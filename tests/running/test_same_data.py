"""A run goes on with the images that it has seen, wherever they lie, and refuses others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hf_equissl.data import load_images
from hf_equissl.pretraining.run_record import RunRecord
from hf_equissl.running.resume import check_same_data
from hf_equissl.utils.suggestions import RecipeError

from ..data.image_files import encode, picture, write_folder


def test_a_resumed_run_recognises_its_data(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", [f"{number}.jpg" for number in range(6)])
    first = load_images(folder)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run").mkdir()
    assert check_same_data(checkpoint, first) == ()  # nothing is known
    sizes = {"image_size": 8, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    batch = {"per_device": 2, "processes": 1, "accumulation": 1}
    RunRecord(
        "python", first.name, 6, seed=0, batch=batch, precision="fp32", data_fingerprint=first.fingerprint(), **sizes
    ).save(tmp_path / "run")
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert check_same_data(checkpoint, load_images(moved)) == ()
    (moved / "6.jpg").write_bytes(encode(picture(6)))
    with pytest.raises(RecipeError, match=r"then 6 images, now 7.*Give the same images, wherever they lie"):
        check_same_data(checkpoint, load_images(moved))
    (note,) = check_same_data(checkpoint, load_images(moved, streaming=True))
    assert "not the data that this run has read" in note
