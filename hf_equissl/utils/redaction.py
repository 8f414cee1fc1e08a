"""Keep passwords, signatures and access tokens out of all that is written, printed and published."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

REMOVED = "removed"
# What a secret is -> how it looks, wherever it stands.
FORMS = {
    "a Hub token": re.compile(r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{16,}\b|hf_(?:oauth|jwt)_[\w.-]{16,})"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a Google access key": re.compile(r"\b(?:AIza[\w-]{35}|ya29\.[\w-]{20,}|GOOG1E[A-Z0-9]{20,})"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,})"),
    "a GitLab token": re.compile(r"\bglpat-[\w-]{20,}"),
    "a Slack token": re.compile(r"\bxox[a-z]-[\w-]{10,}"),
    "an API key": re.compile(r"\bsk-(?=[\w-]*\d)[\w-]{20,}"),
    "a signed web token": re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),
    "a bearer token": re.compile(r"(?<=\bBearer )(?=\S*\d)[\w.~+/=-]{16,}", re.IGNORECASE),
    "a login in a header": re.compile(
        r"(?:(?<=authorization: basic )|(?<=authorization[\"']: [\"']basic )|(?<=authorization[\"']:[\"']basic )"
        r"|(?<=authorization[:=]basic ))[\w+/-]{6,}={0,2}",
        re.IGNORECASE,
    ),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL),
}
# Names of values that are secrets; "mask_token" is not one of them. The ends of words that are never anything else:
_ALWAYS = (
    r"pass(?:word|wd|phrase)|secret|api[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key|private[_-]?key"
    r"|access[_-]?signature|connection[_-]?string|credentials?"
)
_WITH = r"hub|hf|access|auth|api|session|security|refresh|bearer|oauth|sas"
_NAME = rf"(?:[\w.-]{{0,60}}(?:{_ALWAYS})|(?:[\w.-]{{0,60}}[.-])?(?:(?:{_WITH})_)?(?:token|sig|signature|sas|pwd))"
_SECRET_NAME = re.compile(rf"^(?:{_NAME}|(?:[\w.-]{{0,60}}[.-])?(?:key|authorization))$", re.IGNORECASE)
_CERTAIN = re.compile(_NAME, re.IGNORECASE)
# Names that only secrets have; "key" or "token" alone may name a metric or a word.
_SURE = re.compile(rf"[\w.-]{{0,60}}(?:{_ALWAYS}|(?:{_WITH})_token)", re.IGNORECASE)
# name=value; "name": "value" of JSON; a line `name: value` of YAML. Only how the name ends: see _is_assigned.
_ASSIGNED = re.compile(
    rf"(?P<end>{_ALWAYS}|token|signature|sig|sas|pwd)(?P<sign>=[\"']?|[\"']\s{{0,9}}:\s{{0,9}}(?=[\"'])|:[ \t]+)"
    r"(?P<value>\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|[^\s\"',;&|<>{}()\[\]`]+)",
    re.IGNORECASE,
)
_NOTHING = re.compile(r"null|none|true|false|~|\*+|<[^>]*>|\$\{?\w+\}?|(?:www\.)?removed|", re.IGNORECASE)
# Gaps to fill in, as instructions have them: hf_..., YOUR_TOKEN, my-api-key, sk-xxxx.
_GAP = re.compile(
    r"(?:[a-z]{2,9}[_-])?(?:[\w-]{0,12}(?:\.{3,}|…)[\w-]{0,8}|(?:your|my)[a-z_ -]*|x{3,}|<[^>]*>)|removed",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s\"'<>`]*")
# A password with a slash, as keys of AWS have; no port.
_SLASHED = re.compile(r"[^/:@]+:(?!:|\d+(?:/|$))[^@]*@")
_PLACES = re.compile(r"\b(?:abfss?|wasbs?)://$", re.IGNORECASE)  # abfss://container@account
_PARTS = re.compile(r"[^&;)#]+")  # each part of what stands behind "?"
_HARMLESS = re.compile(r"true|false|\d{0,6}|" + REMOVED, re.IGNORECASE)
_SUFFIX = re.compile(r"\.\w{1,8}$")


def redact(text: str) -> str:
    """Replace all that may be a secret in ``text`` by "removed": tokens, passwords and values in addresses."""
    text = _ADDRESS.sub(lambda found: "".join(_clean_address(found[0])), text)
    for form in FORMS.values():
        text = form.sub(REMOVED, text)
    return _ASSIGNED.sub(_drop_assigned, text)


def redact_values(value: Any, clean: Callable[[str], str] = redact) -> Any:
    """Apply ``clean`` to every string in plain data, and drop entries that are called as secrets are."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {key: redact_values(item, clean) for key, item in value.items() if not _SECRET_NAME.search(str(key))}
    return [redact_values(item, clean) for item in value] if isinstance(value, (list, tuple)) else value


def drop_secrets(words: Iterable[str]) -> list[str]:
    """Drop options with a secret from the words of a command line, and remove secrets from the others."""
    kept: list[str] = []
    of_secret = False  # the word before was the name of a secret
    for word in words:
        is_option = word.startswith("-")
        if of_secret and not is_option:
            of_secret = False
            continue
        name, equals, _ = word.lstrip("-").partition("=")
        is_secret = is_option and bool(_SECRET_NAME.search(name))
        of_secret = is_secret and not equals
        if not is_secret:
            kept.append(redact(word))
    return kept


def find_secret(text: str) -> str | None:
    """Say what kind of secret ``text`` surely holds; ``None`` where there is none.

    Less is named here than ``redact`` removes: an address may end in ``?id=12`` for good reasons.
    """
    for kind, form in FORMS.items():
        if any(not _GAP.fullmatch(found[0]) for found in form.finditer(text)):
            return kind
    for found in _ADDRESS.finditer(text):
        for piece in _pieces(found[0]):
            if _is_login(_user_of(piece)):
                return "an address with a password"
            for part in _PARTS.finditer(piece.partition("?")[2]):
                name, _, value = part[0].partition("=")
                if _SECRET_NAME.search(name) and not _HARMLESS.fullmatch(value) and _is_value(name, value):
                    return "a signed address"
    return next((f"a {kind}" for kind in _find_assigned(text)), None)


def find_secret_in(values: Any) -> str | None:
    """Say what kind of secret plain data such as the content of a JSON file hold, as ``find_secret`` does."""
    if isinstance(values, str):
        return find_secret(values)
    if isinstance(values, Mapping):
        for key, item in values.items():
            if isinstance(item, str) and _SECRET_NAME.search(str(key)) and _is_value(str(key), item):
                return f"a value called {key}"
        values = [*values, *values.values()]
    found = map(find_secret_in, values) if isinstance(values, (list, tuple)) else ()
    return next(filter(None, found), None)


def redact_messages() -> None:
    """Keep secrets out of log messages and of the last words of a program that ends by an error, from now on."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _say_error
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        with suppress(Exception):  # a call that is wrong, which logging reports by itself
            said = made.getMessage()
            if (clean := redact(said)) != said:
                made.msg, made.args = clean, ()
        with suppress(Exception):
            if made.exc_info and made.exc_info[0] is not None:
                made.exc_text = redact("".join(traceback.format_exception(*made.exc_info)).rstrip())
        return made

    record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)


def _say_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _pieces(address: str) -> list[str]:
    """Split an address, perhaps one of several in one word, after each "://"."""
    return re.split(r"(?<=://)", address)


def _user_of(piece: str) -> str:
    """Return what stands before the host, with its "@"; empty where there is nothing."""
    authority = re.split(r"[/?#]", piece, maxsplit=1)[0]
    if "@" in authority:
        return authority[: authority.rindex("@") + 1]
    slashed = _SLASHED.match(piece)
    return slashed[0] if slashed else ""


def _is_login(user: str) -> bool:
    name, colon, password = user.removesuffix("@").partition(":")
    if colon:
        return not (_NOTHING.fullmatch(password) or _GAP.fullmatch(password)) and not password.startswith(("{", "$"))
    return len(name) >= 16 and bool(re.search(r"\d", name))


def _clean_address(address: str) -> Iterator[str]:
    before = ""
    for piece in _pieces(address):
        user = _user_of(piece) if before else ""
        if ":" not in user and _PLACES.search(before):
            user = ""
        place, sign, query = piece[len(user) :].partition("?")
        before = f"{place}{sign}{_PARTS.sub(_drop_value, query)}"
        yield before


def _drop_value(part: re.Match[str]) -> str:
    name, equals, value = part[0].partition("=")
    if not equals:  # perhaps a pattern, shard-?.tar
        return name if len(name) < 16 or _SUFFIX.search(name) else REMOVED
    return f"{name}={value if _HARMLESS.fullmatch(value) else REMOVED}"


def _secret_name(found: re.Match[str]) -> str:
    """Return the whole name before a value; empty unless it, and how both stand there, say that this is a secret."""
    line = found.string[max(0, found.start() - 80) : found.end("end")].rpartition("\n")[2]
    name = re.search(r"[\w.-]{0,80}$", line)[0]  # type: ignore[index]  # finds nothing at least
    before = line[: len(line) - len(name)]
    if found["sign"][0] in "\"'":
        return name if before[-1:] == found["sign"][0] and _CERTAIN.fullmatch(name) else ""
    name = name.lstrip("-")
    if found["sign"][0] == ":":
        return name if before.strip(" \t-") == "" and _SURE.fullmatch(name) else ""
    return name if _CERTAIN.fullmatch(name) else ""


def _drop_assigned(found: re.Match[str]) -> str:
    value = found["value"]
    quote = value[0] if value[0] in "\"'" else ""
    if not _secret_name(found) or _NOTHING.fullmatch(value.strip("\"'")):
        return found[0]
    return f"{found['end']}{found['sign']}{quote}{REMOVED}{quote}"


def _find_assigned(text: str) -> Iterator[str]:
    for found in _ASSIGNED.finditer(text):
        value = found["value"]
        quoted = value[0] in "\"'" or found["sign"][-1] in "\"'"
        if (name := _secret_name(found)) and _is_value(name, value.strip("\"'"), quoted):
            yield f"value called {found['end']}"


def _is_value(name: str, value: str, quoted: bool = True) -> bool:
    """Return whether a value that is called a secret is one, and no name of a variable or gap to fill in."""
    if _NOTHING.fullmatch(value) or _GAP.fullmatch(value) or len(value) < 4:
        return False
    sure = bool(_SURE.fullmatch(name))
    return (sure and quoted) or (len(value) >= (6 if sure else 8) and bool(re.search(r"\d", value)))


def read_json_lines(text: str) -> list[Any] | None:
    """Read JSON, or one JSON value a line; ``None`` where ``text`` is neither."""
    with suppress(ValueError, RecursionError):
        return [json.loads(text)]
    with suppress(ValueError, RecursionError):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return None
