"""What a card says of its licence: which one, who says so, and the terms of what the weights were made of."""

from __future__ import annotations

from ...utils.markdown import code, plain
from ..licences import UNKNOWN, Licence, Terms

_WHAT = {"weights": "base weights", "data": "training images"}


def describe_licence(licence: Licence) -> str:
    """Write the sentences of a card about its licence."""
    if licence.license == UNKNOWN:
        head = "Weights: not stated yet. Whoever publishes them has to say it."
    else:
        name = plain(licence.name or licence.license)
        name = f"[{name}]({licence.link})" if licence.link else name
        who = "as the publisher of this repository states" if licence.stated else "inherited"
        head = f"Weights: {name}, {who}."
    parts = [_describe(each) for each in licence.terms]
    return " ".join([head, *([f"Made of {'; '.join(parts)}."] if parts else [])])


def _describe(terms: Terms) -> str:
    if terms.license == UNKNOWN:
        said = "terms not recorded: whether they allow a use of what was made of them is for you to find out"
    else:
        said = plain(terms.called) + (f", {terms.restricts}" if terms.restricts else "")
    return f"{_WHAT[terms.kind]} {code(terms.source)} ({said})"
