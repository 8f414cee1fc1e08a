"""Put names and words of others into Markdown and Python, where they change nothing around them."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"[\\`*<|]|\](?=[(\[:])|&(?=#?\w+;)")
# A line that would begin a block: heading, quotation, list, fence, rule, table, link definition, code by indentation.
_BLOCK = re.compile(r"^(?:#|>|[-+*=_](?=[-+*=_\s]|$)|\||~~~|\[|:|(?P<number>\d{1,9})(?=[.)](?:\s|$)))")


def python_string(text: str) -> str:
    """Write ``text`` as a Python literal, in double quotes where that needs no escape."""
    literal = repr(text)
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in text else literal


def one_line(text: str) -> str:
    """Replace every run of white space and control characters by one space."""
    return re.sub(r"[\s\x00-\x1f\x7f\x85\u2028\u2029]+", " ", text).strip()


def code(text: str) -> str:
    """Write a name as a code span, whatever backticks are in it."""
    text = one_line(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}" if text else ""


def plain(text: str) -> str:
    """Write words so that they are shown as they are, in one line."""
    return _SPECIAL.sub(lambda found: f"\\{found[0]}" if found[0] != "&" else "&amp;", one_line(text))


def as_html(text: str) -> str:
    """Write words for the inside of an HTML element."""
    return html.escape(one_line(text), quote=False)


def cell(text: str) -> str:
    """Put Markdown into one cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", one_line(text))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write a table, the header first, of Markdown in its cells."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def fence(text: str, language: str = "") -> str:
    """Put a text into a block of code that ends where the text ends."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def paragraphs(text: str) -> str:
    """Write the words of a user as paragraphs: emphasis, links and code in them stay, blocks and HTML do not."""
    found = [[_harmless_line(line) for line in part.splitlines()] for part in re.split(r"\n\s*\n", text.strip())]
    return "\n\n".join("\n".join(filter(None, lines)) for lines in found if any(lines))


def _harmless_line(line: str) -> str:
    line = re.sub("`{3,}", lambda found: "\\`" * len(found[0]), one_line(line).replace("<", "&lt;"))
    if begin := _BLOCK.match(line):
        number = begin["number"] or ""
        line = f"{number}\\{line[len(number) :]}"
    return line
