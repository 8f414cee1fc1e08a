"""YAML without surprises: strict reading, errors that name file and line, and writing that reads back the same.

YAML is read by the core schema of YAML 1.2: ``1e-3`` is a float, ``no`` and ``on`` are strings, ``1:30`` is not a
number of seconds, and a key that is given twice is an error. Values are plain: no tags, nothing that is not finite,
nothing nested without end (``check_plain``).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from .plain_values import check_plain, shorten
from .suggestions import RecipeError

_PLAIN = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "null", "int", "float", "str", "seq", "map"))


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core schema, duplicate keys and tags refused."""

    yaml_implicit_resolvers = {}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        line = f"line {node.start_mark.line + 1}"
        if node.tag not in _PLAIN:
            raise RecipeError(f"{line}: the tag {shorten(node.tag)} is not read. Write the value without it.")
        try:
            return super().construct_object(node, deep)
        except RecipeError:
            raise
        except (ValueError, KeyError) as error:  # an integer of thousands of digits, or a tag that does not fit
            raise RecipeError(f"{line}: {shorten(node.value)} is no {node.tag.rpartition(':')[2]}.") from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise RecipeError(f"line {key_node.start_mark.line + 1}: the key {key!r} is not a word.")
            if key in seen:
                raise RecipeError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice.")
            seen.add(key)
        return super().construct_mapping(node, deep)


_CORE_SCHEMA = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
]
for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _to_float(node.value))


def _to_float(text: str) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


class _Dumper(yaml.SafeDumper):
    """Quotes every string that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^(?:{_CORE_SCHEMA[3][1]})$"), list("-+0123456789.")
)


def load_yaml(text: str, origin: str) -> Any:
    """Read YAML ``text``; errors name ``origin`` (a file, an option) and the line."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).splitlines()[0]
        raise RecipeError(f"{origin}{line}: this is not valid YAML ({problem}).") from error
    except RecipeError as error:
        raise RecipeError(f"{origin}, {error}") from None
    except RecursionError:
        raise RecipeError(f"{origin}: brackets or indented lines are nested too deeply.") from None
    check_plain(value, origin)
    return value


def dump_yaml(value: Any) -> str:
    """Write plain data as YAML, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
