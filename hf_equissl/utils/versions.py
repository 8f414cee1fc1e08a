"""Versions of the libraries that results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

__version__ = "0.1.0.dev0"
LIBRARIES = ("hf-equissl", "torch", "transformers", "datasets", "numpy", "pillow")


def library_versions(also: tuple[str, ...] = ()) -> dict[str, str]:
    """Read the versions of Python, of ``LIBRARIES`` and of the distributions ``also``, where they are installed."""
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, *also):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
