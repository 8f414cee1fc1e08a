"""Tiny models, tiny images, and the way to the real ones."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Before torch is imported: two OpenMP pools on two cores cost more than they give, and no test may reach the network.
# The allocator's settings are for the processes that tests start: it keeps large buffers for the next step.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "8589934592")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "17179869184")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
from PIL import Image

gc.disable()  # until all files are imported: what they make stays
ROOT = Path(__file__).resolve().parent.parent


# Rooms whose tests start processes. They come first, so that no worker begins a long file when the other is done.
LONG_FILES = ("data", "distributed", "finetuning", "hub", "pretraining", "running", "tests", "training")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first (``--no-loadscope-reorder`` keeps the order)."""
    items.sort(key=lambda item: item.path.parent.name not in LONG_FILES)


def pytest_collection_finish() -> None:
    """Leave modules and tests out of every later collection: a run collects when it ends, and there are millions."""
    import torch  # the process that only hands out tests need not wait for it

    torch.set_num_threads(1)
    # So long a loader waits for each of its workers when the garbage collector ends it, as in tests that break off.
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real images: ``EQUISSL_TEST_DATA`` or ``../shared/data``. Tests that need it skip without it."""
    folder = Path(os.environ.get("EQUISSL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test images are absent: {folder} does not exist (set EQUISSL_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 32 small pictures that differ: gradients with a bright disc, 40 x 36 px."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:36, 0:40]
    for index in range(32):
        low, high = rng.uniform(0, 255, (2, 3))
        picture = low + (high - low) * (x / 40)[..., None]
        cy, cx, radius = rng.uniform(8, 28), rng.uniform(8, 32), rng.uniform(3, 9)
        picture[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = rng.uniform(0, 255, 3)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without units for bf16, as far as choices go. oneDNN has read its bound before, and computes as ever."""
    import torch

    torch.ops.mkldnn._is_mkldnn_bf16_supported()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
