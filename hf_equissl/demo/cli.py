"""``hf-equissl demo``: what two small encoders see. Needs no torch for help and mistakes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..utils.commands import check_at_least, command_parser, log_plainly, path_word, say, stop
from ..utils.load_errors import check_place
from ..utils.suggestions import RecipeError
from .shipped import CHECKPOINTS, shipped_checkpoint

DESCRIPTION = """\
Look at what the two small encoders see that come with the package: a base (VICReg), and one trained with the
reconstruction of images between two views. Without options: pictures and a page that says what to look at, offline, in
less than a minute."""

EXAMPLES = """\
examples:
  hf-equissl demo                          # pictures and demo.md in demo_output/
  hf-equissl demo --images ./photos        # of your own images
  hf-equissl demo --app                    # in the browser: drop an image, turn it (pip install 'hf-equissl[demo]')
  hf-equissl demo --space my_space         # the app as a folder that can be uploaded as a Space
  hf-equissl demo --fit_probe --data uoft-cs/cifar10 --encoder runs/mine/encoder   # angle_probe.safetensors beside it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what can be mended."""
    options = build_parser().parse_args(argv)
    try:
        _check(options)
        sources = options.encoder or [str(shipped_checkpoint(name)) for name in CHECKPOINTS]
        _hush()
        if options.fit_probe:
            return _fit(options, sources)
        if options.space is not None:
            return _write_space(options)
        return _show(options)
    except (ValueError, OSError, ImportError) as error:
        return stop(error, code=2)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all options with their help."""
    parser = command_parser("hf-equissl demo", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("--output_dir", default="demo_output", type=path_word, metavar="DIR", help="default: demo_output")
    add("--images", type=path_word, metavar="FOLDER", help="images to look at; default: eight photographs that ship")
    add(
        "--encoder",
        action="append",
        default=[],
        type=path_word,
        metavar="PATH_OR_ID",
        help="an EquiSSL encoder in place of those that ship; may be repeated",
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--app", action="store_true", help="start the app and say its address; Ctrl-C ends it")
    ways.add_argument("--space", type=path_word, metavar="DIR", help="write the app as a Space into a new folder")
    ways.add_argument(
        "--fit_probe", action="store_true", help="fit the probe of angles, and store it beside the encoder"
    )
    app = parser.add_argument_group("with --app")
    app.add_argument("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine alone")
    app.add_argument("--port", type=int, help="default: 7860, or the next that is free")
    probe = parser.add_argument_group("with --fit_probe")
    probe.add_argument("--data", type=path_word, metavar="SOURCE", help="images: a Hub id, files or a folder")
    probe.add_argument("--train_images", type=int, default=10_000, metavar="N", help="default: 10000")
    probe.add_argument("--test_images", type=int, default=2_000, metavar="N", help="default: 2000")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse what is wrong with the words, before anything that takes seconds is imported.

    Raises:
        RecipeError: It says what and what to do.
        LoadError: There is no such encoder, or no such source of images.
        ImportError: Gradio is missing.
    """
    check_at_least(options, train_images=10, test_images=2)
    if options.fit_probe and options.data is None:
        raise RecipeError("--fit_probe needs images: --data SOURCE, e.g. --data uoft-cs/cifar10.")
    if options.data is not None and not options.fit_probe:
        raise RecipeError("--data is what --fit_probe fits on. Images to look at are --images FOLDER.")
    for source in options.encoder:
        check_place(source)
    if options.data is not None:
        check_place(options.data, "data")
    if options.images is not None and not Path(options.images).is_dir():
        raise RecipeError(f"--images {options.images}: no such folder. Give one with images, or leave the option out.")
    if options.app and find_spec("gradio") is None:
        raise ImportError("The app needs Gradio: pip install 'hf-equissl[demo]'.")


def _hush() -> None:
    """Leave progress bars of loading out."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _show(options: argparse.Namespace) -> int:
    from .analysis import Analyst

    named = {Path(source).name: source for source in options.encoder}
    if len(named) < len(options.encoder):
        named = {source: source for source in options.encoder}
    analyst = Analyst(named or None, options.images)
    if options.app:
        from .app import launch_app

        say("Ctrl-C ends the app.")
        launch_app(analyst, server_name=options.host, server_port=options.port)
        return 0
    from .page import run_demo

    page, *pictures = run_demo(analyst, options.output_dir)
    say(f"Written to {options.output_dir}: {', '.join(path.name for path in pictures)}.")
    say(f"{page} says what to look at. In the browser: hf-equissl demo --app")
    return 0


def _fit(options: argparse.Namespace, sources: Sequence[str]) -> int:
    from ..encoders.frozen import FrozenEncoder
    from ..evaluation.data import EvaluationData
    from .angle_probe import PROBE_FILE, fit_angle_probe

    log_plainly()
    if missing := [source for source in sources if not Path(source).is_dir()]:
        raise RecipeError(f"--encoder {missing[0]}: the probe is stored beside the encoder. Give a folder.")
    sizes = {"train_images": options.train_images, "test_images": options.test_images}
    data = EvaluationData.load(options.data, **sizes)
    for source in sources:
        probe = fit_angle_probe(FrozenEncoder(source), data)
        probe.save(Path(source, PROBE_FILE))
        facts = probe.facts
        say(
            f"{Path(source, PROBE_FILE)}: {facts['test_pairs']} held-out images, turned: R2 {facts['r2']}, off by "
            f"{facts['mean_error_degrees']} degrees; turned, shifted, recoloured and blurred: R2 "
            f"{facts['r2_changed']}, off by {facts['mean_error_degrees_changed']} degrees"
        )
    return 0


def _write_space(options: argparse.Namespace) -> int:
    from .space import write_space

    folder = write_space(options.space)
    say(f"{folder} is ready: hf upload USER/NAME {folder} . --repo-type space")
    return 0
