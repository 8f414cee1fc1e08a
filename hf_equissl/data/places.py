"""Whether a source of images is where it is said to be, as far as that needs neither ``datasets`` nor the network."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import ImageSourceError

# Suffix of the files of a data set -> the builder of ``datasets`` that reads them.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_PATTERN_SIGNS = "*?[{"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def check_place(source: str) -> None:
    """Refuse a path or a pattern that names nothing here; addresses and names of the Hub pass.

    Raises:
        ImageSourceError: There is no such file or folder, or no file matches.
    """
    if "://" in source:
        expand_range(source, source)
    elif is_pattern(source):
        match_pattern(source)
    elif not Path(source).exists():
        check_hub_name(source)


def is_pattern(source: str) -> bool:
    """Whether a source stands for the files that match it: a name that exists is itself."""
    return any(sign in source for sign in _PATTERN_SIGNS) and not Path(source).exists()


def match_pattern(source: str) -> tuple[Path, list[str]]:
    """Split a pattern into the folder that exists, whatever signs its name holds, and the patterns below it.

    Raises:
        ImageSourceError: No file matches one of them.
    """
    path = Path(source)
    folder = next(folder for folder in path.parents if folder.exists())
    pattern = str(path.relative_to(folder))
    patterns = expand_range(source, pattern)
    for each in patterns:
        if next(folder.glob(each), None) is None:
            missing = source if each == pattern else str(folder / each)
            raise ImageSourceError(f"{missing}: no file matches this pattern, seen from {Path.cwd()}.")
    return folder, patterns


def expand_range(source: str, pattern: str) -> list[str]:
    """List the names that ``shard-{000..146}.tar`` stands for: as many digits as its first number has.

    Raises:
        ImageSourceError: The range is empty.
    """
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if int(first) > int(last):
        raise ImageSourceError(f"{source}: {found[0]} is empty. Write the smaller number first.")
    tails = expand_range(source, pattern[found.end() :])
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [pattern[: found.start()] + number + tail for number in numbers for tail in tails]


def check_hub_name(source: str) -> None:
    """Refuse what can only be meant as a path, without asking the network.

    Raises:
        ImageSourceError: It is no name of a data set on the Hub.
    """
    looks_local = source.startswith(("/", ".", "~")) or source.count("/") > 1 or Path(source).suffix.lower() in BUILDERS
    if looks_local or "\\" in source:
        raise ImageSourceError(
            f"{source}: no such file or folder, seen from {Path.cwd()}, and not the name of a data set on the Hub "
            "(owner/name)."
        )
