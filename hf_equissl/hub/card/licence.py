"""What a card says of its licence: which one, who says so, and the terms of what the weights were made of."""

from __future__ import annotations

from ...utils.markdown import code, plain
from ..licences import LICENCE_FILE, Licence
from ..terms import UNKNOWN, Terms

# What is published -> what its parts are called.
_PARTS = {
    "Weights": {"weights": "base weights", "data": "training images"},
    "Features": {"weights": "the encoder", "data": "images"},
}


def describe_licence(licence: Licence, what: str = "Weights") -> str:
    """Write the sentences of a card about its licence; ``what`` is "Weights" or "Features"."""
    if licence.license == UNKNOWN:
        head = f"{what}: not stated yet. Whoever publishes them has to say it."
    else:
        name = plain(licence.name or licence.license)
        name = f"[{name}]({licence.link})" if licence.link else name
        who = "as the publisher of this repository states" if licence.stated else "inherited"
        head = f"{what}: {name}, {who}."
    parts = [_describe(each, _PARTS[what]) for each in licence.terms]
    copy = [f"Its text: [{LICENCE_FILE}]({LICENCE_FILE})."] if licence.copy else []
    return " ".join([head, *copy, *([f"Made of {'; '.join(parts)}."] if parts else [])])


def _describe(terms: Terms, names: dict[str, str]) -> str:
    if terms.license == UNKNOWN:
        said = "terms not recorded: whether they allow a use of what was made of them is for you to find out"
    else:
        said = plain(terms.called) + (f", {terms.restricts}" if terms.restricts else "")
    return f"{names[terms.kind]} {code(terms.source)} ({said})"
