"""Write cards of a head of YAML and a template, which shows the words of others as plain words."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from huggingface_hub import CardData
from jinja2 import Environment, StrictUndefined

from ...utils import markdown

# What templates call to put a value into Markdown.
_FILTERS = ("code", "plain", "cell", "fence", "as_html", "paragraphs", "python_string", "table")


def write(template: str, head: CardData, context: Mapping[str, Any]) -> str:
    """Write a card. Equal values give an equal text.

    Args:
        template: File of this folder. What it shows as it is has to be Markdown that our own code has made; all else
            goes through a filter of ``utils.markdown``.
        head: What the Hub indexes.
        context: The values that the template names.
    """
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {name: getattr(markdown, name) for name in _FILTERS}
    text = (resources.files(__package__) / template).read_text(encoding="utf-8")
    return f"---\n{head.to_yaml()}\n---\n\n{environment.from_string(text).render(context)}"
