"""Whether the files of a checkpoint still hold what was written: by checksums, in older ones by whether they parse."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

_CHUNK = 1 << 22
# What a file has been read as, by what changes when it is written to: each is read once by a process.
_KNOWN: dict[tuple[int, ...], str] = {}
_PARSED: dict[tuple[int, ...], str | None] = {}


def checksums(folder: Path, names: list[str]) -> dict[str, str]:
    """Compute the CRC-32 of each file, as eight hexadecimal digits: 2 GB/s, and more where there are several files.

    Raises:
        OSError: A file cannot be read.
    """
    with ThreadPoolExecutor() as pool:  # zlib computes outside of Python's lock
        return dict(zip(names, pool.map(_checksum, [folder / name for name in names]), strict=True))


def find_damage(folder: Path, names: list[str], known: Mapping[str, str]) -> str | None:
    """Say which of the files ``names`` is not what was written, and why; ``None`` if all are.

    Args:
        folder: Folder of the checkpoint.
        names: Files that it lists.
        known: Name -> checksum. Files without one, of older checkpoints, are opened as far as their type allows.
    """
    try:
        found = checksums(folder, [name for name in names if name in known])
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for name, value in found.items():
        if value != known[name]:
            return f"{folder / name} is not what was written: its checksum is {value}, and was {known[name]}"
    for name in names:
        if name not in known and (reason := _parse_error(folder / name)) is not None:
            return f"{folder / name} is damaged ({reason})"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        key = _state(os.fstat(file.fileno()))
        if key not in _KNOWN:
            value = 0
            while chunk := file.read(_CHUNK):
                value = zlib.crc32(chunk, value)
            _KNOWN[key] = f"{value:08x}"
        return _KNOWN[key]


def _state(about: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written to."""
    return about.st_dev, about.st_ino, about.st_mtime_ns, about.st_size


def _parse_error(path: Path) -> str | None:
    """Say why a file is not of the type that its name says; ``None`` if it is, and for types that nobody knows."""
    try:
        key = _state(path.stat())
        if key not in _PARSED:
            _PARSED[key] = _parse(path)
        return _PARSED[key]
    except OSError as error:  # which may be over the next time
        return str(error) or type(error).__name__


def _parse(path: Path) -> str | None:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
        elif path.suffix in (".pt", ".pth", ".distcp") and path.stat().st_size:
            with zipfile.ZipFile(path) as archive:  # as torch saves, with a checksum of each part
                if (part := archive.testzip()) is not None:
                    return f"{part} in it is not what was written"
    except (ValueError, SafetensorError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return None
