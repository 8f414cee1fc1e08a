"""Measure frozen encoders: regression of transformations, linear probe, k nearest neighbours.

python training/probe.py --encoder PATH_OR_ID --data SOURCE --output_dir DIR   (--help shows everything)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_equissl.evaluation import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, which may load predictors out of pretraining states."""
    cli.main(argv, load_predictor=_load_predictor)


def _load_predictor(source: str) -> Any:
    from hf_equissl.hub.sie_predictor import load_sie_predictor

    return load_sie_predictor(source)


if __name__ == "__main__":
    main()
