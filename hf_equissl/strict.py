"""Strict reading of what people write: YAML without surprises, types that are checked, errors that name a remedy.

YAML is read by the core schema of YAML 1.2: ``1e-3`` is a float, ``no`` and ``on`` are strings, ``1:30`` is not a
number of seconds, and a key that is given twice is an error.
"""

from __future__ import annotations

import builtins
import difflib
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import yaml

LONGEST_LIST = 40  # an error that lists more keys hides what it says


class RecipeError(ValueError):
    """Something in a recipe or on the command line is wrong; the message says what, where and what to do."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core schema, duplicate keys refused."""

    yaml_implicit_resolvers = {}

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
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{origin}{line}: this is not valid YAML ({getattr(error, 'problem', error)}).") from error
    except RecipeError as error:
        raise RecipeError(f"{origin}, {error}") from None


def dump_yaml(value: Any) -> str:
    """Write plain data as YAML, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The member of ``valid`` that ``name`` was probably meant to be, or ``None``."""
    matches = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def check_keys(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Refuse keys that mean nothing.

    Raises:
        RecipeError: names the first unknown key, its nearest neighbour and the valid ones, or where they are very
            many those that look alike.
    """
    valid = list(valid)
    for key in given:
        if key not in valid:
            guess = nearest(key, valid)
            hint = f" Did you mean {guess!r}?" if guess else ""
            if len(valid) > LONGEST_LIST:
                close = difflib.get_close_matches(key, valid, n=10, cutoff=0.4)
                listed = f"Close ones of the {len(valid)} valid keys: {', '.join(close) or 'none'}."
            else:
                listed = f"Valid keys: {', '.join(sorted(valid))}."
            raise RecipeError(f"{where}: unknown key {key!r}.{hint} {listed}")


class _Names(dict[str, Any]):
    """Names that only a type checker imports stand for anything."""

    def __missing__(self, name: str) -> Any:
        return Any


def hints_of(owner: Callable[..., Any]) -> dict[str, Any]:
    """Resolved annotations of a function, or of a class's own fields (those of its parents are left out)."""
    names = _Names(vars(builtins) | vars(sys.modules[owner.__module__]))
    own = types.SimpleNamespace(__annotations__=dict(owner.__annotations__))
    return typing.get_type_hints(own, globalns={}, localns=names)


def parameters_of(function: Callable[..., Any], *, skip: Sequence[str] = ()) -> dict[str, inspect.Parameter]:
    """Named parameters of ``function`` (for a class: of its constructor), with annotations resolved."""
    target = function.__init__ if inspect.isclass(function) else function
    hints = hints_of(target)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in named and name not in ("self", *skip)
    }


def check_arguments(
    given: Mapping[str, Any], function: Callable[..., Any], where: str, *, skip: Sequence[str] = ()
) -> dict[str, Any]:
    """Keyword arguments for ``function``: unknown names, missing names and wrong types are refused.

    Args:
        given: Name -> value, as YAML gave it.
        function: The function or class that will be called.
        where: Place in the recipe, for messages.
        skip: Parameters that the library fills in and a recipe may not give.

    Returns:
        The arguments, lists turned into tuples where the annotation says so.
    """
    parameters = parameters_of(function, skip=skip)
    check_keys(given, parameters, where)
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in given]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} must be given.")
    return {name: coerce(value, parameters[name].annotation, f"{where}.{name}") for name, value in given.items()}


def describe(annotation: Any) -> str:
    """An annotation in words that fit an error message."""
    if annotation is type(None):
        return "null"
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(a) for a in typing.get_args(annotation)))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(annotation)))
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in annotation)
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", dict: "a mapping"}
    if (kind := origin or annotation) not in (str, dict) and inspect.isclass(kind) and issubclass(kind, Sequence):
        items = [a for a in typing.get_args(annotation) if a is not Ellipsis]
        return "a list" + (f" of ({', '.join(map(describe, items))})" if items else "")
    return names.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """``value`` as ``annotation`` wants it: a list becomes a tuple where it must; an integer counts as a number.

    Raises:
        RecipeError: names the place, the value and the expected type.
    """
    try:
        return _coerce(value, annotation)
    except TypeError:
        kind = {type(None): "null", dict: "a mapping"}.get(type(value), repr(value))
        quoted = " Write it without quotes." if isinstance(value, str) and _is_scalar(value, annotation) else ""
        raise RecipeError(f"{where}: expected {describe(annotation)}, got {kind}.{quoted}") from None


def _is_scalar(text: str, annotation: Any) -> bool:
    try:
        _coerce(yaml.load(text, Loader=_Loader), annotation)
    except (TypeError, ValueError, yaml.YAMLError):
        return False
    return True


def _coerce(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, typing.TypeVar):
        return value
    if origin is typing.Annotated:
        return _coerce(value, args[0])
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args)
    if origin is Literal:
        return _accept(value, any(value == choice and type(value) is type(choice) for choice in args))
    if inspect.isclass(annotation) and issubclass(annotation, enum.Enum):
        return _accept(value, value in [member.value for member in annotation])
    kind = origin or annotation
    if kind is float:
        return _accept(value, isinstance(value, int | float) and not isinstance(value, bool))
    if kind is int:
        return _accept(value, isinstance(value, int) and not isinstance(value, bool))
    if kind is Path:
        return Path(_accept(value, isinstance(value, str)))
    if kind is tuple and args:
        return _coerce_tuple(value, args)
    if inspect.isclass(kind) and issubclass(kind, Sequence) and not issubclass(kind, str):
        _accept(value, isinstance(value, list | tuple))
        items = [_coerce(item, args[0]) if args else item for item in value]
        return tuple(items) if kind is tuple else items
    if inspect.isclass(kind) and issubclass(kind, Mapping):
        return _accept(value, isinstance(value, dict))
    return _accept(value, isinstance(value, kind)) if inspect.isclass(kind) else value


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    enums = [m for m in members if inspect.isclass(m) and issubclass(m, enum.Enum)]
    if enums and isinstance(value, str):  # transformers writes "SchedulerType | str" where only the enum's values do
        members = tuple(m for m in members if m is not str)
    for member in sorted(members, key=lambda m: m is not type(value)):  # 1 stays an integer in "float | int"
        try:
            return _coerce(value, member)
        except TypeError:
            continue
    raise TypeError


def _coerce_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    _accept(value, isinstance(value, list | tuple))
    if args[-1] is Ellipsis:
        return tuple(_coerce(item, args[0]) for item in value)
    _accept(value, len(value) == len(args))
    return tuple(_coerce(item, kind) for item, kind in zip(value, args, strict=True))


def _accept(value: Any, condition: bool) -> Any:
    if not condition:
        raise TypeError
    return value
