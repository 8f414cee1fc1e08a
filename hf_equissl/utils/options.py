"""Options of commands as data: declared once, added to a parser, read back as settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol


class _TakesOptions(Protocol):
    """A parser or a group of one."""

    def add_argument(self, *names: str, **settings: Any) -> Any: ...


@dataclass(frozen=True)
class Option:
    """One option of a command, and which setting it gives.

    Attributes:
        flag: Such as "--train_split".
        help: What ``--help`` says; it names the default, which lies with the setting.
        metavar: What stands for the value; ``None`` makes the option a switch.
        setting: Keyword that receives the value; "" for the flag's own name.
        type: Makes the value of a word; a ``ValueError`` of it ends the command with its text.
        nargs: How many words, as argparse counts them; ``None`` for one.
        choices: The words that are allowed; empty for all.
        repeated: Whether the option may be given several times, each value an entry of a list.
        default: The setting where the option is not given; ``None``: there is none, and its receiver's default holds.
        switched: The setting of a switch that is given, or of an option that takes words and is given without.
        required: Whether the command ends without it.
    """

    flag: str
    help: str
    metavar: str | tuple[str, ...] | None = None
    setting: str = ""
    type: Callable[[str], Any] = str
    nargs: int | str | None = None
    choices: tuple[str, ...] = ()
    repeated: bool = False
    default: Any = None
    switched: Any = True
    required: bool = False

    @property
    def key(self) -> str:
        """Name of the setting."""
        return self.setting or self.flag.lstrip("-")

    def add_to(self, group: _TakesOptions) -> None:
        """Declare the option. Where it is not given, the parsed arguments have no such name."""
        rest: dict[str, Any] = {"dest": self.flag.lstrip("-"), "default": argparse.SUPPRESS, "help": self.help}
        if self.metavar is None and not self.choices:
            group.add_argument(self.flag, action="store_const", const=self.switched, **rest)
            return
        rest |= {"metavar": self.metavar, "type": _keep_error_text(self.type), "nargs": self.nargs}
        rest |= {"choices": self.choices} if self.choices else {}
        rest |= {"const": self.switched} if self.nargs == "?" else {}
        rest |= {"required": True} if self.required else {}
        group.add_argument(self.flag, action="append" if self.repeated else "store", **rest)


def _keep_error_text(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap ``convert`` so that argparse shows the text of its ``ValueError``, and not its name alone."""
    if isinstance(convert, type):
        return convert

    def converted(word: str) -> Any:
        try:
            return convert(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted


def add_options(group: _TakesOptions, options: Iterable[Option]) -> None:
    """Declare several options, an equal one once.

    Raises:
        ValueError: two options share a flag and differ otherwise.
    """
    known: dict[str, Option] = {}
    for option in options:
        if known.setdefault(option.flag, option) != option:
            raise ValueError(f"Two different options are called {option.flag}: {known[option.flag]} and {option}.")
    for option in known.values():
        option.add_to(group)


def read_options(arguments: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """Return the settings that these options give: what was typed, else the default; absent without either."""
    found = {option.key: getattr(arguments, option.flag.lstrip("-"), option.default) for option in options}
    return {key: value for key, value in found.items() if value is not None}


def read_value_range(word: str) -> Any:
    """Read ``full``, ``auto`` or two numbers, ``[0, 4095]`` or ``0,4095``; the decoder says what is allowed.

    Raises:
        ValueError: It is none of them.
    """
    if word in ("full", "auto"):
        return word
    try:
        low, high = (float(number) for number in word.strip("[] ").split(","))
    except ValueError:
        raise ValueError(f"expected full, auto or two numbers such as [0, 4095], got {word!r}") from None
    return low, high


# How a source of images is read; the settings are those of ``hf_equissl.data.load_images``.
SOURCE_OPTIONS = (
    Option("--image_column", "default: found by its type", "NAME", setting="column"),
    Option("--label_column", "default: found by its type", "NAME"),
    Option("--config_name", "configuration of a Hub data set", "NAME"),
    Option(
        "--value_range",
        "which stored values of more than 8 bits become black and white: full (of their type; default), auto (each "
        "image's own), or two numbers, e.g. [0,4095]",
        "RANGE",
        type=read_value_range,
    ),
    Option("--max_pixels", "larger images are refused; default: 178956970", "N", type=int),
)
STREAMING = Option("--streaming", "read the source as a stream, shard by shard: nothing is downloaded or converted")
MAX_BAD_SHARE = Option(
    "--max_bad_share", "of images that may fail to decode; they are left out and named; default: 0.01", "SHARE",
    type=float,
)  # fmt: skip
NUM_WORKERS = Option("--num_workers", "processes that decode; default: 0", "N", type=int)
# How an encoder is loaded.
REVISION = Option("--revision", "branch, tag or commit of an encoder from the Hub", "NAME")
SUBFOLDER = Option("--subfolder", "of the encoder's folder or repository, e.g. native", "NAME")
TRUST_REMOTE_CODE = Option("--trust_remote_code", "let code beside the weights run")
# What a probe or a classifier is fitted on and judged by.
SPLIT_OPTIONS = (
    Option("--train_split", "default: train", "NAME"),
    Option("--test_split", "default: test, validation or val; without one, a tenth is held out", "NAME"),
    Option("--train_images", "fixed random subset; default: all", "N", type=int),
    Option("--test_images", "likewise", "N", type=int),
)
