"""Under which terms weights may be published: those of the weights they started from, and of the images they saw.

What is known and free to use is inherited. What is unknown, or allows less than everything, the publisher answers
first: this package does not guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .contents import PublishError
from .terms import IDENTIFIER, OTHER, UNKNOWN, Terms

INHERIT = "inherit"
LICENCE_FILE = "LICENSE.md"  # in what is published


@dataclass(frozen=True)
class Licence:
    """The licence that weights are published under, and where it comes from.

    Attributes:
        license: Identifier as the Hub lists them; "unknown" until the publisher has answered.
        name: Of an "other" licence.
        link: Where that is written.
        terms: Those of what the weights were made of.
        stated: Whether the publisher said it, in place of inheriting it.
        question: What the publisher has to answer first; empty if nothing.
        copy: A file with the licence's text, to lie beside the weights.
    """

    license: str
    name: str | None = None
    link: str | None = None
    terms: tuple[Terms, ...] = ()
    stated: bool = False
    question: str = ""
    copy: str | None = None

    def require_answer(self) -> None:
        """Raise ``PublishError`` where the publisher has not said yet what only they can say."""
        if self.question:
            raise PublishError(self.question)

    def card_fields(self) -> dict[str, str]:
        """Return the fields of a card's head."""
        fields = {"license": self.license, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in fields.items() if value}


def choose_licence(
    terms: Sequence[Terms],
    license: str | None = None,
    *,
    name: str | None = None,
    link: str | None = None,
    copy: str | Path | None = None,
    first: str = "weights",
) -> Licence:
    """Choose the licence of weights or features that were made of things under ``terms``.

    Args:
        terms: As ``find_terms`` gives them.
        license: The publisher's answer: an identifier; "inherit" for those terms, restrictions and all; ``None`` for
            none, which is enough where all terms are known and free.
        name: Name of the licence, where ``license`` is "other".
        link: Where that is written; default: in the file that lies beside.
        copy: A file with the licence's text.
        first: "weights" or "data": whose licence is inherited where all are free.

    Raises:
        ValueError: The answer is no licence, contradicts the terms of base weights, or there is nothing to inherit.
    """
    terms, kept = tuple(terms), str(copy) if copy is not None else None
    if (name or link) and license != OTHER:
        raise ValueError(f"license_name and license_link belong to license 'other' (--license other), not {license!r}.")
    if copy is not None and not Path(copy).is_file():
        raise ValueError(f"license_file (--license_file) is {str(copy)!r}: there is no such file.")
    binding = _binding(terms)
    source, question = _strongest(terms, binding, first)
    if license not in (None, INHERIT):
        link = link or (LICENCE_FILE if license == OTHER and kept else None)
        _check_answer(license, name, link)
        if len(binding) > 1:
            raise ValueError(question)
        for each in binding:
            if (license, name) != (each.license, each.name):
                answer = INHERIT if source is not None else _words(each)
                raise ValueError(
                    f"license (--license) is {name or license!r}, and {each}. What is made of it cannot be given away "
                    f"under another licence: --license {answer}."
                )
        found = Licence(license, name, link, terms, stated=True, copy=kept)
        return _with_copy(found, binding)
    if source is None or (license is None and source.restricts):
        if license == INHERIT:
            raise ValueError(f"--license {INHERIT}: {question}")
        return Licence(UNKNOWN, terms=terms, question=question)
    found = Licence(source.license, source.name, source.link, terms, stated=license == INHERIT, copy=kept)
    return _with_copy(found, binding)


def _check_answer(license: str, name: str | None, link: str | None) -> None:
    if not IDENTIFIER.fullmatch(license) or license == UNKNOWN:
        raise ValueError(
            f"license (--license) is {license!r}, expected an identifier as the Hub lists them, e.g. apache-2.0, or "
            f"{INHERIT!r} for the terms of base weights and data."
        )
    if license == OTHER and not (name and link):
        raise ValueError(
            "license 'other' (--license other) needs its name, and where it is written: --license_name, and "
            "--license_link or --license_file."
        )


def _binding(terms: Sequence[Terms]) -> list[Terms]:
    """Return the base weights under which what is made of them has to stay, one for each licence."""
    return list(
        {(each.license, each.name): each for each in terms if each.kind == "weights" and each.restricts}.values()
    )


def _words(terms: Terms) -> str:
    """Return what stands behind ``--license`` to say these terms."""
    more = f" --license_name {terms.name} --license_link {terms.link or 'URL'}" if terms.license == OTHER else ""
    return terms.license + more


def _strongest(terms: tuple[Terms, ...], binding: Sequence[Terms], first: str) -> tuple[Terms | None, str]:
    """Find the terms that all others allow; with what to ask where there are none, or where they restrict.

    What is asked can be answered: where base weights bind, it names their licence.
    """
    said = "; ".join(map(str, terms)) or "nothing is recorded"
    if len(binding) > 1:
        return None, (
            f"What is made of each of {' and '.join(map(str, binding))} has to stay under its licence, and one "
            "publication has one: no answer fits both. Start from other weights, or ask who owns these."
        )
    answers = f"--license {_words(binding[0])}" if binding else "--license ID, as the Hub lists them"
    unknown = [each for each in terms if each.license == UNKNOWN]
    if unknown or not terms:
        return (
            None,
            f"The licence is yours to say, because it does not follow from what this was made of ({said}): {answers}.",
        )
    restricting = list({each.called: each for each in terms if each.restricts}.values())
    if len(restricting) > 1:
        return None, f"Two licences at once restrict what this was made of ({said}). Say which holds: {answers}."
    if restricting:
        return restricting[0], (
            f"What this was made of may not be used for everything ({said}). Say under which licence it is published: "
            f"--license {INHERIT} for these terms"
            + ("." if binding else ", or another one that you may give: --license ID.")
        )
    return next((each for each in terms if each.kind == first), terms[0]), ""


def _with_copy(found: Licence, binding: Sequence[Terms]) -> Licence:
    """Add the text of the licence, where base weights are to be passed on with it."""
    needing = next((each for each in binding if each.needs_copy), None)
    if needing is None or found.copy is not None:
        return found
    if needing.copy is None:
        return Licence(
            UNKNOWN,
            terms=found.terms,
            question=f"{needing} A copy of that licence must lie beside the weights, and none was found beside "
            f"{needing.source}: give it with --license_file PATH.",
        )
    return replace(found, copy=needing.copy)
