"""Write the features of a large set of images by a frozen encoder to shards of a data set.

accelerate launch training/extract_features.py --encoder PATH_OR_ID --data SOURCE --output_dir DIR   (--help shows more)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.extraction.cli import main


def launch(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command as a process of its own, alone or started by a launcher."""
    code = main(argv)
    if "torch" in sys.modules:
        from hf_equissl.distributed.agreement import end_process

        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    launch()
