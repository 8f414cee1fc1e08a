"""Take paths of this machine and secrets out of what a run says, so that it can be published."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from ..utils.redaction import drop_secrets, redact, redact_values

if TYPE_CHECKING:
    from ..evaluation.results import ResultRecord

# How a path begins: at the root, in a home folder, in a folder above, or on another drive; not as "https://" does.
_START = r"(?:file:/+|~[\w.-]*/|/|\.\./|[A-Za-z]:[\\/])"
_WHOLE = re.compile(rf"^{_START}")
_INSIDE = re.compile(rf"(?<![\w.:/~\\-]){_START}[^\s'\"`,;()\[\]{{}}|<>]*[\w*?-]")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")
_FILES = (".parquet", ".arrow", ".tar")


def is_hub_id(name: str | None) -> bool:
    """Whether ``name`` has the form ``owner/name`` of a repository on the Hub."""
    return name is not None and bool(_HUB_ID.match(name)) and not name.endswith(_FILES)


def public_source(source: str) -> str:
    """Name a data set or model as others know it: a Hub id as it is, a path by its last component."""
    # "data/photos" has the form of a Hub id; where there is such a folder, that is meant.
    return last_component(source) if is_hub_id(source) and Path(source).exists() else public_text(source)


def last_component(path: str) -> str:
    """Return the name of a file or folder without its path."""
    kind = PureWindowsPath if re.match(r"^[A-Za-z]:[\\/]", path) else PurePosixPath
    return kind(path.rstrip("/\\")).name or "data"


def public_text(text: str) -> str:
    """Reduce every local path in ``text`` to its last component, and remove secrets."""
    text = redact(text)
    if _WHOLE.match(text) and "\n" not in text and ": " not in text:  # all of it is one path, perhaps with spaces
        name, split, rest = text.partition(" (")  # sources are called "path (split)"
        return last_component(name) + split + rest
    return _INSIDE.sub(lambda match: last_component(match[0]), text)


def public_values(value: Any) -> Any:
    """Apply ``public_text`` to every string in plain data, and drop entries that are called a token or secret."""
    return redact_values(value, public_text)


def public_command(command: str, names: Mapping[str, str] | None = None) -> str:
    """Write a command line that others can read: paths by their last component, ``names`` replaced, no secrets.

    Args:
        command: The command as one would type it.
        names: Word of the command -> what stands for it, e.g. the encoder's folder -> its name on the Hub.
    """
    names = names or {}
    words = []
    for word in drop_secrets(shlex.split(command)):
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        words.append(word if option and not equals else f"{option}{equals}{names.get(value) or _public_word(value)}")
    return shlex.join(words)


def _public_word(word: str) -> str:
    script = re.search(r"(?:^|/)(training/\w+\.py)$", word)  # where our scripts lie in a checkout
    return script[1] if script else public_text(word)


def public_record(record: ResultRecord, encoder: str, dataset: str) -> ResultRecord:
    """Return a record as others may read it: encoder and data set called so, and no path of this machine."""
    names = {record.encoder: encoder, record.dataset: dataset}
    return replace(
        record,
        encoder=encoder,
        dataset=dataset,
        command=None if record.command is None else public_command(record.command, names),
        protocol=public_values(record.protocol),
        details=public_values(record.details),
    )
