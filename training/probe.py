"""Measure frozen encoders: regression of transformations, linear probe, k nearest neighbours.

python training/probe.py --encoder PATH_OR_ID --data SOURCE --output_dir DIR   (--help shows everything)
"""

from __future__ import annotations

from hf_equissl.evaluation.cli import main

if __name__ == "__main__":
    main()
