"""Finds the command that the first word names, and hands it the others. Imports no torch itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from ..utils.commands import call_scripts, command_parser, stop
from ..utils.suggestions import RecipeError, check_known
from ..utils.versions import __version__


class Command(NamedTuple):
    """A command: where its code is, below this package, and what it does in a few words."""

    module: str
    text: str


COMMANDS = {
    "pretrain": Command("training.pretrain", "pretrain an encoder from a recipe"),
    "probe": Command("training.probe", "measure frozen encoders: transformations, linear probe, neighbours"),
    "evaluate": Command("training.evaluate_encoder", "run a suite of tasks on encoders, and write one report"),
    "finetune": Command("training.finetune", "fine-tune an encoder: all weights, a head, LoRA or DoRA adapters"),
    "extract": Command("training.extract_features", "write the features of a large set of images to shards"),
    "convert": Command(
        "training.convert", "turn an encoder into another form: EquiSSL, stock model, ONNX, torch.export"
    ),
    "push": Command("training.push_to_hub", "publish a run on the Hub, or look at what would be published"),
    "plan": Command("training.plan", "memory, traffic and time of a recipe on a cluster"),
    "benchmark": Command("training.benchmark", "time a recipe's training step and its loader"),
    "sweep": Command("training.sweep", "run the members of a sweep one after another"),
    "compare": Command("training.compare", "train the systems of a sweep, probe each, and put all in one table"),
    "report": Command("training.report", "put the results of several encoders into one table, with differences"),
    "demo": Command(
        "demo.cli",
        "look at what the two small encoders see that come with the package: pictures, or an app in the browser",
    ),
    "recipes": Command("console.recipes", "list the recipes that ship, or print one with all its values"),
    "env": Command("console.environment", "what a bug report needs: versions, devices, cores, memory"),
}
EPILOG = """\
`hf-equissl COMMAND --help` shows the options of a command. To train on several processes, start the script that is
behind the command: accelerate launch -m hf_equissl.training.pretrain ...
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; ends the process with the command's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.text}" for name, command in COMMANDS.items())
    parser = command_parser(
        "hf-equissl",
        usage="hf-equissl COMMAND [options]",
        description="Self-supervised vision encoders that keep where and how things are, not only what they are.",
        epilog=f"commands:\n{listed}\n\n{EPILOG}",
    )
    parser.add_argument("--version", action="version", version=f"hf-equissl {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of those below; begin with demo")
    if not words:
        parser.print_help()
        sys.exit(2)
    name = parser.parse_args(words[:1]).command
    try:
        check_known(name, COMMANDS, "hf-equissl")
    except RecipeError as error:
        sys.exit(stop(error, code=2))
    scripts = {
        f"{other.module.rpartition('.')[2]}.py": f"hf-equissl {each}"
        for each, other in COMMANDS.items()
        if other.module.startswith("training.")
    }
    call_scripts(scripts)
    module = import_module(f"..{COMMANDS[name].module}", __package__)
    try:
        if hasattr(module, "launch"):  # it ends processes of its own
            module.launch(words[1:])
        sys.exit(module.main(words[1:]))
    except BrokenPipeError:  # whoever reads has seen enough: `hf-equissl recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
