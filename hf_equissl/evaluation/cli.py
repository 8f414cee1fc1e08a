"""The command line of ``training/probe.py``: arguments, the checks that come before any compute, the report."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.places import check_place
from ..encoders.places import check_measured, is_raw_pixels, split_untrained
from ..utils import load_errors
from ..utils.commands import command_parser, end_bars, log_plainly, path_word, restate_command, say
from ..utils.files import expand_home, write_text
from ..utils.imports import IMPORT, import_named
from ..utils.options import (
    MAX_BAD_SHARE,
    NUM_WORKERS,
    REVISION,
    SOURCE_OPTIONS,
    SPLIT_OPTIONS,
    STREAMING,
    TRUST_REMOTE_CODE,
    Option,
    add_options,
    read_options,
)
from ..utils.strict_yaml import load_yaml
from ..utils.suggestions import RecipeError, check_known
from .named_sets import NAMED_SETS, find_set, is_named
from .protocols import PROTOCOLS, protocol_for
from .registry import EVALUATORS

if TYPE_CHECKING:
    from ..encoders.frozen import FrozenEncoder
    from .data import EvaluationData
    from .results import ResultRecord

logger = logging.getLogger(__name__)
LEFT_OUT = "left_out.json"  # beside the results of --skip_unfit: why which evaluator did not run, a list of sentences
_DESCRIPTION = """\
Measure frozen encoders: how well transformations of an image can be read off their features (R2), and how well
classes can (linear probe, k nearest neighbours). Prints a table and writes results.json, results.md and pictures.
Results that are already in the output folder (same weights, data and settings) are not computed again."""

_EXAMPLES = """\
examples:
  # four transformations, linear probe and kNN on a labelled set, three seeds
  python training/probe.py --encoder runs/equissl --data uoft-cs/cifar10 --output_dir results

  # what raw pixels and random weights say, which every R2 should be read beside
  python training/probe.py --encoder runs/equissl --encoder untrained:runs/equissl --encoder raw_pixels \\
      --data uoft-cs/cifar10 --fill circle --output_dir results

  # two encoders side by side; black corners hidden by reflection; no labels needed
  python training/probe.py --encoder runs/equissl --encoder facebook/dinov2-small --data my_photos/ \\
      --evaluators transformation_regression --tests rotation translation --fill reflect --output_dir results
"""


def read_subset(text: str) -> dict[str, Any]:
    """Read the fields of a ``Subset``, as YAML.

    Raises:
        ValueError: They choose no images.
    """
    from ..data.subsets import Subset
    from ..utils.coercion import check_arguments

    where = "--train_subset"
    fields = load_yaml(text, where)
    if not isinstance(fields, dict):
        raise ValueError(f"{where} {text}: expected fields, such as '{{share: 0.2, stratified: true}}'.")
    fields = check_arguments(fields, Subset, where)
    Subset(**fields)
    return fields


_DATA_OPTIONS = (
    *SPLIT_OPTIONS,
    Option(
        "--train_subset",
        "part of the training images that all probes are fitted on, as a recipe's data.subset, e.g. "
        "'{share: 0.2, stratified: true}'",
        "YAML",
        type=read_subset,
    ),
    Option(
        "--further_test",
        "judge the same probes on another source, too (its test split by default); may be repeated",
        ("SOURCE", "SPLIT"),
        setting="further_tests",
        type=expand_home,
        nargs="+",
        repeated=True,
    ),
    *SOURCE_OPTIONS,
    STREAMING,
    MAX_BAD_SHARE,
    NUM_WORKERS,
    Option(
        "--feature_storage",
        "type in which features of images as they are lie in memory, for all evaluators that read them; the two short "
        "ones take half the memory, and records say so; default: fp32",
        choices=("fp32", "bf16", "fp16"),
    ),
)
_PREDICTOR = Option(
    "--predictor",
    "pretraining state of the encoder, a checkpoint or the published pretraining/, whose predictor is judged",
    "PATH_OR_ID",
    type=expand_home,
)
ENCODER_OPTIONS = (
    Option(
        "--image_size", "default: of the image processor beside the encoder, else of its config", "PIXELS", type=int
    ),
    Option(
        "--precision",
        "of the encoder; default: auto, which is bf16 where the device has units for it, else fp32",
        choices=("auto", "fp32", "bf16"),
        default="auto",
    ),
    Option("--batch_size", "images per pass; default: 256", "N", type=int),
    _PREDICTOR,
    Option("--device", "cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu", "NAME"),
    REVISION,
    TRUST_REMOTE_CODE,
)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all options, the evaluators' own among them, with their help."""
    parser = command_parser("probe.py", description=_DESCRIPTION, epilog=_EXAMPLES)
    add = parser.add_argument
    add(
        "--encoder",
        action="append",
        required=True,
        type=path_word,
        metavar="PATH_OR_ID",
        help="folder or Hub id that AutoModel loads; untrained:PATH_OR_ID for its architecture with random weights "
        "(untrained@1:PATH_OR_ID for seed 1), raw_pixels for the image itself; repeat for several encoders",
    )
    add(
        "--data",
        required=True,
        type=path_word,
        metavar="SOURCE",
        help="Hub id, parquet, image folder (flat or with classes), stream; or a set by name, set:NAME or "
        f"set:NAME=FOLDER, among {', '.join(NAMED_SETS)}",
    )
    add("--output_dir", required=True, type=path_word, metavar="DIR", help="where results are written and looked up")
    add(
        "--evaluators",
        nargs="+",
        metavar="NAME",
        default=None,
        help=f"among {', '.join(EVALUATORS)}; default: all that apply to the data (labels)",
    )
    add(
        "--protocol",
        choices=["auto", *PROTOCOLS],
        default="auto",
        help="settings of the probes; auto: small for images of up to 64 pixels, otherwise full",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="EVALUATOR.KEY=VALUE",
        help="any other setting of an evaluator, e.g. knn.k=10; may be repeated",
    )
    add("--overwrite", action="store_true", help="compute again what the output folder already has")
    text = "leave out evaluators that an encoder's kind does not allow, and say so, also where they were asked for"
    add("--skip_unfit", action="store_true", help=text)
    add_options(parser, [IMPORT])
    evaluators = parser.add_argument_group("evaluators")
    add_options(evaluators, [option for name in EVALUATORS for option in EVALUATORS.read_declared(name, "options")])
    add_options(parser.add_argument_group("data"), _DATA_OPTIONS)
    add_options(parser.add_argument_group("encoder"), ENCODER_OPTIONS)
    return parser


def parse_words(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the words of a command, after the modules that they name with ``--import`` have been imported.

    Raises:
        RecipeError: A module cannot be imported.
    """
    import_named(argv)
    return build_parser().parse_args(argv)


def read_settings(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read ``["knn.k=10"]`` as evaluator -> setting -> value, values as YAML.

    Raises:
        ValueError: a word has another form or names no evaluator.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        place, equals, text = word.partition("=")
        name, _, key = place.partition(".")
        if not equals or not key:
            raise ValueError(f"--set {word}: expected EVALUATOR.KEY=VALUE, e.g. knn.k=10.")
        check_known(name, EVALUATORS, "--set")
        found.setdefault(name, {})[key] = load_yaml(text, f"--set {place}")
    return found


def load_data(arguments: argparse.Namespace) -> list[tuple[str, EvaluationData]]:
    """Choose the evaluators, and read what each is given, equal kinds of data once.

    Returns:
        Names of evaluators with their data: those that were asked for, otherwise those that apply to the images.
    """
    from .data import EvaluationData

    options = read_options(arguments, _DATA_OPTIONS)
    loaded: dict[type[EvaluationData], EvaluationData] = {}

    def load(kind: type[EvaluationData]) -> EvaluationData:
        if kind not in loaded:
            loaded[kind] = kind.load(arguments.data, **options)
        return loaded[kind]

    if arguments.evaluators is not None:
        return [(name, load(EVALUATORS[name].data_type)) for name in dict.fromkeys(arguments.evaluators)]
    data = load(EvaluationData)
    chosen = [name for name, evaluator in EVALUATORS.items() if evaluator.applies_to(data)]
    if left_out := [name for name in EVALUATORS if name not in chosen]:
        logger.info("Not run, as they do not apply to these images: %s.", ", ".join(left_out))
    return [(name, data) for name in chosen]


def distinct_encoders(sources: Sequence[str]) -> list[str]:
    """List each encoder once: ``runs/x``, ``runs/x/`` and the full path are one folder."""
    found: dict[str, str] = {}
    for source in sources:
        path, seed = split_untrained(source) or (source, None)
        path = expand_home(path)
        is_folder = os.path.isdir(path) and not is_raw_pixels(path)
        real, named = (os.path.realpath(path), os.path.normpath(path)) if is_folder else (path, path)
        prefix = "" if seed is None else f"untrained@{seed}:" if seed else "untrained:"
        found.setdefault(prefix + real, prefix + named)
    return list(found.values())


def open_encoders(sources: Sequence[str], **options: Any) -> list[FrozenEncoder]:
    """Open each encoder once; raw pixels get the image size of the others where none is given.

    Raises:
        ValueError: an encoder cannot be opened, or the others' sizes differ.
    """
    from ..encoders.references import open_frozen

    named = distinct_encoders(sources)
    opened = {source: open_frozen(source, **options) for source in named if not is_raw_pixels(source)}
    sizes = {encoder.image_size for encoder in opened.values()}
    if len(sizes) > 1 and len(opened) < len(named) and "image_size" not in options:
        raise ValueError(f"raw_pixels: the other encoders see images of {sorted(sizes)} pixels. Give --image_size.")
    size = options.pop("image_size", None) or next(iter(sizes), None)
    return [opened.get(source) or open_frozen(source, image_size=size, **options) for source in named]


def _attach(encoders: Sequence[FrozenEncoder], source: str, load: Callable[[str], Any] | None) -> None:
    """Give the one encoder its predictor."""
    if len(encoders) != 1 or load is None:
        raise ValueError(f"--predictor {source} belongs to one encoder, and {len(encoders)} were named.")
    encoders[0].predictor = load(source)


def check_words(arguments: argparse.Namespace) -> None:
    """Refuse what is wrong with the words alone, before anything that takes seconds is imported.

    Raises:
        ValueError: There is no such evaluator, encoder or source, or ``--set`` cannot be read.
    """
    for name in arguments.evaluators or ():
        check_known(name, EVALUATORS, "--evaluators")
    read_settings(arguments.set)
    for source in arguments.encoder:
        check_measured(source)
    further = [named[0] for named in getattr(arguments, "further_test", ())]
    for source, fitted in ((arguments.data, True), *((source, False) for source in further)):
        check_place(find_set(source, fitted=fitted)[0] if is_named(source) else source)
    if (predictor := getattr(arguments, "predictor", None)) is not None:
        load_errors.check_place(predictor, "predictor")


def run(
    arguments: argparse.Namespace, command: str, load_predictor: Callable[[str], Any] | None = None
) -> list[ResultRecord]:
    """Check everything, then measure every encoder; return the records."""
    check_words(arguments)

    from ..utils.devices import choose_device, precision_lines
    from .registry import build_evaluator
    from .results import merge_records
    from .runner import RESULTS, TABLE, check_output_dir, run_evaluators

    folder = check_output_dir(arguments.output_dir)
    if (folder / TABLE).exists() and not (folder / RESULTS).exists():
        raise ValueError(
            f"{folder / TABLE} is not of this command, and would be overwritten. Name another --output_dir."
        )
    settings = read_settings(arguments.set)
    options = read_options(arguments, ENCODER_OPTIONS)
    if "device" in options:
        options["device"] = str(choose_device(options["device"]))
    predictor = options.pop(_PREDICTOR.key, None)
    encoders = open_encoders(arguments.encoder, **options)
    if predictor is not None:
        _attach(encoders, predictor, load_predictor)
    say("\n".join(precision_lines(encoders[0].precision, encoders[0].device)))
    chosen = load_data(arguments)
    # The evaluators of every encoder are made first: what is wrong with the last one shows before the first one runs.
    work, left_out = [], []
    for encoder in encoders:
        protocol = protocol_for(encoder.image_size) if arguments.protocol == "auto" else arguments.protocol
        evaluators = []
        for name, data in chosen:
            given = read_options(arguments, EVALUATORS[name].options) | settings.get(name, {})
            evaluator = build_evaluator(name, data, protocol=protocol, **given)
            try:
                evaluator.check(encoder)
            except ValueError as error:
                asked = arguments.evaluators is not None or not evaluator.needs_tokens
                if asked and not arguments.skip_unfit:
                    raise
                left_out.append(f"{name} is not run for {encoder.name}: {error}")
                logger.info(left_out[-1])
                continue
            evaluators.append(evaluator)
        work.append((encoder, evaluators))
    if arguments.skip_unfit:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / LEFT_OUT, json.dumps(left_out, indent=2) + "\n")
    records: list[ResultRecord] = []
    for encoder, evaluators in work:
        records += run_evaluators(
            encoder, evaluators, arguments.output_dir, overwrite=arguments.overwrite, command=command
        )
    return merge_records(records)


def main(argv: Sequence[str] | None = None, load_predictor: Callable[[str], Any] | None = None) -> None:
    """Run the command line; mistakes of the user end in one clear line and exit status 2.

    Args:
        argv: The words; default: those of the process.
        load_predictor: Loads what ``--predictor`` names.
    """
    try:
        arguments = parse_words(argv)
    except RecipeError as error:
        build_parser().exit(2, f"probe.py: error: {error}\n")
    log_plainly()
    command = restate_command("probe.py", argv)
    try:
        records = run(arguments, command, load_predictor)
    except (ValueError, OSError) as error:
        end_bars()
        build_parser().exit(2, f"probe.py: error: {error}\n")

    from .report import plain_table
    from .results import load_records
    from .runner import RESULTS, write_report

    if not records:
        print("Nothing is left to measure.")
        return
    print(plain_table(records))
    # The report covers all that the folder holds by now, also from earlier commands.
    everything = load_records(Path(arguments.output_dir) / RESULTS)
    written = write_report(everything, arguments.output_dir)
    print(f"\nWritten to {arguments.output_dir}: {', '.join([RESULTS, *(path.name for path in written)])}")
