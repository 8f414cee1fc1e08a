"""Whether an encoder to start from or to convert is where it is said to be. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..utils.files import expand_home
from ..utils.load_errors import LoadError, check_place

_SUFFIXES = (".pth", ".pt")
# Beside a model on this machine, and never published: what it was made of, as it was given.
BASE_FILE = ".base"
# What measurements name in place of an encoder (``references``).
RAW_PIXELS = "raw_pixels"
_UNTRAINED = re.compile(r"untrained(?:@(?P<seed>\d+))?:(?P<source>.+)", re.DOTALL)


def is_upstream_file(source: Any) -> bool:
    """Return whether a source is a ``.pth`` or ``.pt`` file rather than a folder, a Hub id or a model."""
    return isinstance(source, (str, Path)) and str(source).lower().endswith(_SUFFIXES) and not Path(source).is_dir()


def check_source(source: str | Path) -> None:
    """Refuse a path at which there is neither a folder nor a ``.pth`` file; a name of the Hub passes.

    Raises:
        LoadError: It says what was expected there.
    """
    if not is_upstream_file(source):
        check_place(source)
    elif not Path(source).exists():
        raise LoadError(f"No file at {str(source)!r}: expected a checkpoint of iBOT, DINO or DINOv2.")


def is_raw_pixels(source: str | Path) -> bool:
    """Return whether ``source`` names the pixels themselves; a folder of that name is written ``./raw_pixels``."""
    return str(source) == RAW_PIXELS


def split_untrained(source: str | Path) -> tuple[str, int] | None:
    """Read ``untrained:PATH_OR_ID`` and ``untrained@SEED:PATH_OR_ID``: where the architecture is, and the seed (0).

    ``None`` for any other name.
    """
    match = _UNTRAINED.fullmatch(str(source))
    return (match["source"], int(match["seed"] or 0)) if match else None


def check_measured(source: str) -> None:
    """Refuse what is to be measured where it names a path at which nothing lies.

    Raises:
        LoadError: It says what loading it would say.
    """
    if not is_raw_pixels(source):
        found = split_untrained(source)
        check_place(source if found is None else expand_home(found[0]))
