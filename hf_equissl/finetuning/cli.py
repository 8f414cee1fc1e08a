"""The command line of ``training/finetune.py``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.places import check_place
from ..distributed.signals import EXIT_PREEMPTED, Preempted, Signals, speaks_for_failure
from ..utils import load_errors
from ..utils.commands import command_parser, is_first_process, log_plainly, path_word, restate_command, say, stop
from ..utils.imports import IMPORT, import_named
from ..utils.options import (
    MAX_BAD_SHARE,
    NUM_WORKERS,
    REVISION,
    SOURCE_OPTIONS,
    SPLIT_OPTIONS,
    SUBFOLDER,
    TRUST_REMOTE_CODE,
    Option,
    add_options,
    read_options,
)
from ..utils.suggestions import RecipeError, check_known
from .result_files import find_results
from .settings import KEEPS, METHODS, POOLINGS, FineTuningSettings
from .tasks import TASKS

if TYPE_CHECKING:
    from ..hub.licences import Licence

_DESCRIPTION = """\
Fine-tune an encoder for image classification, or for another task: all weights, a head alone, or LoRA / DoRA adapters.
Encoders are EquiSSL ones and everything that AutoModelForImageClassification loads (DINOv2, ViT, ...), or for dense
tasks AutoBackbone. Everything that can be wrong is checked before the first step; a run that was stopped goes on where
it was when the command is given again."""
_TASKS = """\
tasks:
  classification         one of several classes for an image
  depth                  metres for every pixel: images/ with depth/ (16-bit PNG). Options: depth_scale, max_depth,
                         eval_crop, layers
  detection              boxes: a folder with COCO's JSON, or a data set with a column of objects; needs the extra coco.
                         Options: hidden_size, queries, decoder_layers, classes, box_format, layers
  homography             how far the corners of a patch were moved, on any images. Options: patch, test_pairs, pair_seed
  instance_segmentation  masks and the boxes around them, of the same folders, with polygons or run-length codes.
                         Options: hidden_size, queries, decoder_layers, points, classes, layers
  keypoints              key points of people in COCO's form, by heat maps; needs the extra coco.
                         Options: simple, rotation, scaling, sigmas, layers
  mpii_keypoints         the sixteen key points of MPII. Options: simple, rotation, scaling, layers
  semantic_segmentation  a class for every pixel: images/train/*.jpg with masks/train/*.png, val beside train, and
                         classes.json; or a data set with a column of masks and --set classes=150. Further options:
                         ignore_index, reduce_labels, mask_column, hidden_size, pyramid, slide, layers
  linear_segmentation    the same by a linear map of patches, as DINOv2 measures frozen encoders
  Others can be registered (hf_equissl.finetuning.TASKS) in a module that --import names.
"""

_EXIT_CODES = """\
exit codes: 0 finished; 1 stopped by an error; 2 something can be mended before training; 75 stopped by SIGTERM,
SIGUSR1 or SIGHUP, with a checkpoint: the same command goes on; 130 stopped by Ctrl-C
"""
_EXAMPLES = """\
examples:
  # LoRA adapters on CIFAR-10; the adapter alone is saved in runs/lora/adapter
  python training/finetune.py --encoder runs/equissl/encoder --data uoft-cs/cifar10 --method lora --output_dir runs/lora

  # all weights of a public encoder on your own class folders (train/<class>/*.jpg, test/<class>/*.jpg), two GPUs
  accelerate launch --num_processes 2 training/finetune.py --encoder facebook/dinov2-small --data ./flowers \\
      --method full --epochs 30 --num_workers 8 --output_dir runs/full

  # segment: UPerNet on a frozen encoder; masks/ beside images/
  python training/finetune.py --task semantic_segmentation --encoder runs/equissl/encoder --data ./camvid \\
      --method frozen --image_size 224 --batch_size 16 --output_dir runs/segment --set hidden_size=256

  # publish: the adapter, or one plain model that needs no PEFT
  python training/finetune.py --encoder me/my-encoder --data uoft-cs/cifar10 --output_dir runs/lora \\
      --merge --push_to_hub --repo_id me/my-encoder-cifar10 --license apache-2.0

  # one table over finished runs and the linear probe of training/probe.py
  python training/finetune.py --compare runs/linear runs/lora runs/full results
"""


def _read_bf16(text: str) -> bool | str:
    values: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}
    if text not in values:
        raise ValueError(f"expected auto, true or false, got {text}")
    return values[text]


SETTINGS = (
    Option("--encoder", "folder or Hub id of the encoder", "PATH_OR_ID", type=path_word),
    Option("--data", "Hub id, folder, parquet, ...; with labels (one sub-folder per class)", "SOURCE", type=path_word),
    Option("--task", "what to fine-tune for (below); default: classification", "NAME"),
    Option("--set", "options of the task, as YAML", "NAME=VALUE", setting="task_options", nargs="+"),
    Option("--method", f"{', '.join(METHODS)} (below); default: lora", "METHOD"),
    Option("--output_dir", "checkpoints, results and the finished model/ or adapter/ go here", "DIR", type=path_word),
)
RUN = (
    *SETTINGS,
    Option(
        "--resume",
        "auto (default): go on from the newest checkpoint in DIR, if any",
        "auto|never|PATH",
        type=path_word,
        default="auto",
    ),
    IMPORT,
    Option("--compare", "train nothing: one table over the results in these folders", "DIR", type=path_word, nargs="+"),
)
# Title of a group -> its options; the settings that they give are fields of ``FineTuningSettings``.
OPTIONS: dict[str, tuple[Option, ...]] = {
    "encoder": (
        Option("--pooling", f"what the head reads: {', '.join(POOLINGS)}; default: of its config", "NAME"),
        Option("--image_size", "default: of the image processor beside the encoder", "PIXELS", type=int),
        Option("--drop_path", "stochastic depth in training; default: 0", "P", type=float),
        REVISION,
        SUBFOLDER,
        TRUST_REMOTE_CODE,
    ),
    "data": (
        *SPLIT_OPTIONS,
        *(replace(option, setting="") for option in SOURCE_OPTIONS),
        MAX_BAD_SHARE,
        NUM_WORKERS,
        Option("--crop_scale", "area of crops; default: 0.08 1, small 0.35 1", ("LOW", "HIGH"), type=float, nargs=2),
        Option("--no_flip", "do not mirror training images", setting="flip", switched=False),
    ),
    "training": (
        Option("--epochs", "default: 10", "N", type=float),
        Option("--batch_size", "per process; default: 128", "N", type=int),
        Option("--accumulation", "micro-batches per step; default: 1", "N", type=int),
        Option(
            "--learning_rate",
            "default: the method's (below); a small encoder may want 3 times that",
            "X",
            type=float,
        ),
        Option("--weight_decay", "default: the method's", "X", type=float),
        Option("--layer_decay", "learning rate of a block relative to the next; default: method's", "X", type=float),
        Option("--label_smoothing", "default: the method's", "X", type=float),
        Option("--warmup", "of the steps; default: 0.05", "SHARE", type=float),
        Option("--seed", "default: 0", "N", type=int),
        Option(
            "--bf16",
            "train under bfloat16 autocast; default: auto, where the device has units for it",
            "auto|true|false",
            type=_read_bf16,
            nargs="?",
            default="auto",
        ),
        Option("--eval_steps", "measure every N steps; default: after each epoch", "N", type=int),
        Option("--save_steps", "checkpoint every N steps; default: after each epoch", "N", type=int),
        Option("--keep", "weights that are saved and quoted; default: last", choices=KEEPS),
    ),
    "adapters": (
        Option("--lora_rank", "rank of the matrices; default: 8", "N", type=int),
        Option("--lora_alpha", "adapters count alpha / rank; default: 16", "N", type=int),
        Option("--lora_dropout", "default: 0", "P", type=float),
        Option("--target_modules", "full names of layers; default: all linear maps of all blocks", "REGEX"),
    ),
}
PUBLISHING = (
    Option("--merge", "also write merged/: a plain model that needs no PEFT"),
    Option("--push_to_hub", "publish the adapter, the merged model with --merge, or the model"),
    Option("--repo_id", "where", "OWNER/NAME"),
    Option("--private", "make a new repository private"),
    Option("--license", "an ID as the Hub lists them, or inherit; default: that of encoder and data, if free", "ID"),
    Option("--license_name", "with --license other", "NAME"),
    Option("--license_link", "with --license other: where it is written; default: --license_file", "URL"),
    Option("--license_file", "its text, to lie in the repository", "PATH", type=path_word),
    Option("--base_id", "Hub id under which the encoder is published, if it was given by path", "OWNER/NAME"),
)


_LICENCE = ("license", "license_name", "license_link", "license_file")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all options with their help."""
    methods = "\n".join(
        f"  {name:<8}{method.description.format(head='a head')}; learning rate {method.base_learning_rate:g} x "
        f"sqrt(batch/256), weight decay {method.weight_decay:g}, label smoothing {method.label_smoothing:g}"
        + (f", layer decay {method.layer_decay:g}" if method.layer_decay < 1 else "")
        for name, method in METHODS.items()
    )
    parser = command_parser(
        "finetune.py",
        usage="finetune.py --encoder PATH_OR_ID --data SOURCE --method METHOD --output_dir DIR [options]",
        description=_DESCRIPTION,
        epilog=f"{_TASKS}\nmethods:\n{methods}\n\n{_EXAMPLES}\n{_EXIT_CODES}",
        argument_default=argparse.SUPPRESS,
    )
    add_options(parser, RUN)
    for title, options in OPTIONS.items():
        add_options(parser.add_argument_group(title), options)
    add_options(parser.add_argument_group("publishing"), PUBLISHING)
    return parser


def read_arguments(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Read a command line: fields of ``FineTuningSettings``, and what is done with the run."""
    declared = (*RUN, *chain.from_iterable(OPTIONS.values()), *PUBLISHING)
    return read_options(build_parser().parse_args(argv), declared)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, 2 for what can be mended before training, 1 for a run that stopped, 75 if it was asked to by
        SIGTERM, SIGUSR1 or SIGHUP, 130 if interrupted.
    """
    try:
        import_named(argv)
    except RecipeError as error:
        return stop(error, code=2, speaks=is_first_process())
    options = read_arguments(argv)
    options.pop(IMPORT.key, None)
    command = restate_command("finetune.py", argv)
    log_plainly()
    try:
        with Signals(options.get("output_dir")) as signals:
            return _run(options, command, signals)
    except Preempted as stopped:
        return stop(stopped, code=EXIT_PREEMPTED, word="preempted", speaks=is_first_process())
    except (ValueError, OSError, ImportError) as error:
        return stop(error, code=2, speaks=speaks_for_failure())
    except KeyboardInterrupt:
        reason = "the same command goes on from the last checkpoint."
        return stop(reason, code=130, word="interrupted", speaks=is_first_process())


def _run(options: dict[str, Any], command: str, signals: Signals) -> int:
    if "compare" in options:
        for folder in options["compare"]:
            find_results(folder)  # what is missing is said before torch is imported

        from .report import compare

        say(compare(options["compare"]))
        return 0
    resume = options.pop("resume")
    publish = {name: options.pop(name, None) for name in ("merge", "push_to_hub", "repo_id", "private")}
    answer = {name: options.pop(name, None) for name in _LICENCE}
    settings = _make_settings(options)
    _check_publishing(settings, publish | answer)
    if not os.path.exists(settings.output_dir):  # a run that goes on may be without the encoder that it started from
        load_errors.check_place(settings.encoder)

    publish["licence"] = _check_licence(settings, answer) if publish["push_to_hub"] else None

    from ..encoders.export import check_replaceable
    from ..running.stops import AGREED, STOPS, explain_stops, run_on_all
    from .publish import publish as publish_run
    from .report import comparison_table
    from .run import prepare, train
    from .weights import SAVED_BESIDE

    if publish["merge"]:
        check_replaceable(Path(settings.output_dir) / "merged", also=SAVED_BESIDE)

    try:
        with explain_stops(settings.output_dir):
            run = run_on_all(lambda: prepare(settings, resume), (ValueError, OSError, ImportError))
    except STOPS as error:
        return stop(error, code=1, speaks=speaks_for_failure())
    say(run.summary())
    try:
        records = train(run, command, signals)
    except (*STOPS, ValueError, OSError) as error:
        speaks = speaks_for_failure()  # all ask: the process that answers stays until they have
        return stop(error, code=1, speaks=is_first_process() if isinstance(error, AGREED) else speaks)
    if is_first_process():
        say(comparison_table(records))
        try:
            say(publish_run(run, **publish))
        except (ValueError, OSError) as error:
            return stop(error, code=1, speaks=speaks_for_failure())
    return 0


def read_settings(arguments: argparse.Namespace) -> FineTuningSettings:
    """Read the settings that ``build_parser`` has parsed; what is said of resuming and publishing is left out.

    Raises:
        ValueError: Something is wrong with the words alone, or the data are not where they are said to be.
    """
    return _make_settings(read_options(arguments, (*SETTINGS, *chain.from_iterable(OPTIONS.values()))))


def _make_settings(options: dict[str, Any]) -> FineTuningSettings:
    for name in ("encoder", "data", "output_dir"):
        if not options.get(name):
            raise ValueError(f"--{name} is missing; --help shows an example.")
    if "task_options" in options:
        options["task_options"] = _task_options(options["task_options"])
    settings = FineTuningSettings(**options)
    check_known(settings.task, TASKS, "--task")
    check_place(settings.data)
    return settings


def _task_options(words: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE pairs; values are YAML."""
    from ..utils.strict_yaml import load_yaml

    options: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name or name in options:
            raise ValueError(f"--set {word}: expected NAME=VALUE, each name once.")
        options[name] = load_yaml(value, f"--set {name}")
    return options


def _check_publishing(settings: FineTuningSettings, publish: dict[str, Any]) -> None:
    from ..hub.privacy import is_hub_id

    if settings.base_id is not None and not is_hub_id(settings.base_id):
        raise ValueError(f"--base_id {settings.base_id}: expected a Hub id, OWNER/NAME.")
    if publish["merge"] and not settings.is_adapter:
        raise ValueError(f"--merge: --method {settings.method} leaves a plain model already; leave it out.")
    if not publish["push_to_hub"]:
        for name in ("repo_id", "private", *_LICENCE):
            if publish[name]:
                raise ValueError(f"--{name} belongs to --push_to_hub.")
        return
    if not publish["repo_id"]:
        raise ValueError("--push_to_hub: say where with --repo_id OWNER/NAME.")
    is_public = is_hub_id(settings.base) and not os.path.exists(settings.base)
    if settings.is_adapter and not publish["merge"] and not is_public:
        raise ValueError(
            f"--push_to_hub: others cannot load an adapter whose base is the folder {settings.encoder}. Publish the "
            "encoder and say where with --base_id OWNER/NAME, or publish one plain model with --merge."
        )


def _check_licence(settings: FineTuningSettings, answer: dict[str, Any]) -> Licence:
    """Choose the licence of what will be published.

    Raises:
        ValueError: The publisher has to say it, or what they say cannot be.
    """
    from ..hub.licences import choose_licence
    from ..hub.terms import find_terms

    terms = (
        *find_terms("weights", settings.encoder, revision=settings.revision),
        *find_terms("data", settings.data),
    )
    name, link, copy = (answer[f"license_{part}"] for part in ("name", "link", "file"))
    licence = choose_licence(terms, answer["license"], name=name, link=link, copy=copy)
    licence.require_answer()
    return licence
