"""Repositories on the Hub: built whole with their card, checked and pushed.

Names are imported when they are first used, so that a push does not load what building a repository needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy_names import import_when_used

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

__getattr__, __dir__ = import_when_used(
    __name__,
    __all__,
    {
        "PARTS": "repository",
        "PublishError": "publishable",
        "build_repository": "repository",
        "check_publishable": "publishable",
        "push_repository": "push",
    },
)
