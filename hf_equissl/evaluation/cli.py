"""The command line of ``training/probe.py``: arguments, the checks that come before any compute, the report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..encoders.frozen import FEATURES, FrozenEncoder
from ..utils.commands import command_parser, log_plainly, say, typed_command
from ..utils.devices import choose_device, precision_lines
from ..views import TRANSFORMATIONS, build_transformation
from . import EVALUATORS, build_evaluator
from .base import Evaluator
from .data import load_evaluation_data
from .images import EvaluationData
from .protocols import PROTOCOLS, protocol_for
from .report import plain_table
from .results import ResultRecord, load_records, merge_records
from .runner import RESULTS, check_output_dir, run_evaluators, write_report
from .transformation_regression import DEFAULT_FAMILIES

_DESCRIPTION = """\
Measure frozen encoders: how well transformations of an image can be read off their features (R2), and how well
classes can (linear probe, k nearest neighbours). Prints a table and writes results.json, results.md and r2.png. Results
that are already in the output folder (same weights, data and settings) are not computed again."""

_EXAMPLES = """\
examples:
  # four transformations, linear probe and kNN on a labelled set, three seeds
  python training/probe.py --encoder runs/equissl --data uoft-cs/cifar10 --output_dir results

  # two encoders side by side; black corners hidden by reflection; no labels needed
  python training/probe.py --encoder runs/equissl --encoder facebook/dinov2-small --data my_photos/ \\
      --evaluators transformation_regression --tests rotation translation --fill reflect --output_dir results
"""


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all options with their help."""
    parser = command_parser("probe.py", description=_DESCRIPTION, epilog=_EXAMPLES)
    add = parser.add_argument
    add(
        "--encoder",
        action="append",
        required=True,
        metavar="PATH_OR_ID",
        help="folder or Hub id that AutoModel loads; repeat for several encoders",
    )
    add("--data", required=True, metavar="SOURCE", help="Hub id, parquet, image folder (flat or with classes), stream")
    add("--output_dir", required=True, metavar="DIR", help="where results are written and looked up")
    add(
        "--evaluators",
        nargs="+",
        metavar="NAME",
        default=None,
        help=f"among {', '.join(EVALUATORS)}; default: all that the data allow (labels)",
    )
    add(
        "--tests",
        nargs="+",
        metavar="FAMILY",
        default=list(DEFAULT_FAMILIES),
        help=f"transformations to regress, among {', '.join(TRANSFORMATIONS)}; default: {' '.join(DEFAULT_FAMILIES)}",
    )
    add(
        "--fill",
        choices=["zeros", "reflect", "border"],
        default=None,
        help="outside of turned or shifted images; black corners give angles away, reflect does not; default: zeros",
    )
    add(
        "--features",
        nargs="+",
        metavar="KIND",
        default=["backbone"],
        help=f"features for the regression, among {', '.join(FEATURES)}; default: backbone = [CLS ; mean patch]",
    )
    add(
        "--class_features",
        nargs="+",
        metavar="KIND",
        default=["cls", "patches", "backbone"],
        help="features for linear probe, kNN and effective rank; default: cls patches backbone",
    )
    add("--seeds", type=int, default=None, metavar="N", help="seeds of the regression probe; default: 3")
    add(
        "--protocol",
        choices=["auto", *PROTOCOLS],
        default="auto",
        help="settings of the probes; auto: small for images of up to 64 pixels, otherwise full",
    )
    add("--epochs", type=int, default=None, metavar="N", help="epochs of the regression probe")
    add("--num_draws", type=int, default=None, metavar="N", help="transformations drawn per training image")
    data = parser.add_argument_group("data")
    data.add_argument("--train_split", default="train", metavar="NAME", help="default: train")
    data.add_argument(
        "--test_split",
        default=None,
        metavar="NAME",
        help="default: test, validation or val; without one, a tenth of the training images",
    )
    data.add_argument("--train_images", type=int, default=None, metavar="N", help="fixed random subset; default: all")
    data.add_argument("--test_images", type=int, default=None, metavar="N", help="likewise")
    data.add_argument("--image_column", default=None, metavar="NAME", help="default: found by its type")
    data.add_argument("--label_column", default=None, metavar="NAME", help="default: found by its type")
    data.add_argument("--config_name", default=None, metavar="NAME", help="configuration of a Hub data set")
    data.add_argument("--streaming", action="store_true", help="read the source as a stream")
    data.add_argument(
        "--max_bad_share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of images that may fail to decode; they are left out and named; default: 0.01",
    )
    data.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes that decode; default: 0")
    encoder = parser.add_argument_group("encoder")
    encoder.add_argument(
        "--image_size",
        type=int,
        default=None,
        metavar="PIXELS",
        help="default: of the image processor beside the encoder, else of its config",
    )
    encoder.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of the encoder; default: auto, which is bf16 where the device has units for it, else fp32",
    )
    encoder.add_argument("--batch_size", type=int, default=256, metavar="N", help="images per pass; default: 256")
    encoder.add_argument(
        "--device", default=None, metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu"
    )
    encoder.add_argument("--revision", default=None, help="of encoders from the Hub")
    encoder.add_argument("--trust_remote_code", action="store_true", help="let code beside the weights run")
    add("--overwrite", action="store_true", help="compute again what the output folder already has")
    return parser


def choose_evaluators(arguments: argparse.Namespace, data: EvaluationData, protocol: str) -> list[Evaluator]:
    """The evaluators that were asked for; without a choice, those that the data allow."""
    names = arguments.evaluators
    if names is None:
        labelled = data.train.labels is not None and data.test.labels is not None
        names = list(EVALUATORS) if labelled else ["effective_rank", "transformation_regression"]
    regression = {
        "families": arguments.tests,
        "features": arguments.features,
        "fill": arguments.fill,
        "seeds": arguments.seeds,
        "epochs": arguments.epochs,
        "num_draws": arguments.num_draws,
    }
    settings: dict[str, dict[str, Any]] = {
        "transformation_regression": {key: value for key, value in regression.items() if value is not None},
        "effective_rank": {"features": arguments.class_features},
        "linear": {"features": arguments.class_features},
        "knn": {"features": arguments.class_features},
    }
    return [build_evaluator(name, data, protocol=protocol, **settings.get(name, {})) for name in dict.fromkeys(names)]


def check_device(name: str | None) -> str | None:
    """``name``, if this machine has such a device; ``None`` leaves the choice to ``FrozenEncoder``.

    Raises:
        ValueError: PyTorch has no such device here.
    """
    return None if name is None else str(choose_device(name))


def distinct_encoders(sources: Sequence[str]) -> list[str]:
    """Each encoder once, however its folder is written: ``runs/x``, ``runs/x/`` and its full path are the same."""
    found: dict[str, str] = {}
    for source in sources:
        is_folder = os.path.isdir(source)
        found.setdefault(
            os.path.realpath(source) if is_folder else source, os.path.normpath(source) if is_folder else source
        )
    return list(found.values())


def run(arguments: argparse.Namespace, command: str) -> list[ResultRecord]:
    """Check everything, then measure every encoder; returns the records."""
    check_output_dir(arguments.output_dir)
    for name in arguments.tests:
        build_transformation(name)
    for name in arguments.evaluators or ():
        if name not in EVALUATORS:
            build_evaluator(name, None)  # type: ignore[arg-type]  # raises, with the nearest name
    if not 0 <= arguments.max_bad_share <= 1:
        raise ValueError(f"--max_bad_share: expected a share from 0 to 1, got {arguments.max_bad_share}.")
    device = check_device(arguments.device)
    load_options = {"trust_remote_code": arguments.trust_remote_code}
    if arguments.revision is not None:
        load_options["revision"] = arguments.revision
    encoders = [
        FrozenEncoder(
            source,
            image_size=arguments.image_size,
            precision=arguments.precision,
            batch_size=arguments.batch_size,
            device=device,
            **load_options,
        )
        for source in distinct_encoders(arguments.encoder)
    ]
    say("\n".join(precision_lines(encoders[0].precision, encoders[0].device)))
    data = load_evaluation_data(
        arguments.data,
        train_split=arguments.train_split,
        test_split=arguments.test_split,
        train_images=arguments.train_images,
        test_images=arguments.test_images,
        num_workers=arguments.num_workers,
        max_bad_share=arguments.max_bad_share,
        column=arguments.image_column,
        label_column=arguments.label_column,
        config_name=arguments.config_name,
        streaming=arguments.streaming,
    )
    # The evaluators of every encoder are made first: what is wrong with the last one shows before the first one runs.
    work = []
    for encoder in encoders:
        protocol = protocol_for(encoder.image_size) if arguments.protocol == "auto" else arguments.protocol
        evaluators = choose_evaluators(arguments, data, protocol)
        for evaluator in evaluators:
            encoder.check_features(evaluator.features)
        work.append((encoder, evaluators))
    records: list[ResultRecord] = []
    for encoder, evaluators in work:
        records += run_evaluators(
            encoder, evaluators, arguments.output_dir, overwrite=arguments.overwrite, command=command
        )
    return merge_records(records)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; mistakes of the user end in one clear line and exit status 2."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    log_plainly()
    command = typed_command("probe.py", argv)
    try:
        records = run(arguments, command)
    except (ValueError, OSError) as error:
        parser.exit(2, f"probe.py: error: {error}\n")
    print(plain_table(records))
    # Of all that the folder holds by now, earlier commands' included.
    everything = load_records(Path(arguments.output_dir) / RESULTS)
    written = write_report(everything, arguments.output_dir)
    print(f"\nWritten to {arguments.output_dir}: {', '.join([RESULTS, *(path.name for path in written)])}")
