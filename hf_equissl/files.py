"""Files that are whole or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def move_into_place(source: Path, target: Path) -> None:
    """Rename a complete folder to its final name. What stood there is moved aside first and deleted last."""
    aside = target.with_name(f".old-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    source.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: readers see the old or the new content, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text)
    os.replace(staging, path)
