"""What people may write as a value, wherever it is read: finite, of a size that means something, not without end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .suggestions import RecipeError

DEEPEST = 32
MOST_VALUES = 100_000  # in one recipe; an alias that repeats aliases makes far more of a few lines
LARGEST = 2**63 - 1
LONGEST_SHOWN = 80
_LONG_WORD = re.compile(r"\S{1000,}")
_WORDS = {None: "null", True: "true", False: "false"}
# NUL, which no path can hold, and halves of characters, except those that stand for bytes of names that are not UTF-8.
_NO_CHARACTER = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


def shorten(value: Any) -> str:
    """Write a value for a message, as YAML has it, cut where it is long; very long integers do not print at all."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"an integer of {value.bit_length()} bits"
    text = _WORDS[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def shorten_words(text: str) -> str:
    """Cut the words of a message that are longer than a path would be, such as a pasted value that it repeats."""
    return _LONG_WORD.sub(lambda word: f"{word[0][:LONGEST_SHOWN]}…", text)


def check_plain(value: Any, where: str) -> None:
    """Refuse plain data (mappings, lists, scalars) that no setting can mean.

    Args:
        value: As YAML or a caller gives it.
        where: Its place, for messages; keys and positions are added to it.

    Raises:
        RecipeError: A number is not finite or exceeds 64 bits, a text has characters that no file or name can have, or
            lists and mappings are nested without end.
    """
    queue: list[tuple[Any, str, int]] = [(value, where, 0)]
    seen = 0
    while queue:
        item, place, depth = queue.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST_VALUES:
            raise RecipeError(f"{where}: lists and mappings are nested too deeply, or hold too many values.")
        if isinstance(item, Mapping):
            queue += [(each, f"{place}.{key}" if place else str(key), depth + 1) for key, each in item.items()]
        elif isinstance(item, list | tuple):
            queue += [(each, f"{place}.{index}", depth + 1) for index, each in enumerate(item)]
        else:
            _check_scalar(item, place)


def _check_scalar(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: expected a finite number, got {value}.")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise RecipeError(f"{where}: expected an integer of at most 64 bits, got {shorten(value)}.")
    if isinstance(value, str) and _NO_CHARACTER.search(value):
        raise RecipeError(f"{where}: {shorten(value)} has a character that no text can have.")
