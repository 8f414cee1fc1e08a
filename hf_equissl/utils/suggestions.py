"""Errors for mistakes in what people write, with the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_LIST = 40  # an error that lists more keys hides what it says


class RecipeError(ValueError):
    """Something in a recipe or on the command line is wrong; the message says what, where and what to do."""


def find_nearest(name: str, valid: Iterable[str]) -> str | None:
    """Find the member of ``valid`` that ``name`` was probably meant to be; ``None`` if none is like it."""
    matches = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest member of ``valid``; nothing if none is like ``name``."""
    guess = find_nearest(name, valid)
    return f" Did you mean {guess!r}?" if guess else ""


def check_known(name: str, valid: Iterable[str], where: str) -> None:
    """Refuse a name that is not among the ``valid`` ones.

    Raises:
        RecipeError: It says ``where`` the name stands (an option, a key, a registry), the nearest one and all of them.
    """
    valid = list(valid)
    if name not in valid:
        raise RecipeError(
            f"{where}: there is no {name!r}.{did_you_mean(name, valid)} Valid: {', '.join(valid) or 'none'}."
        )


def check_keys(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Refuse keys that mean nothing.

    Raises:
        RecipeError: It names the first unknown key, its nearest neighbour and the valid ones; where those are very
            many, the ones that look alike.
    """
    valid = list(valid)
    for key in given:
        if key not in valid:
            listed = f"Valid keys: {', '.join(sorted(valid))}."
            if len(valid) > LONGEST_LIST:
                close = difflib.get_close_matches(key, valid, n=10, cutoff=0.4)
                listed = f"Close ones of the {len(valid)} valid keys: {', '.join(close) or 'none'}."
            raise RecipeError(f"{where}: unknown key {key!r}.{did_you_mean(key, valid)} {listed}")
