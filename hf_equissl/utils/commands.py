"""What the command lines share: how they are parsed, who speaks, what they say and how they end. Needs no torch."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .files import expand_home
from .plain_values import check_plain, shorten, shorten_words
from .redaction import drop_secrets, redact, redact_messages
from .suggestions import RecipeError

# Script -> the command that stands for it, where the scripts were not started themselves.
_NAMES: dict[str, str] = {}
_SCRIPT = re.compile(
    r"(?P<launch>accelerate launch [^\n`#]*?(?:\\\n\s*)?)?(?:(?P<folder>(?:python )?training/)|(?<![\w/.]))"
    r"(?P<script>\w+)\.py\b"
)
_KINDS = {int: "an integer", float: "a number"}


def command_parser(prog: str, **options: Any) -> argparse.ArgumentParser:
    """Make the parser of a command, which from here on repeats no secret, whatever goes wrong.

    It keeps the line breaks of its texts and takes no abbreviated option and no value without sense: numbers are
    finite and fit into 64 bits, texts are not empty (``--data "$FOLDER"`` with a variable that is not set would read
    the current folder).
    """
    redact_messages()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog=prog, formatter_class=formatter, allow_abbrev=False, **options)
    for kind in (int, float, str, None):  # None: options without a type
        parser.register("type", kind, partial(_read_word, kind or str))
    return parser


class _Parser(argparse.ArgumentParser):
    """Repeats no secret when it says what is wrong with the words of a command.

    Args:
        epilog: Text at the end of the help, or what makes it, which is then asked when help is shown.
    """

    def __init__(self, *, epilog: str | Callable[[], str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._epilog = epilog

    def format_help(self) -> str:
        """Write the help, with its end."""
        self.epilog = self._epilog() if callable(self._epilog) else self._epilog
        return super().format_help()

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(redact(_name_commands(message)), file)


def call_scripts(names: Mapping[str, str]) -> None:
    """Name scripts as their user does, from here on, in whatever a command says.

    Args:
        names: Script -> the command that stands for it, such as ``{"pretrain.py": "hf-equissl pretrain"}``.
    """
    _NAMES.update(names)


def _name_commands(text: str) -> str:
    """Put the names of commands in place of scripts; a launcher starts their module."""
    if not _NAMES:
        return text

    def named(found: re.Match[str]) -> str:
        launch, script = found["launch"], found["script"]
        name = _NAMES.get(f"{script}.py")
        if launch:
            return f"{launch}-m hf_equissl.training.{script}"
        if name is None and found["folder"] is None:
            return found[0]
        return name or f"python -m hf_equissl.training.{script}"

    return _SCRIPT.sub(named, text)


def _read_word(kind: type, word: str) -> Any:
    """Make an option's value of a word, as ``type=kind`` does.

    Raises:
        argparse.ArgumentTypeError: It says what is wrong.
    """
    if not word:
        raise argparse.ArgumentTypeError("the value is empty. Give one, or leave the option out.")
    try:
        value = kind(word)
        check_plain(value, "")
    except RecipeError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected {_KINDS[kind]}, got {shorten(word)}.") from error
    return value


def any_text(word: str) -> str:
    """Read a word as it is: the type of options that an empty text means something to."""
    return word


def path_word(word: str) -> str:
    """Read a word that is or may be a path, whose ``~`` is expanded here and nowhere later: the type of such options.

    Shells leave the ``~`` of ``--output_dir=~/runs`` as it is, and so does whoever starts a command from Python.
    """
    try:
        return expand_home(_read_word(str, word))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """List the options that ``parser`` knows, as they are typed."""
    return [name for action in parser._actions for name in action.option_strings]


def check_at_least(options: argparse.Namespace, **least: int) -> None:
    """Refuse numbers that are too small; of an option with several numbers, the smallest one.

    Raises:
        RecipeError: It names the option, the number and the ``least`` one.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        value = min(value) if isinstance(value, list) else value
        if value < bound:
            raise RecipeError(f"--{name} {value}: expected at least {bound}.")


def restate_command(script: str, argv: Sequence[str] | None) -> str:
    """Write a command as it was typed, without secrets: paths stay relative where they were."""
    start = shlex.split(_NAMES.get(script, f"python training/{script}"))
    return shlex.join([*start, *drop_secrets(sys.argv[1:] if argv is None else argv)])


def log_plainly() -> None:
    """Let the library's log messages appear as plain lines, without those of the HTTP client."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def is_first_process() -> bool:
    """Return whether a launcher started this process as the first of a run; also without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print ``text`` at once, on the first process of a run."""
    if is_first_process() and text:
        print(redact(_name_commands(text)), flush=True)


def stop(reason: BaseException | str, code: int, *, word: str = "error", speaks: bool = True) -> int:
    """Say on the error stream why a command ends, unless another process ``speaks``; returns ``code``."""
    if speaks:
        end_bars()
        # Another process may have left its bar in the line.
        print(
            redact(f"{'' if is_first_process() else chr(10)}{word}: {shorten_words(_name_commands(str(reason)))}"),
            file=sys.stderr,
            flush=True,
        )
    return code


def end_bars() -> None:
    """End the line of each progress bar, so that a message stands alone on its own and no bar is drawn behind it."""
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
