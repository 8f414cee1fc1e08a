"""Write the features of a large set of images by a frozen encoder to shards of a data set.

accelerate launch training/extract_features.py --encoder PATH_OR_ID --data SOURCE --output_dir DIR   (--help shows more)
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.extraction.cli import main

if __name__ == "__main__":
    code = main()
    if "torch" in sys.modules:
        from hf_equissl.distributed.agreement import end_process

        end_process(code)
    sys.exit(code)
