"""The command line of ``training/finetune.py``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..distributed.signals import EXIT_PREEMPTED, Preempted, Signals, speaks_for_failure
from ..utils.commands import command_parser, is_first_process, log_plainly, path_word, say, stop, typed_command
from .settings import KEEPS, METHODS, POOLINGS, FineTuningSettings

_DESCRIPTION = """\
Fine-tune an encoder for image classification, or for another task: all weights, a head alone, or LoRA / DoRA adapters.
Encoders are EquiSSL ones and everything that AutoModelForImageClassification loads (DINOv2, ViT, ...), or for dense
tasks AutoBackbone. Everything that can be wrong is checked before the first step; a run that was stopped goes on where
it was when the command is given again."""
_TASKS = """\
tasks:
  classification         one of several classes for an image
  semantic_segmentation  a class for every pixel: images/train/*.jpg with masks/train/*.png, val beside train, and
                         classes.json; or a data set with a column of masks and --set classes=150. Further options:
                         ignore_index, reduce_labels, mask_column, hidden_size, layers
  Others can be registered: hf_equissl.finetuning.TASKS.
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
      --merge --push_to_hub --repo_id me/my-encoder-cifar10 --private

  # one table over finished runs and the linear probe of training/probe.py
  python training/finetune.py --compare runs/linear runs/lora runs/full results
"""


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
    add = parser.add_argument
    add("--encoder", type=path_word, metavar="PATH_OR_ID", help="folder or Hub id of the encoder")
    add(
        "--data",
        type=path_word,
        metavar="SOURCE",
        help="Hub id, folder, parquet, ...; with labels (one sub-folder per class)",
    )
    add("--task", metavar="NAME", help="what to fine-tune for (below); default: classification")
    add("--set", dest="task_options", nargs="+", metavar="NAME=VALUE", help="options of the task, as YAML")
    add("--method", metavar="METHOD", help=f"{', '.join(METHODS)} (below); default: lora")
    add(
        "--output_dir",
        type=path_word,
        metavar="DIR",
        help="checkpoints, results and the finished model/ or adapter/ go here",
    )
    add(
        "--resume",
        type=path_word,
        metavar="auto|never|PATH",
        help="auto (default): go on from the newest checkpoint in DIR, if any",
    )
    add(
        "--compare",
        nargs="+",
        type=path_word,
        metavar="DIR",
        help="train nothing: one table over the results in these folders",
    )
    _add_encoder_options(parser.add_argument_group("encoder").add_argument)
    _add_data_options(parser.add_argument_group("data").add_argument)
    _add_training_options(parser.add_argument_group("training").add_argument)
    add = parser.add_argument_group("adapters").add_argument
    add("--lora_rank", type=int, metavar="N", help="rank of the matrices; default: 8")
    add("--lora_alpha", type=int, metavar="N", help="adapters count alpha / rank; default: 16")
    add("--lora_dropout", type=float, metavar="P", help="default: 0")
    add("--target_modules", metavar="REGEX", help="full names of layers; default: all linear maps of all blocks")
    add("--merge", action="store_true", help="also write merged/: a plain model that needs no PEFT")
    add = parser.add_argument_group("publishing").add_argument
    add("--push_to_hub", action="store_true", help="publish the adapter, the merged model with --merge, or the model")
    add("--repo_id", metavar="OWNER/NAME", help="where")
    add("--private", action="store_true", help="make a new repository private")
    add("--base_id", metavar="OWNER/NAME", help="Hub id under which the encoder is published, if it was given by path")
    return parser


def _add_encoder_options(add: Any) -> None:
    add("--pooling", metavar="NAME", help=f"what the head reads: {', '.join(POOLINGS)}; default: of its config")
    add("--image_size", type=int, metavar="PIXELS", help="default: of the image processor beside the encoder")
    add("--drop_path", type=float, metavar="P", help="stochastic depth in training; default: 0")
    add("--revision", metavar="NAME", help="of an encoder from the Hub")
    add("--subfolder", metavar="NAME", help="of its repository, e.g. native")
    add("--trust_remote_code", action="store_true", help="let code beside the weights run")


def _add_data_options(add: Any) -> None:
    add("--train_split", metavar="NAME", help="default: train")
    add("--test_split", metavar="NAME", help="default: test, validation or val; without one, a tenth is held out")
    add("--train_images", type=int, metavar="N", help="fixed random subset; default: all")
    add("--test_images", type=int, metavar="N", help="likewise")
    add("--image_column", metavar="NAME", help="default: found by its type")
    add("--label_column", metavar="NAME", help="default: found by its type")
    add("--config_name", metavar="NAME", help="configuration of a Hub data set")
    add("--max_bad_share", type=float, metavar="SHARE", help="of images that may fail to decode; default: 0.01")
    add("--num_workers", type=int, metavar="N", help="processes that decode; default: 0")
    add(
        "--crop_scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="area of crops; default: 0.08 1, small 0.35 1",
    )
    add("--no_flip", dest="flip", action="store_false", help="do not mirror training images")


def _add_training_options(add: Any) -> None:
    add("--epochs", type=float, metavar="N", help="default: 10")
    add("--batch_size", type=int, metavar="N", help="per process; default: 128")
    add("--accumulation", type=int, metavar="N", help="micro-batches per step; default: 1")
    add(
        "--learning_rate",
        type=float,
        metavar="X",
        help="default: the method's (below); a small encoder may want 3 times that",
    )
    add("--weight_decay", type=float, metavar="X", help="default: the method's")
    add(
        "--layer_decay",
        type=float,
        metavar="X",
        help="learning rate of a block relative to the next; default: method's",
    )
    add("--label_smoothing", type=float, metavar="X", help="default: the method's")
    add("--warmup", type=float, metavar="SHARE", help="of the steps; default: 0.05")
    add("--seed", type=int, metavar="N", help="default: 0")
    add(
        "--bf16",
        nargs="?",
        const=True,
        type=_read_bf16,
        default="auto",
        metavar="auto|true|false",
        help="train under bfloat16 autocast; default: auto, where the device has units for it",
    )
    add("--eval_steps", type=int, metavar="N", help="measure every N steps; default: after each epoch")
    add("--save_steps", type=int, metavar="N", help="checkpoint every N steps; default: after each epoch")
    add("--keep", choices=KEEPS, help="weights that are saved and quoted; default: last")


def _read_bf16(text: str) -> bool | str:
    values: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}
    if text not in values:
        raise argparse.ArgumentTypeError(f"expected auto, true or false, got {text}")
    return values[text]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0, 2 for what can be mended before training, 1 for a run that stopped, 75 if it was asked to by
        SIGTERM, SIGUSR1 or SIGHUP, 130 if interrupted.
    """
    options = vars(build_parser().parse_args(argv))
    command = typed_command("finetune.py", argv)
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
    from .report import compare

    if "compare" in options:
        say(compare(options["compare"]))
        return 0
    resume = options.pop("resume", "auto")
    publish = {name: options.pop(name, None) for name in ("merge", "push_to_hub", "repo_id", "private")}
    for name in ("encoder", "data", "output_dir"):
        if not options.get(name):
            raise ValueError(f"--{name} is missing; --help shows an example.")
    if "task_options" in options:
        options["task_options"] = _task_options(options["task_options"])
    settings = FineTuningSettings(**options)
    _check_publishing(settings, publish)

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
        for name in ("repo_id", "private"):
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
