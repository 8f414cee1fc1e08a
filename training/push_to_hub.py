"""Publish a run on the Hub, or look at what would be published: see ``--help``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if find_spec("hf_equissl") is None:
    sys.exit("error: hf_equissl is not installed. Run `pip install -e .` in the checkout, then this command again.")

from hf_equissl.hub.places import check_run_folder, find_results
from hf_equissl.utils.commands import command_parser, path_word, say, stop

# As hf_equissl.hub.PARTS, without the seconds that its import takes before --help.
PARTS = ("encoder", "native", "pretraining", "figures", "card")
_LICENCE = ("license", "license_name", "license_link", "license_file")
_BUILDING = ("parts", "results", *_LICENCE, "description", "dataset", "baseline", "output_dir")

DESCRIPTION = """\
Publish a run on the Hub: the encoder with its code, image processor and card, the same encoder as a stock transformers
model (native/), the whole training state (pretraining/) and figures. One commit, or none: after an interruption run the
same command again, and only what had not arrived is sent. Log in first: `hf auth login`, or set HF_TOKEN.

Refused: weights that are not finite, an encoder without its image processor, a card with placeholders, pickles, tokens.
"""

EXAMPLES = """\
examples:
  # what would be published? prints the files and the card, sends nothing
  python training/push_to_hub.py runs/rot --repo_id me/vits16-rot --dry_run
  # publish, for your own eyes first, with what training/probe.py measured
  python training/push_to_hub.py runs/rot --repo_id me/vits16-rot --private --results results \\
      --license apache-2.0
  # build the folder, look at it, edit the card, publish it
  python training/push_to_hub.py runs/rot --repo_id me/vits16-rot --license apache-2.0 --output_dir published
  python training/push_to_hub.py published --repo_id me/vits16-rot
  # encoder and card alone, on a branch
  python training/push_to_hub.py runs/rot --repo_id me/vits16-rot --parts encoder card --revision smaller \\
      --license inherit
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for what can be mended, 130 if interrupted."""
    options = build_parser().parse_args(argv)
    try:
        _run(options)
    except (ValueError, ImportError, OSError) as error:
        return stop(error, code=2)
    except KeyboardInterrupt:
        return stop("nothing is half-published. Run the same command again to go on.", code=130, word="interrupted")
    return 0


def _run(options: argparse.Namespace) -> None:
    source = Path(options.run_dir)
    check_run_folder(source)
    for path in options.results or ():
        find_results(Path(path))

    from hf_equissl.hub.push import account, describe, push_repository

    ready = _is_repository(source)
    if ready and (given := [name for name in _BUILDING if getattr(options, name) not in (None, [])]):
        raise ValueError(f"{source} is a repository that was built already: --{given[0]} belongs to building one.")
    question = "" if ready else _ask_licence(options)
    if options.output_dir is None and not options.dry_run:
        if question:
            raise ValueError(question)
        say(f"logged in as {account(options.repo_id)}")
    with tempfile.TemporaryDirectory(prefix="push-") as folder:
        target = Path(folder, "repository") if options.output_dir is None else Path(options.output_dir)
        built = source if ready else _build(options, target)
        if options.dry_run:
            say(describe(built))
            say(f"\nThis would be published as {options.repo_id}. Nothing was sent.")
            say(f"Before it is: {question}" if question else "")
        elif options.output_dir is not None:
            say(f"The repository lies in {built}. Publish it with this command: give it as RUN_DIR.")
            say(f"Before that, write its licence into the head of README.md. {question}" if question else "")
        else:
            words = {} if options.commit_message is None else {"commit_message": options.commit_message}
            private = True if options.private else None
            commit = push_repository(built, options.repo_id, private=private, revision=options.revision, **words)
            say(f"published: {commit.commit_url}")


def _ask_licence(options: argparse.Namespace) -> str:
    """Return what the publisher has to say of the licence first; empty where it is said, or follows by itself."""
    from hf_equissl.hub.licences import choose_licence
    from hf_equissl.hub.run_folder import RunFolder

    terms = RunFolder.read(options.run_dir).terms(options.dataset)
    name, link, copy = options.license_name, options.license_link, options.license_file
    return choose_licence(terms, options.license, name=name, link=link, copy=copy).question


def _is_repository(source: Path) -> bool:
    """Return whether a folder holds a card beside a model, and no checkpoints, so that it is not a run."""
    from hf_equissl.checkpoints import newest_checkpoint

    models = (source, source / "native", source / "pretraining")
    holds_model = any((folder / "config.json").is_file() for folder in models)
    return (source / "README.md").is_file() and holds_model and newest_checkpoint(source) is None


def _build(options: argparse.Namespace, target: Path) -> Path:
    from hf_equissl.hub.repository import build_repository

    return build_repository(
        options.run_dir,
        target,
        repo_id=options.repo_id,
        parts=options.parts or PARTS,
        results=options.results or (),
        **{name: getattr(options, name) for name in _LICENCE},
        description=options.description,
        dataset=options.dataset,
        baseline=options.baseline,
    )


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all options with their help."""
    parser = command_parser("push_to_hub.py", description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add(
        "run_dir",
        type=path_word,
        metavar="RUN_DIR",
        help="a run's folder (--output_dir of pretrain.py), or a repository built before",
    )
    add("--repo_id", required=True, metavar="NAME/MODEL", help="repository on the Hub; created if it does not exist")
    add("--private", action="store_true", help="create it as private; an existing public one is refused")
    add("--revision", metavar="BRANCH", help="branch, created if it does not exist; default: main")
    add("--commit_message", metavar="TEXT", help="default: Upload encoder")
    add("--dry_run", action="store_true", help="print the files with their sizes and the card, send nothing")
    build = parser.add_argument_group("what the repository holds")
    build.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    build.add_argument(
        "--results",
        nargs="+",
        type=path_word,
        metavar="PATH",
        help="results.json of training/probe.py, or folders with one: measured on this encoder, shown in the card",
    )
    build.add_argument(
        "--license",
        metavar="ID",
        help="of the weights, as the Hub lists them, or inherit: that of base weights and data with its restrictions; "
        "default: that of base weights and data where it is known and free, otherwise you are asked",
    )
    build.add_argument("--license_name", metavar="NAME", help="with --license other")
    build.add_argument(
        "--license_link", metavar="URL", help="with --license other: where it is written; default: --license_file"
    )
    build.add_argument("--license_file", type=path_word, metavar="PATH", help="its text, to lie in the repository")
    build.add_argument("--description", metavar="TEXT", help="your own words for the head of the card")
    build.add_argument("--dataset", metavar="ID", help="Hub id of the training data, if the run read it from a folder")
    build.add_argument(
        "--baseline",
        metavar="NAME",
        help="another encoder among the results, by its name or the end of it: the card shows by how much this one is "
        "better or worse on every task",
    )
    build.add_argument(
        "--output_dir",
        type=path_word,
        metavar="DIR",
        help="build the repository there, in a new folder, and send nothing",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
