"""Under which terms weights may be published: those of the weights they started from, and of the images they saw.

What is known and free to use is inherited. What is unknown, or allows less than everything, the publisher answers
first: this package does not guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints import ENCODER_FOLDER
from ..utils.hub_waits import limit_waiting
from ..utils.strict_yaml import load_yaml
from .contents import CARD, PublishError
from .places import RECIPE_FILE
from .privacy import is_hub_id, last_component

INHERIT, UNKNOWN, OTHER = "inherit", "unknown", "other"
LICENCE_FILE = "LICENSE.md"  # in what is published
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# Licences that ask for attribution at most. https://huggingface.co/docs/hub/repositories-licenses lists all.
_FREE = re.compile(
    r"apache-2\.0|mit|mit-0|0bsd|bsd(-[23]-clause(-clear)?)?|isc|zlib|unlicense|wtfpl|ncsa|bsl-1\.0|afl-3\.0|ecl-2\.0"
    r"|postgresql|pddl|odc-by|cc0-1\.0|cc-by-[\d.]+|cdla-permissive-[\d.]+"
)
_RESTRICTIONS = (
    ("nc", "no commercial use"),
    ("nd", "nothing made of it may be shared"),
    ("sa", "what is made of it stays under it"),
)
_LICENCE_FILES = ("LICENSE.md", "LICENSE", "LICENSE.txt")


@dataclass(frozen=True)
class Terms:
    """The terms of one thing that weights were made of.

    Attributes:
        kind: "weights" or "data".
        source: Its name for readers.
        license: Identifier as the Hub lists them; "other" with a ``name``; "unknown".
        name: Of a licence that the Hub does not list.
        link: Where that is written.
        restricts: What it does not allow; empty for free ones.
        needs_copy: Whether what is made of it is passed on with a copy of the licence.
        copy: That copy, where one lies beside the weights: a path.
    """

    kind: str
    source: str
    license: str = UNKNOWN
    name: str | None = None
    link: str | None = None
    restricts: str = ""
    needs_copy: bool = False
    copy: str | None = None

    @property
    def called(self) -> str:
        """The licence as people call it."""
        return self.name or self.license

    def __str__(self) -> str:
        said = "terms unknown" if self.license == UNKNOWN else self.called
        more = f" ({self.restricts})" if self.restricts else ""
        return f"{self.kind} {self.source}: {said}{more}"


# A part of a name -> the terms of whatever is called so, on the Hub or on a disk.
_KNOWN: Mapping[str, tuple[tuple[re.Pattern[str], dict[str, Any]], ...]] = {
    "weights": (
        (
            re.compile("dinov3", re.IGNORECASE),
            {
                "license": OTHER,
                "name": "dinov3-license",
                "link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
                "restricts": "what is made of it stays under it, with a copy of it",
                "needs_copy": True,
            },
        ),
    ),
    "data": (
        (
            re.compile("3die", re.IGNORECASE),
            {"license": "cc-by-nc-4.0", "restricts": "no commercial use"},
        ),
        (
            re.compile("imagenet|ilsvrc", re.IGNORECASE),
            {
                "license": OTHER,
                "name": "imagenet-terms-of-access",
                "link": "https://www.image-net.org/download.php",
                "restricts": "non-commercial research and education only",
            },
        ),
    ),
}


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
) -> Licence:
    """Choose the licence of weights that were made of things under ``terms``.

    Args:
        terms: As ``find_terms`` gives them.
        license: The publisher's answer: an identifier; "inherit" for those terms, restrictions and all; ``None`` for
            none, which is enough where all terms are known and free.
        name: Name of the licence, where ``license`` is "other".
        link: Where that is written.
        copy: A file with the licence's text.

    Raises:
        ValueError: The answer is no licence, contradicts the terms of base weights, or there is nothing to inherit.
    """
    terms, kept = tuple(terms), str(copy) if copy is not None else None
    if (name or link) and license != OTHER:
        raise ValueError(f"license_name and license_link belong to license 'other' (--license other), not {license!r}.")
    if copy is not None and not Path(copy).is_file():
        raise ValueError(f"license_file (--license_file) is {str(copy)!r}: there is no such file.")
    binding = [each for each in terms if each.kind == "weights" and each.restricts]
    if license not in (None, INHERIT):
        _check_answer(license, name, link)
        for each in binding:
            if (license, name) != (each.license, each.name):
                raise ValueError(
                    f"license (--license) is {name or license!r}, and {each}. Weights made of it cannot be given away "
                    f"under another licence: --license {INHERIT}."
                )
        found = Licence(license, name, link, terms, stated=True, copy=kept)
        return _with_copy(found, binding)
    source, question = _strongest(terms)
    if source is None or (license is None and source.restricts):
        if license == INHERIT:
            raise ValueError(f"--license {INHERIT}: {question}")
        return Licence(UNKNOWN, terms=terms, question=question)
    found = Licence(source.license, source.name, source.link, terms, stated=license == INHERIT, copy=kept)
    return _with_copy(found, binding)


def _check_answer(license: str, name: str | None, link: str | None) -> None:
    if not _IDENTIFIER.fullmatch(license) or license == UNKNOWN:
        raise ValueError(
            f"license (--license) is {license!r}, expected an identifier as the Hub lists them, e.g. apache-2.0, or "
            f"{INHERIT!r} for the terms of base weights and data."
        )
    if license == OTHER and not (name and link):
        raise ValueError(
            "license 'other' (--license other) needs its name and where it is written: --license_name, --license_link."
        )


def _strongest(terms: tuple[Terms, ...]) -> tuple[Terms | None, str]:
    """Find the terms that all others allow; with what to ask where there are none, or where they restrict."""
    said = "; ".join(map(str, terms)) or "nothing is recorded"
    answers = "--license ID, as the Hub lists them"
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
            + ("." if restricting[0].kind == "weights" else ", or another one that you may give: --license ID.")
        )
    weights = [each for each in terms if each.kind == "weights"]
    return (weights or list(terms))[0], ""


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


def find_terms(kind: str, source: str | None, *, revision: str | None = None) -> tuple[Terms, ...]:
    """Find the terms of weights or data.

    Asked are, in this order: a folder of a run, for what that was made of; a list of names that are known here
    (DINOv3, ImageNet, 3DIEBench); the card beside the files, in the folder or on the Hub.

    Args:
        kind: "weights" or "data".
        source: Hub id or path; ``None``: there is nothing of the kind.
        revision: Of a repository on the Hub.

    Returns:
        One, or of a run as many as it has sources; their ``license`` is "unknown" where nothing says it.
    """
    if source is None:
        return ()
    path = Path(source).expanduser()
    public = is_hub_id(source) and not path.exists()
    if kind == "weights" and not public and (run := _run_of(path)) is not None:
        return terms_of_recipe(load_yaml((run / RECIPE_FILE).read_text(encoding="utf-8"), RECIPE_FILE))
    name = source if public else last_component(source)
    for pattern, known in _KNOWN[kind]:
        if pattern.search(source):
            copy = _copy_of(source, path, public, revision) if known.get("needs_copy") else None
            return (Terms(kind, name, **known, copy=copy),)
    return tuple(_read_card(kind, name, source, path, public, revision))


def terms_of_recipe(recipe: Mapping[str, Any] | None, *, data: str | None = None) -> tuple[Terms, ...]:
    """Find the terms of what a run is made of: the weights that it starts from, and its images.

    Args:
        recipe: Its recipe; ``None`` for a run from Python, which starts from random weights as far as anybody knows.
        data: What the data are called, where that is known better than the recipe says it.
    """
    model, images = ((recipe or {}).get(section) or {} for section in ("model", "data"))
    weights = find_terms("weights", model.get("init_from"), revision=model.get("init_revision"))
    source = data or images.get("source")
    return weights + (
        find_terms("data", source, revision=images.get("revision")) if source else (Terms("data", "of this run"),)
    )


def _run_of(path: Path) -> Path | None:
    """Find the run that a folder of weights belongs to: the folder itself, or the one above."""
    own = path.name == ENCODER_FOLDER or path.name.startswith("checkpoint-")
    folders = (path, *([path.resolve().parent] if own else []))
    return next((folder for folder in folders if (folder / RECIPE_FILE).is_file()), None)


def _read_card(kind: str, name: str, source: str, path: Path, public: bool, revision: str | None) -> Iterator[Terms]:
    """Read what a card says of its licence; of several, each."""
    head = _card_head(kind, source, path, public, revision)
    given = head.get("license")
    for licence in given if isinstance(given, list) and given else [given]:
        if not isinstance(licence, str) or not _IDENTIFIER.fullmatch(licence):
            yield Terms(kind, name)
            continue
        called, link = head.get("license_name"), head.get("license_link")
        of_its_own: dict[str, Any] = (
            {"name": str(called or name), "link": str(link) if link else None} if licence == OTHER else {}
        )
        copy = _copy_of(source, path, public, revision) if licence == OTHER and kind == "weights" else None
        yield Terms(kind, name, licence, restricts=_restriction(licence), copy=copy, **of_its_own)


def _restriction(licence: str) -> str:
    if licence == UNKNOWN or _FREE.fullmatch(licence):
        return ""
    found = [said for part, said in _RESTRICTIONS if part in licence.split("-")] if licence.startswith("cc-") else []
    return ", ".join(found) or "terms of its own"


def _card_head(kind: str, source: str, path: Path, public: bool, revision: str | None) -> Mapping[str, Any]:
    """Read the head of the card beside weights or data; empty where there is none that can be read."""
    from huggingface_hub import metadata_load

    card = fetch_file(kind, source, CARD, revision) if public else path / CARD
    try:
        return metadata_load(card) or {} if card is not None and card.is_file() else {}
    except Exception:  # whatever a stranger's YAML makes the parser raise
        return {}


def _copy_of(source: str, path: Path, public: bool, revision: str | None) -> str | None:
    """Find the text of a licence beside weights."""
    for name in _LICENCE_FILES:
        found = fetch_file("weights", source, name, revision) if public else path / name
        if found is not None and found.is_file():
            return str(found)
    return None


def fetch_file(kind: str, source: str, name: str, revision: str | None) -> Path | None:
    """Fetch a small file from the Hub, or from its cache; ``None`` where it cannot be had."""
    from huggingface_hub import hf_hub_download

    limit_waiting()
    try:
        repo_type = "dataset" if kind == "data" else "model"
        return Path(hf_hub_download(source, name, repo_type=repo_type, revision=revision))
    except Exception:  # no such file, no right, no network: then the publisher is asked
        return None
