"""Turn a public encoder into an EquiSSL encoder, or into a stock transformers model: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.encoders.places import check_source
from hf_equissl.utils.commands import any_text, command_parser, log_plainly, path_word, say, stop

DESCRIPTION = """\
Convert an encoder that exists: weights stay the same, and so do outputs. Reads stock transformers encoders (dinov2,
dinov2_with_registers, vit, vit_mae, vit_msn; heads are left out), EquiSSL encoders, and the .pth files of iBOT, DINO
and DINOv2. Writes model, code and image processor; what is left out is said."""

EXAMPLES = """\
examples:
  # a stock encoder, to be trained further: training/pretrain.py --init_from converted ...
  python training/convert.py facebook/dinov2-small --output_dir converted
  # an iBOT checkpoint as a stock model that loads without this package
  python training/convert.py checkpoint.pth --weights_of teacher --native --output_dir ibot-vits16
  # an EquiSSL encoder as a stock model
  python training/convert.py runs/rot/encoder --native --output_dir runs/rot/native
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what can be mended."""
    options = vars(_parser().parse_args(argv))
    log_plainly()
    try:
        check_source(options["source"])
    except ValueError as error:
        return stop(error, code=2)

    from transformers.utils.logging import disable_progress_bar

    from hf_equissl.encoders.convert import convert_to_folder

    disable_progress_bar()
    folder = options.pop("output_dir")
    try:
        encoder = convert_to_folder(options.pop("source"), folder, **options)
    except (ValueError, OSError) as error:
        return stop(error, code=2)
    config = encoder.config
    say(
        f"{folder}: ViT of width {config.hidden_size}, {config.num_hidden_layers} blocks, patch {config.patch_side}, "
        f"{config.num_register_tokens} registers."
    )
    needs = "" if options["native"] else " after `import hf_equissl`"
    say(f"Load it with AutoModel.from_pretrained({folder!r}){needs}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("convert.py", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("source", type=path_word, metavar="SOURCE", help="folder, Hub id, or .pth file")
    add("--output_dir", required=True, type=path_word, metavar="DIR", help="a new folder")
    add("--native", action="store_true", help="write a stock dinov2 or dinov2_with_registers model")
    add(
        "--weights_of",
        choices=["teacher", "student"],
        default="teacher",
        help="network of a .pth file; default: teacher",
    )
    add("--num_attention_heads", type=int, metavar="N", help="of a .pth file's ViT; default: width / 64")
    add("--image_size", type=int, metavar="PIXELS", help="side of the images; default: the source's")
    add("--image_mean", type=float, nargs="+", metavar="X", help="per channel; default: the source's")
    add("--image_std", type=float, nargs="+", metavar="X", help="per channel; default: the source's")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--subfolder", default="", type=any_text, metavar="NAME", help="folder within the repository")
    return parser


if __name__ == "__main__":
    sys.exit(main())
