"""Files that are written whole or not at all, and sizes for people."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def expand_home(path: str | os.PathLike[str]) -> str:
    """Put the home folder in place of a ``~`` at the beginning, as shells do; any other text stays as it is.

    Raises:
        ValueError: It is the home of a user that does not exist: taken literally, a folder called so would appear.
    """
    path = os.fspath(path)
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition(os.sep)[0]
        raise ValueError(f"{path}: there is no home folder {user} here. If the name begins so, write ./{path}.")
    return expanded


def move_into_place(source: Path, target: Path) -> None:
    """Rename a complete folder to its final name. A folder of that name is moved aside first and deleted last."""
    aside = target.with_name(f".old-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    source.rename(target)
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old or the new content, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text, encoding="utf-8")
    sync_to_disk(staging)  # else a loss of power may leave the new name with nothing in it
    os.replace(staging, path)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or all files and folders below a folder, would survive a loss of power."""
    for entry in sorted(path.rglob("*"), reverse=True) if path.is_dir() else []:
        _sync(entry)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every file system can do it for folders
            raise
    finally:
        os.close(handle)


def readable_size(count: float) -> str:
    """Write a number of bytes for people, e.g. "61.2 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
