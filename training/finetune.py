"""Fine-tune an encoder for image classification: all weights, a linear head, or LoRA / DoRA adapters.

python training/finetune.py --encoder PATH_OR_ID --data SOURCE --method METHOD --output_dir DIR   (--help shows more)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.finetuning.cli import main


def launch(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command as a process of its own, alone or started by a launcher."""
    from hf_equissl.distributed.signals import end_command, listen_to_launcher

    listen_to_launcher()
    end_command(main(argv))


if __name__ == "__main__":
    launch()
