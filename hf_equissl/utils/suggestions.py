"""Errors for mistakes in what people write, with the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_LIST = 40  # an error that lists more keys hides what it says


class RecipeError(ValueError):
    """Something in a recipe or on the command line is wrong; the message says what, where and what to do."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The member of ``valid`` that ``name`` was probably meant to be, or ``None``."""
    matches = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def check_keys(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Refuse keys that mean nothing.

    Raises:
        RecipeError: names the first unknown key, its nearest neighbour and the valid ones, or where they are very
            many those that look alike.
    """
    valid = list(valid)
    for key in given:
        if key not in valid:
            guess = nearest(key, valid)
            hint = f" Did you mean {guess!r}?" if guess else ""
            if len(valid) > LONGEST_LIST:
                close = difflib.get_close_matches(key, valid, n=10, cutoff=0.4)
                listed = f"Close ones of the {len(valid)} valid keys: {', '.join(close) or 'none'}."
            else:
                listed = f"Valid keys: {', '.join(sorted(valid))}."
            raise RecipeError(f"{where}: unknown key {key!r}.{hint} {listed}")
