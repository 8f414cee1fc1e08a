"""The command line of ``training/extract_features.py``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.places import check_place
from ..encoders.feature_names import FEATURES, PATCH_TOKENS
from ..hub.privacy import is_hub_id
from ..utils import load_errors
from ..utils.commands import command_parser, log_plainly, path_word, restate_command, say, stop
from ..utils.files import readable_size
from ..utils.options import (
    MAX_BAD_SHARE,
    REVISION,
    SOURCE_OPTIONS,
    STREAMING,
    SUBFOLDER,
    TRUST_REMOTE_CODE,
    Option,
    add_options,
    read_options,
)
from ..utils.suggestions import check_known
from .settings import DTYPES, FORMATS, PRECISIONS, ExtractionError, ExtractionSettings

if TYPE_CHECKING:
    from .processes import Processes
    from .work import Extraction

_DESCRIPTION = """\
Write the features of a large set of images by a frozen encoder to shards of a data set: any encoder that AutoModel
loads, prepared by its own image processor, on one process or many. Everything that can be wrong is checked first. An
extraction that was stopped, even by kill -9, goes on when the command is given again, on as many processes as you like,
and ends in the same files. Images that do not decode are left out and named; `index` is each image's row in the source.
"""

_EXAMPLES = """\
examples:
  # CLS token and mean patch of all training images, with labels; then load_dataset("features")
  python training/extract_features.py --encoder facebook/dinov2-small --data uoft-cs/cifar10 --output_dir features

  # the test images into the same folder
  python training/extract_features.py --encoder facebook/dinov2-small --data uoft-cs/cifar10 --split test \\
      --output_dir features

  # all patch tokens in half precision, on 8 GPUs; first look at the plan: images, shards, bytes on disk
  python training/extract_features.py --encoder runs/mine/encoder --data ./imagenet --features cls patch_tokens \\
      --dtype float16 --precision auto --output_dir tokens --dry_run
  accelerate launch --num_processes 8 training/extract_features.py --encoder runs/mine/encoder --data ./imagenet \\
      --features cls patch_tokens --dtype float16 --precision auto --output_dir tokens

  # what the stem keeps of where and how, from WebDataset shards, and onto the Hub
  accelerate launch training/extract_features.py --encoder me/my-encoder --data "./shards/*.tar" --streaming \\
      --features equivariant_cls equivariant_patches --output_dir stem --push_to_hub --repo_id me/stem \\
      --license cc-by-4.0 --private
"""


RUN = (
    Option("--encoder", "folder or Hub id that AutoModel loads", "PATH_OR_ID", type=path_word, required=True),
    Option(
        "--data",
        "Hub id, folder of images, parquet, tar, save_to_disk folder",
        "SOURCE",
        type=path_word,
        required=True,
    ),
    Option("--output_dir", "data/, extraction.json and README.md go here", "DIR", type=path_word, required=True),
    Option("--split", "default: train; several splits, one command each, may share a folder", "NAME"),
    Option(
        "--features",
        f"among {', '.join((*FEATURES, PATCH_TOKENS))}; default: cls patches. patches: their mean; backbone: "
        "[cls ; patches]; invariant..., equivariant...: parts of the stem (EquiSSL encoders)",
        "NAME",
        nargs="+",
    ),
    Option("--dtype", f"in which features are stored: {' or '.join(DTYPES)}; default: float32", "NAME"),
    Option("--format", f"{' or '.join(FORMATS)}; default: parquet", "NAME", setting="file_format"),
    Option(
        "--shard_size",
        "images per shard, the least that is computed again after an interruption; default: 10000, fewer where a "
        "shard would exceed 500 MB; with --streaming a shard is what the source has as a shard",
        "N",
        type=int,
    ),
    Option("--limit", "only the first N images", "N", type=int),
)
DRY_RUN = Option("--dry_run", "print the plan, write nothing", default=False)
SOURCE = (
    *SOURCE_OPTIONS,
    Option("--data_revision", "branch, tag or commit of a Hub data set", "NAME", setting="revision"),
    STREAMING,
)
DATA = (
    MAX_BAD_SHARE,
    Option("--num_workers", "processes that decode, per process; default: by the cores, <= 32", "N", type=int),
)
ENCODER = (
    Option("--image_size", "resize and crop to this; default: as its processor does", "PIXELS", type=int),
    Option("--precision", f"{', '.join(PRECISIONS)} (autocast; auto: of the device); default: fp32", "NAME"),
    Option("--batch_size", "images per pass; default: 256", "N", type=int),
    Option("--device", "cpu, cuda, cuda:1, ...; default: cuda if there is one; each process its own", "NAME"),
)
LOAD = (REVISION, SUBFOLDER, TRUST_REMOTE_CODE)
PUBLISHING = (
    Option("--push_to_hub", "upload the finished folder as a data set", default=False),
    Option("--repo_id", "where", "OWNER/NAME"),
    Option("--private", "make a new repository private", default=False),
    Option(
        "--license",
        "an ID as the Hub lists them, or inherit; default: that of the images, if theirs and the encoder's are free",
        "ID",
    ),
    Option("--license_name", "with --license other", "NAME"),
    Option("--license_link", "with --license other: where it is written; default: --license_file", "URL"),
    Option("--license_file", "its text, to lie in the repository", "PATH", type=path_word),
)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all options with their help."""
    parser = command_parser(
        "extract_features.py",
        usage="extract_features.py --encoder PATH_OR_ID --data SOURCE --output_dir DIR [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    add_options(parser, (*RUN, DRY_RUN))
    add_options(parser.add_argument_group("data"), (*SOURCE, *DATA))
    add_options(parser.add_argument_group("encoder"), (*ENCODER, *LOAD))
    add_options(parser.add_argument_group("publishing"), PUBLISHING)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, 2 for what can be mended before anything is computed, 1 for an extraction that stopped, 130
        if interrupted.
    """
    arguments = build_parser().parse_args(argv)
    command = restate_command("extract_features.py", argv)
    log_plainly()
    try:
        settings, publish = _read(arguments)
    except (ValueError, OSError) as error:
        return stop(error, code=2, speaks=os.environ.get("LOCAL_RANK", "0") == "0")

    from .processes import Processes

    try:
        processes = Processes()
    except ExtractionError as error:
        return stop(error, code=2)
    try:
        dry_run = read_options(arguments, [DRY_RUN])["dry_run"]
        return _run(processes, settings, publish, command, dry_run)
    except KeyboardInterrupt:
        return stop("the same command goes on, finished shards are kept.", code=130, word="interrupted")


def _run(
    processes: Processes, settings: ExtractionSettings, publish: dict[str, Any], command: str, dry_run: bool
) -> int:
    from ..data import ImageDecodeError, ImageSourceError
    from ..encoders.frozen import NonFiniteFeaturesError
    from ..hub.push import account
    from .card import write_card
    from .push import push_features
    from .record import finish, keep_precision
    from .run import extract, summarise
    from .work import prepare

    work, plan = None, {}
    if processes.is_main:  # what is wrong is said once, and downloads and conversions happen once
        try:
            if publish:
                publish = _choose_licence(settings, publish)
                account(publish["repo_id"])
            settings = keep_precision(settings)
            work = prepare(settings, processes.device(settings.device))
            plan = _plan(work, command, processes, dry_run)
        except (ValueError, OSError, ImportError, ExtractionError) as error:
            plan = {"error": stop(_message(error), code=2)}
    try:
        plan = processes.send_from_main(plan)
        if "error" in plan or dry_run:
            return plan.get("error", 0)
        if work is None:
            settings = keep_precision(settings)
            work = prepare(settings, processes.device(settings.device))
            _check_same_sight(work, plan)
        workers = work.settings.workers(processes.local_count)
        mine = [work.shards[number] for number in plan["remaining"]][processes.rank :: processes.count]
        title = f"process 0 of {processes.count}" if processes.count > 1 else work.settings.split_name
        share = extract(work, mine, num_workers=workers, progress=processes.is_main, title=title)
        shares = processes.gather(share)
        if processes.is_main:
            run = summarise(work, shares, workers)
            record = finish(work, command, run)
            write_card(Path(work.settings.output_dir), record)
            say(_report(work, record, run))
            if publish:
                say(f"Published: {push_features(Path(work.settings.output_dir), record, **publish)}")
    except (ExtractionError, ImageDecodeError, ImageSourceError, NonFiniteFeaturesError, OSError, ValueError) as error:
        who = f"process {processes.rank}: " if processes.count > 1 else ""
        return stop(f"{who}{_message(error)}", code=1)
    return 0


def _read(arguments: argparse.Namespace) -> tuple[ExtractionSettings, dict[str, Any]]:
    """Read the settings, and what ``push_features`` needs; the latter empty where nothing is published.

    Raises:
        ValueError: Something is wrong with the words alone, or encoder or data are not where they are said to be.
    """
    options = read_options(arguments, (*RUN, *DATA, *ENCODER))
    if "features" in options:
        options["features"] = tuple(options["features"])
    settings = ExtractionSettings(
        **options, source_options=read_options(arguments, SOURCE), load_options=read_options(arguments, LOAD)
    )
    for name in settings.features:
        check_known(name, (*FEATURES, PATCH_TOKENS), "--features")
    load_errors.check_place(settings.encoder)
    check_place(settings.data)
    publish = read_options(arguments, PUBLISHING)
    if not publish.pop("push_to_hub"):
        for name, value in publish.items():
            if value:
                raise ValueError(f"--{name} belongs to --push_to_hub.")
        return settings, {}
    if not is_hub_id(repo_id := publish.get("repo_id", "")):
        raise ValueError(f"--push_to_hub: --repo_id is {repo_id!r}, expected OWNER/NAME.")
    return settings, publish


def _choose_licence(settings: ExtractionSettings, publish: dict[str, Any]) -> dict[str, Any]:
    """Put the licence of the features in the place of the options about it.

    Raises:
        ValueError: The publisher has to say it, or what they say cannot be.
    """
    from ..hub.licences import choose_licence
    from ..hub.terms import find_terms
    from .record import read_extraction

    terms = find_terms("data", settings.data, revision=settings.source_options.get("revision"))
    splits = read_extraction(Path(settings.output_dir)).get("splits", {})
    for other in sorted({split["data"] for split in splits.values()} - {settings.data}):  # published with this one
        terms += find_terms("data", other)
    terms += find_terms("weights", settings.encoder, revision=settings.load_options.get("revision"))
    name, link, copy = (publish.pop(f"license_{part}", None) for part in ("name", "link", "file"))
    licence = choose_licence(terms, publish.pop("license", None), name=name, link=link, copy=copy, first="data")
    licence.require_answer()
    return {**publish, "licence": licence}


def _plan(work: Extraction, command: str, processes: Processes, dry_run: bool) -> dict[str, Any]:
    """Check the folder and print what will be done; unless it is a dry run, make the folder and begin its record."""
    from ..evaluation.runner import check_output_dir
    from ..utils.devices import precision_lines
    from .record import begin, check_own, check_same
    from .shards import remove_leftovers

    check_own(work)
    check_same(work)
    remaining = work.list_remaining()
    say("\n".join(precision_lines(work.encoder.precision, work.encoder.device)))
    say(work.describe(remaining, processes.count, work.settings.workers(processes.local_count)))
    work.check_disk(remaining, processes.count)
    if not dry_run:
        check_output_dir(work.folder)
        remove_leftovers(work.folder, work.settings.split_name)
        if remaining:
            begin(work, command)
    return {"remaining": [shard.number for shard in remaining], "digest": work.digest}


def _check_same_sight(work: Extraction, plan: dict[str, Any]) -> None:
    """Refuse to go on where this process, on another machine, reads something else than the main process."""
    if work.digest != plan["digest"]:
        raise ExtractionError(
            f"this process reads another encoder or other images at {work.settings.encoder} and {work.settings.data} "
            "than the main process. Put the same files there on every machine, or use a shared folder."
        )


def _report(work: Extraction, record: dict[str, Any], run: dict[str, Any] | None) -> str:
    from ..data.throughput import NOTABLE_WAIT

    split = record["splits"][work.settings.split_name]
    left_out = f", {len(split['skipped'])} left out" if split["skipped"] else ""
    lines = [
        f"{work.settings.output_dir}: {split['rows']:,} images{left_out}, {len(work.shards)} shards, "
        f"{readable_size(split['bytes'])}"
    ]
    if run is None:
        return f"{lines[0]}; nothing was left to do"
    each = run["images_per_second_of_processes"]
    of = f" ({' + '.join(f'{speed:.4g}' for speed in each)})" if len(each) > 1 else ""
    lines.append(f"{run['images']:,} images in {run['seconds']:.4g} s: {run['images_per_second']:.4g} images/s{of}")
    wait = f"the encoder waited for images {run['data_wait']:.0%} of the time"
    if run["data_wait"] > NOTABLE_WAIT:
        wait += f": give more --num_workers (now {run['num_workers']} for each process) if there are cores for them"
    return "\n".join([*lines, wait])


def _message(error: Exception) -> str:
    message = str(error)
    if "Original Traceback" in message:  # from a worker; the same error again, with its message at the end
        message = message.rpartition(f"{type(error).__name__}: ")[2].strip()
    return message
