"""Names and words of others change neither a card's structure nor the code in it."""

from __future__ import annotations

import ast

import pytest
from markdown_it import MarkdownIt

from hf_equissl.utils.markdown import as_html, cell, code, fence, paragraphs, plain, python_string, table

HOSTILE = (
    'it\'s "a" `name`',
    "``` \n# heading\n```",
    "\n\n# heading\n\n- list\n\n```python\nimport os\n```\n",
    "<script>alert(1)</script>",
    "</details><img src=x onerror=y>",
    "a | b | c",
    "[text](https://x.org) ![image](https://x.org/a.png)",
    "---\nlicense: mit\n---",
    "title\n===",
    "1. one\n2) two",
    "~~~\nx\n~~~",
    "> quoted",
    "    indented",
    "[x]: https://x.org",
    "a\u2028# b\x00\x85- c",
    "a | b\n--- | ---\n1 | 2",
    "\\` and \\\\` and &lt;b&gt;",
)
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")


def blocks(text: str) -> list[str]:
    return [token.type for token in PARSER.parse(text)]


def inline(text: str) -> str:
    """What a reader sees of the first paragraph, as text."""
    token = next(token for token in PARSER.parse(text) if token.type == "inline")
    shown = ("text", "code_inline", "text_special")
    return "".join(child.content if child.type in shown else "?" for child in token.children or ())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_is_shown_as_it_is(text: str) -> None:
    seen = " ".join(text.replace("\x00", " ").replace("\x85", " ").split())
    for write in (code, plain):
        around = f"On {write(text)}, then."
        assert blocks(around) == ["paragraph_open", "inline", "paragraph_close"]
        assert inline(around) == f"On {seen}, then."
    head, row = "| a | b |\n|---|---|\n", f"| {cell(code(text))} | {cell(plain(text))} |"
    assert blocks(head + row) == blocks(head + "| x | y |")
    assert blocks(table([["a", "b"], [plain(text), text]])) == blocks(head + "| x | y |")
    assert "<" not in as_html(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_words_of_the_user_are_paragraphs(text: str) -> None:
    allowed = {"paragraph_open", "inline", "paragraph_close"}
    assert set(blocks(paragraphs(f"Before.\n\n{text}\n\nAfter."))) == allowed
    found = PARSER.parse(paragraphs(text))
    assert not any(child.type == "html_inline" for token in found for child in token.children or ())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_block_of_code_ends_where_its_text_ends(text: str) -> None:
    tokens = PARSER.parse(f"Before.\n\n{fence(text, 'yaml')}\n\nAfter.")
    assert [token.type for token in tokens if token.type == "fence"] == ["fence"]
    assert len(tokens) == 7


@pytest.mark.parametrize("text", [*HOSTILE, "C:\\data\\new", "plain", "naïve 🙂", '"', "'", "x', __import__('os')"])
def test_a_name_in_code_is_a_string(text: str) -> None:
    literal = python_string(text)
    assert ast.literal_eval(literal) == text
    assert "\n" not in literal
    assert python_string("maker/encoder") == '"maker/encoder"'
