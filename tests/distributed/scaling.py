"""``training/scaling.py`` as it is, on CPUs with any engine: its launches come back to this file."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_equissl.training import scaling
from tests.distributed.cpu import allow_engines_on_cpu

if __name__ == "__main__":
    allow_engines_on_cpu()
    sys.exit(scaling.main(script=Path(__file__).resolve()))
