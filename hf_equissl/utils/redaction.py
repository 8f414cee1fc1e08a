"""Remove access tokens from a run's record and from everything that is published."""

from __future__ import annotations

import re
from collections.abc import Iterable

# User, organisation, OAuth and job tokens of the Hub.
TOKEN = re.compile(r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{16,}\b|hf_(?:oauth|jwt)_[\w.-]{16,})")
# Names of settings and options whose value is a secret; "mask_token" is not one of them.
SECRET_NAME = re.compile(r"(^|[.-])((hub|hf|access|auth|api)_)?(token|password|secret|key)$|api_?key$", re.IGNORECASE)


def without_tokens(text: str) -> str:
    """Replace every token in ``text`` by "removed"."""
    return TOKEN.sub("removed", text)


def without_secrets(words: Iterable[str]) -> list[str]:
    """Drop options with a secret from the words of a command line, and remove tokens from the others."""
    kept: list[str] = []
    of_secret = False  # the word before was the name of a secret
    for word in words:
        is_option = word.startswith("-")
        if of_secret and not is_option:
            of_secret = False
            continue
        name, equals, _ = word.lstrip("-").partition("=")
        is_secret = is_option and bool(SECRET_NAME.search(name))
        of_secret = is_secret and not equals
        if not is_secret:
            kept.append(without_tokens(word))
    return kept
