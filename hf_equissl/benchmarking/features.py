"""Measure the memory and the time that kNN and the linear probe take on features of many images, which are made up.

python -m hf_equissl.benchmarking.features --images 1281167 --width 384   (--help shows everything)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..utils.commands import check_at_least, command_parser, say, stop
from ..utils.machine import resident_peak

MIB = 2**20
DESCRIPTION = """\
Fill features of random numbers as an encoder's are filled, then vote by kNN and fit a linear probe. Prints, for each,
the seconds and the most memory beside the features themselves (Linux)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what can be mended."""
    parser = command_parser(
        "features.py", usage="python -m hf_equissl.benchmarking.features [options]", description=DESCRIPTION
    )
    add = parser.add_argument
    add("--images", type=int, default=200_000, metavar="N", help="training images; default: 200000")
    add("--queries", type=int, default=1024, metavar="N", help="test images; default: 1024")
    add("--width", type=int, default=384, metavar="N", help="of the features; default: 384")
    add("--classes", type=int, default=1000, metavar="N", help="default: 1000")
    add("--steps", type=int, default=20, metavar="N", help="of the linear probe, batch 1024; default: 20")
    add("--feature_storage", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: fp32")
    options = parser.parse_args(argv)
    try:
        check_at_least(options, images=20, queries=1, width=1, classes=1, steps=1)
    except ValueError as error:
        return stop(error, code=2)
    for line in _measure(options):
        say(line)
    return 0


def _measure(options: argparse.Namespace) -> Iterator[str]:
    import torch

    from ..evaluation.feature_store import STORED, FeatureStore
    from ..evaluation.knn import knn_votes
    from ..evaluation.probes import fit_linear_steps, seeded_permutation

    dtype = STORED[options.feature_storage]
    size = options.images * options.width * dtype.itemsize / MIB
    yield f"{options.images} x {options.width} features in {options.feature_storage}: {size:.0f} MiB"
    store = FeatureStore(["cls"], options.images, dtype)

    def fill() -> None:
        generator = torch.Generator().manual_seed(0)
        for begin in range(0, options.images, 1024):
            count = min(1024, options.images - begin)
            store.add({"cls": torch.randn(count, options.width, generator=generator)})

    yield _line("filled", fill, beside=size)
    train = store.join(["cls"])
    if train is None:
        raise RuntimeError("Nothing was filled in.")
    labels = torch.arange(options.images) % options.classes
    queries = train[: options.queries].clone()
    yield _line("kNN", lambda: knn_votes(train, labels, queries, options.classes, k=20, temperature=0.07))
    kept = seeded_permutation(options.images, 0)[options.images // 10 :]
    fit = {"seed": 0, "epochs": 1, "batch_size": 1024, "iterations": options.steps, "rows": kept}
    yield _line("linear probe", lambda: fit_linear_steps(train, labels, options.classes, (0.1, 0.01), **fit))


def _line(name: str, work: Callable[[], object], beside: float = 0.0) -> str:
    with _peak() as peak:
        start = time.process_time()
        work()
        seconds = time.process_time() - start
    return f"{name:<13} {seconds:8.1f} s of processor time, {peak() - beside:8.0f} MiB beside the features"


@contextmanager
def _peak() -> Iterator[Callable[[], float]]:
    """Give a function that tells how many MiB resident memory has grown at most since the block began."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is from now on
    before = resident_peak()
    yield lambda: (resident_peak() - before) / MIB


if __name__ == "__main__":
    sys.exit(main())
