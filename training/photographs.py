"""Crops of the photographs that lie inside the wheels of scikit-image, scikit-learn and matplotlib."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
_SKIMAGE_TRAIN = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "coins.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
# Module -> files. Whole photographs are held out: neither encoders nor probes have seen any part of them.
TRAIN_PHOTOGRAPHS = {
    "skimage": [f"data/{name}" for name in _SKIMAGE_TRAIN],
    "sklearn": ["datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}
TEST_PHOTOGRAPHS = {"skimage": ["data/chelsea.png", "data/coffee.png"], "sklearn": ["datasets/images/china.jpg"]}

TILE = 48  # pixels; training crops again, to 32 px
SMALLEST_WINDOW = 64
LARGEST_WINDOW = 0.7  # as a share of the photograph's shorter side
# Windows with less contrast (standard deviation of grey values in 0..255) are left out: sky does not look turned.
SMALLEST_CONTRAST = 16.0


class PhotographsMissingError(RuntimeError):
    """A package is absent or does not hold its photographs. The message says what to do."""


def check_packages() -> None:
    """Raise ``PhotographsMissingError`` if a package is missing or lacks a file, before anything is made."""
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise PhotographsMissingError(
            f"{', '.join(missing)} missing from {sys.executable}. Run `make quickstart`, which installs everything "
            "into an environment of its own, or `pip install -e '.[quickstart]'`."
        )
    find_photographs(TRAIN_PHOTOGRAPHS), find_photographs(TEST_PHOTOGRAPHS)


def find_photographs(files: Mapping[str, Sequence[str]]) -> list[Path]:
    """Find files inside installed packages.

    Raises:
        PhotographsMissingError: A package does not hold such a file.
    """
    found = []
    for module, names in files.items():
        spec = find_spec(module)
        folder = Path((spec.submodule_search_locations or [""])[0] if spec else "")
        for name in names:
            if not (folder / name).is_file():
                raise PhotographsMissingError(
                    f"{PACKAGES[module]} has no {name}. Install the versions of constraints.txt: "
                    "pip install -c constraints.txt -e '.[quickstart]'."
                )
            found.append(folder / name)
    return found


def cut_tiles(folder: Path, per_photograph: int, seed: int = 0) -> dict[str, int]:
    """Fill ``folder`` with crops: ``train/`` and ``test/``, each a flat folder like anyone's own images.

    A folder that exists is complete and stays as it is.

    Returns:
        Number of crops in either.
    """
    if not folder.exists():
        from hf_equissl.utils.files import move_into_place

        staging = folder.with_name(".tiles")
        shutil.rmtree(staging, ignore_errors=True)
        for split, files in (("train", TRAIN_PHOTOGRAPHS), ("test", TEST_PHOTOGRAPHS)):
            (staging / split).mkdir(parents=True)
            for path in find_photographs(files):
                for number, tile in enumerate(random_windows(Image.open(path).convert("RGB"), per_photograph, seed)):
                    tile.save(staging / split / f"{path.stem}_{number:04d}.png", compress_level=1)
        move_into_place(staging, folder)
    return {split: sum(1 for _ in (folder / split).iterdir()) for split in ("train", "test")}


def random_windows(photograph: Image.Image, count: int, seed: int) -> list[Image.Image]:
    """Cut square windows at random places, sides log-uniform from 64 px to 0.7 of the shorter one, resized to 48 px."""
    rng = np.random.default_rng(seed)
    width, height = photograph.size
    grey = np.asarray(photograph.convert("L"), dtype=np.float32)
    windows: list[Image.Image] = []
    while len(windows) < count:
        side = round(np.exp(rng.uniform(np.log(SMALLEST_WINDOW), np.log(LARGEST_WINDOW * min(width, height)))))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        if grey[top : top + side, left : left + side].std() >= SMALLEST_CONTRAST:
            box = (left, top, left + side, top + side)
            windows.append(photograph.resize((TILE, TILE), Image.Resampling.LANCZOS, box=box))
    return windows
