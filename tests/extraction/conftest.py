"""Tiny encoders and a folder of small pictures in three classes, one of them no picture."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from hf_equissl import EquiSSLConfig, EquiSSLModel, save_encoder
from hf_equissl.extraction.cli import main

CLASSES = ("apple", "bear", "cat")
# Pictures that decode, and the one that does not: the row of its name among the others.
GOOD, BROKEN = 40, "bear/broken.png"


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ours``: EquiSSL with a stem. ``vit``: a stock ViT whose processor squashes pictures, unlike the probes."""
    folder = tmp_path_factory.mktemp("encoders")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    encoder = EquiSSLModel(EquiSSLConfig(**sizes, feature_size=12, equivariant_size=4))
    save_encoder(encoder, folder / "ours", image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    ViTModel(ViTConfig(**sizes, intermediate_size=32), add_pooling_layer=False).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with 40 pictures of several shapes and one file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(GOOD):
        path = folder / CLASSES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((18 + number % 5, 30 - number % 7)).save(path)
    (folder / BROKEN).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="session")
def tars(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures that decode, in five WebDataset shards of eight."""
    folder = tmp_path_factory.mktemp("tars")
    paths = sorted(path for path in pictures.glob("*/*.png") if path.name != "broken.png")
    for shard in range(5):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for path in paths[8 * shard : 8 * shard + 8]:
                tar.add(path, path.name)
    return folder


@pytest.fixture
def command(encoders: Path, pictures: Path) -> Callable[..., list[str]]:
    """The words of the command: on ``ours`` and the pictures, with room for the broken one, shards of 12."""

    def words(output: Path, *more: str, encoder: str = "ours", data: Path | None = None) -> list[str]:
        fixed = ["--encoder", str(encoders / encoder), "--data", str(data or pictures), "--output_dir", str(output)]
        usual = {"--max_bad_share": "0.05", "--num_workers": "0", "--batch_size": "5"}
        if "--streaming" not in more:
            usual["--shard_size"] = "12"
        return [*fixed, *(word for name in usual if name not in more for word in (name, usual[name])), *more]

    return words


@pytest.fixture
def extract(command: Callable[..., list[str]]) -> Callable[..., Path]:
    """Run the command in this process; the folder."""

    def run(output: Path, *more: str, code: int = 0, **options: object) -> Path:
        assert main(command(output, *more, **options)) == code
        return output

    return run


@pytest.fixture(scope="session")
def whole(encoders: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished extraction, made by one process without interruption; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "features"
    words = ["--encoder", str(encoders / "ours"), "--data", str(pictures), "--output_dir", str(folder)]
    words += ["--max_bad_share", "0.05", "--num_workers", "0", "--batch_size", "5", "--shard_size", "12"]
    assert main(words) == 0
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished extraction that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))
