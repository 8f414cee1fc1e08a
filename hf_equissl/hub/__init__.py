"""Repositories on the Hub: built whole with their card, checked and pushed.

Names are imported when they are first used, so that a push does not load what building a repository needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "PARTS": "repository",
    "PublishError": "publishable",
    "build_repository": "repository",
    "check_publishable": "publishable",
    "push_repository": "push",
}

__all__ = [
    "PARTS",
    "PublishError",
    "build_repository",
    "check_publishable",
    "push_repository",
]

if TYPE_CHECKING:
    from .publishable import PublishError, check_publishable
    from .push import push_repository
    from .repository import PARTS, build_repository


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
