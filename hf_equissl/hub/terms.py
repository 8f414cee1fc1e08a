"""What weights and data allow: said by runs, by a list of known names, and by the cards beside the files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import ENCODER_FOLDER
from ..encoders.places import BASE_FILE, is_upstream_file
from ..utils.hub_waits import limit_waiting
from ..utils.strict_yaml import load_yaml
from .contents import CARD
from .places import FINETUNED_FILE, FINETUNING_FILE, RECIPE_FILE, RESULTS_FILE
from .privacy import is_hub_id, last_component

UNKNOWN, OTHER = "unknown", "other"
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
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
        copy: That copy, if it needs one and one lies beside the weights: a path.
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


def find_terms(kind: str, source: str | None, *, revision: str | None = None) -> tuple[Terms, ...]:
    """Find the terms of weights or data.

    Asked are, in this order: the folder of a run, a fine-tuned or a converted model, for what that was made of; a list
    of names that are known here (DINOv3, ImageNet, 3DIEBench); the card beside the files, in the folder or on the Hub.

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
    # A missing .pth file is a file that was moved, whatever its name looks like.
    public = is_hub_id(source) and not path.exists() and not is_upstream_file(source)
    if kind == "weights" and not public and (found := _read_makings(path)) is not None:
        return found
    name = source if public else last_component(source)
    folder = path if path.is_dir() else path.parent  # beside a file, or files that match a pattern
    for pattern, known in _KNOWN[kind]:
        if pattern.search(source):
            copy = _copy_of(source, folder, public, revision) if known.get("needs_copy") else None
            return (Terms(kind, name, **known, copy=copy),)
    return tuple(_read_card(kind, name, source, folder, public, revision))


def terms_of_recipe(
    recipe: Mapping[str, Any] | None, *, data: str | None = None, dataset: str | None = None
) -> tuple[Terms, ...]:
    """Find the terms of what a run is made of: the weights that it starts from, and its images.

    Args:
        recipe: Its recipe; ``None`` for a run from Python, which starts from random weights as far as anybody knows.
        data: What the data are called, where the recipe does not say it.
        dataset: What its publisher says that they are, a Hub id. It takes the place of a folder of which nothing is
            known; terms that are known stay beside it.
    """
    model, images = ((recipe or {}).get(section) or {} for section in ("model", "data"))
    weights = find_terms("weights", model.get("init_from"), revision=model.get("init_revision"))
    source, revision = images.get("source") or data, images.get("revision")
    of_data = find_terms("data", source, revision=revision) if source else (Terms("data", "of this run"),)
    if dataset is not None and dataset != source:
        stays = [each for each in of_data if each.license != UNKNOWN or is_hub_id(each.source)]
        of_data = (*stays, *find_terms("data", dataset))
    return weights + of_data


def _read_makings(path: Path) -> tuple[Terms, ...] | None:
    """Find the terms of what a local model was made of, where the run that made it, or the model itself, says that."""
    above = path.resolve().parent
    own = path.name == ENCODER_FOLDER or path.name.startswith("checkpoint-")
    for folder in (path, *([above] if own else [])):
        if (folder / RECIPE_FILE).is_file():
            return terms_of_recipe(load_yaml((folder / RECIPE_FILE).read_text(encoding="utf-8"), RECIPE_FILE))
    base = path / BASE_FILE
    source = base.read_text(encoding="utf-8").strip() if base.is_file() else None
    if (path / FINETUNED_FILE).is_file():
        return _read_finetuned(path, above, source)
    return None if source is None else find_terms("weights", source)


def _read_finetuned(folder: Path, run: Path, source: str | None) -> tuple[Terms, ...]:
    """Find the terms of a fine-tuned model's encoder and images: its run knows more of them than its own files."""
    made = _json(folder / FINETUNED_FILE)
    base, revision = source or made.get("base"), made.get("revision")
    data = next((each.get("dataset") for each in _json(folder / RESULTS_FILE).get("results", ())), None)
    if settings := _json(run / FINETUNING_FILE):
        base, revision, data = (settings.get(name) for name in ("encoder", "revision", "data"))
    weights = find_terms("weights", base, revision=revision) if base else (Terms("weights", "of this model"),)
    return weights + (find_terms("data", data) if data else (Terms("data", "of this model"),))


def _json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_card(kind: str, name: str, source: str, folder: Path, public: bool, revision: str | None) -> Iterator[Terms]:
    """Read what a card says of its licence; of several, each."""
    head = _card_head(kind, source, folder, public, revision)
    given = head.get("license")
    for licence in given if isinstance(given, list) and given else [given]:
        if not isinstance(licence, str) or not IDENTIFIER.fullmatch(licence):
            yield Terms(kind, name)
            continue
        called, link = head.get("license_name"), head.get("license_link")
        of_its_own: dict[str, Any] = (
            {"name": str(called or name), "link": str(link) if link else None} if licence == OTHER else {}
        )
        yield Terms(kind, name, licence, restricts=_restriction(licence), **of_its_own)


def _restriction(licence: str) -> str:
    if licence == UNKNOWN or _FREE.fullmatch(licence):
        return ""
    found = [said for part, said in _RESTRICTIONS if part in licence.split("-")] if licence.startswith("cc-") else []
    return ", ".join(found) or "terms of its own"


def _card_head(kind: str, source: str, folder: Path, public: bool, revision: str | None) -> Mapping[str, Any]:
    """Read the head of the card beside weights or data; empty where there is none that can be read."""
    from huggingface_hub import metadata_load

    card = fetch_file(kind, source, CARD, revision) if public else folder / CARD
    try:
        return metadata_load(card) or {} if card is not None and card.is_file() else {}
    except Exception:  # whatever a stranger's YAML makes the parser raise
        return {}


def _copy_of(source: str, folder: Path, public: bool, revision: str | None) -> str | None:
    """Find the text of a licence beside weights."""
    for name in _LICENCE_FILES:
        found = fetch_file("weights", source, name, revision) if public else folder / name
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
