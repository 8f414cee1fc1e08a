"""Turn a public encoder into an EquiSSL encoder, a stock transformers model, or a program: see ``--help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.encoders.places import check_source
from hf_equissl.encoders.targets import PROGRAM_FILES, RECORD_FILE, TARGETS, check_target
from hf_equissl.utils.commands import (
    any_text,
    check_at_least,
    command_parser,
    log_plainly,
    path_word,
    say,
    stop,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BitImageProcessorPil

# Images that the loss of int8 is measured on.
MEASURED_IMAGES = 64

DESCRIPTION = """\
Convert an encoder that exists: weights stay the same, and so do outputs. Reads stock transformers encoders (dinov2,
dinov2_with_registers, vit, vit_mae, vit_msn; heads are left out), EquiSSL encoders, and the .pth files of iBOT, DINO
and DINOv2. Writes model, code and image processor; what is left out is said.

A program (--to onnx, --to torch_export) takes any batch and any image size that the patch size divides, needs neither
this package nor transformers, and was compared with PyTorch before it appears."""

EXAMPLES = """\
examples:
  # a stock encoder, to be trained further: training/pretrain.py --init_from converted ...
  python training/convert.py facebook/dinov2-small --output_dir converted
  # an iBOT checkpoint as a stock model that loads without this package
  python training/convert.py checkpoint.pth --weights_of teacher --to native --output_dir ibot-vits16
  # an EquiSSL encoder for onnxruntime, also in int8: what that loses on your images, and images per second
  python training/convert.py runs/rot/encoder --to onnx --int8 --images ./photos --speed --output_dir runs/rot/onnx
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for what can be mended, 1 where an exporter or a runtime fails."""
    given = _parser().parse_args(argv)
    options = dict(vars(given))
    log_plainly()
    speed, data = options.pop("speed"), options.pop("images")
    folder, source, batch_size = (options.pop(name) for name in ("output_dir", "source", "batch_size"))
    target, tokens_only = options["to"], options["tokens_only"]
    try:
        check_at_least(given, batch_size=1)
        check_target(target, tokens_only=tokens_only, int8=options["int8"])
        if speed and target not in PROGRAM_FILES:
            raise ValueError(f"--speed is for --to onnx and --to torch_export, and --to is {target}. Leave it out.")
        if data is not None and not options["int8"]:
            raise ValueError("--images are those that the loss of --int8 is measured on. Give both, or none.")
        check_source(source)
        images = None if data is None else _read_images(data)
    except (ValueError, OSError) as error:
        return stop(error, code=2)

    from transformers.utils.logging import disable_progress_bar

    from hf_equissl.encoders.convert import convert_to_folder
    from hf_equissl.encoders.programs import ProgramError

    disable_progress_bar()
    try:
        encoder = convert_to_folder(source, folder, images=images, **options)
    except (ValueError, OSError) as error:
        return stop(error, code=2)
    except ProgramError as error:
        return stop(f"{error} Nothing was written.", code=1)
    config = encoder.config
    say(
        f"{folder}: ViT of width {config.hidden_size}, {config.num_hidden_layers} blocks, patch {config.patch_side}, "
        f"{config.num_register_tokens} registers."
    )
    if target in PROGRAM_FILES:
        try:
            _describe(Path(folder), target, encoder, batch_size if speed else None, tokens_only)
        except ProgramError as error:
            return stop(f"{folder} is written; its speed cannot be measured. {error}", code=1)
    else:
        needs = "" if target == "native" else " after `import hf_equissl`"
        say(f"Load it with AutoModel.from_pretrained({folder!r}){needs}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("convert.py", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("source", type=path_word, metavar="SOURCE", help="folder, Hub id, or .pth file")
    add("--output_dir", required=True, type=path_word, metavar="DIR", help="a new folder")
    what = "; ".join(f"{name}: {text}" for name, text in TARGETS.items())
    add("--to", choices=list(TARGETS), default="equissl", help=f"{what}; default: equissl")
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
    add("--tokens_only", action="store_true", help="of a program: without invariant and equivariant features")
    add("--int8", action="store_true", help="with --to onnx: also with linear layers in int8; says what that loses")
    add("--images", type=path_word, metavar="DATA", help=f"up to {MEASURED_IMAGES} to measure it on; default: made up")
    add("--speed", action="store_true", help="measure images per second of a program beside PyTorch, on the CPU")
    add("--batch_size", type=int, default=16, metavar="N", help="of --speed; default: 16")
    return parser


def _read_images(data: str) -> Callable[[BitImageProcessorPil], Tensor]:
    """Find images; returns what decodes and normalises them with a processor that comes later."""
    from hf_equissl.data.sources import load_images

    source = load_images(data)
    count = min(MEASURED_IMAGES, len(source))

    def decode(processor: BitImageProcessorPil) -> Tensor:
        images = [source.decode(source.content(source.row(index))) for index in range(count)]
        pixels: Any = processor(images, return_tensors="pt")
        return pixels["pixel_values"]

    return decode


def _describe(folder: Path, target: str, encoder: Any, batch_size: int | None, tokens_only: bool) -> None:
    """Say what a program gives, how near it is, what int8 loses, and with a ``batch_size`` how fast it is."""
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    say(f"{folder / PROGRAM_FILES[target]} maps pixel_values to {', '.join(record['outputs'])}.")
    # What torch.export writes takes a single row or column of patches for another program.
    least = f", from {2 * record['patch_size']}" if target == "torch_export" else ""
    say(f"It takes any batch, and sides that are multiples of {record['patch_size']} pixels{least}.")
    say(f"Largest difference from PyTorch: {record['max_difference']:.1e} (batches of 1 and 5, two image sizes).")
    if "int8_cosine" in record:
        on = record["int8_images"] if isinstance(record["int8_images"], str) else f"{record['int8_images']} of yours"
        say(f"int8, cosine with float32 per token, images {on}:")
        for name, cosine in record["int8_cosine"].items():
            say(f"  {name:<20} mean {cosine['mean']:.4f}, least {cosine['least']:.4f}")
    if batch_size is not None:
        import torch

        from hf_equissl.benchmarking.programs import time_program

        size = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))["crop_size"]["height"]
        times = time_program(encoder, folder, target, image_size=size, batch_size=batch_size, tokens_only=tokens_only)
        say(f"Images per second ({size} px, batches of {batch_size}, {torch.get_num_threads()} threads):")
        for name, value in times.items():
            say(f"  {name:<20} {value:8.1f}  ({value / times['PyTorch']:.2f} x)")


if __name__ == "__main__":
    sys.exit(main())
