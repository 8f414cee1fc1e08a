"""Values of recipes and options as the types that the code wants, checked one by one."""

from __future__ import annotations

import builtins
import enum
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from huggingface_hub.dataclasses import type_validator

from .plain_values import shorten
from .strict_yaml import load_yaml
from .suggestions import RecipeError, check_keys


class _Names(dict[str, Any]):
    """Names that only a type checker imports stand for anything."""

    def __missing__(self, name: str) -> Any:
        return Any


def hints_of(owner: Callable[..., Any]) -> dict[str, Any]:
    """Resolve the annotations of a function, or of a class's own fields (those of its parents are left out)."""
    names = _Names(vars(builtins) | vars(sys.modules[owner.__module__]))
    own = types.SimpleNamespace(__annotations__=dict(owner.__annotations__))
    return typing.get_type_hints(own, globalns={}, localns=names)


def parameters_of(function: Callable[..., Any], *, skip: Sequence[str] = ()) -> dict[str, inspect.Parameter]:
    """List the named parameters of ``function`` (for a class: of its constructor), with annotations resolved.

    A constructor with ``**kwargs`` hands them to the one of its parent class, whose parameters come after its own.
    """
    owners = [owner for owner in function.__mro__[:-1]] if inspect.isclass(function) else []
    targets = [vars(owner)["__init__"] for owner in owners if "__init__" in vars(owner)] if owners else [function]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found: dict[str, inspect.Parameter] = {}
    for target in targets:
        hints, signature = hints_of(target), inspect.signature(target).parameters
        for name, parameter in signature.items():
            if parameter.kind in named and name not in ("self", *skip):
                found.setdefault(name, parameter.replace(annotation=hints.get(name, Any)))
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values()):
            break
    return found


def check_arguments(
    given: Mapping[str, Any], function: Callable[..., Any], where: str, *, skip: Sequence[str] = ()
) -> dict[str, Any]:
    """Check keyword arguments for ``function``.

    Args:
        given: Name -> value, as YAML gave it.
        function: The function or class that will be called.
        where: Place in the recipe, for messages.
        skip: Parameters that the library fills in and a recipe may not give.

    Returns:
        The arguments, lists turned into tuples where the annotation says so.

    Raises:
        RecipeError: A name is unknown or missing, or a value has another type.
    """
    parameters = parameters_of(function, skip=skip)
    check_keys(given, parameters, where)
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in given]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} must be given.")
    return {name: coerce(value, parameters[name].annotation, f"{where}.{name}") for name, value in given.items()}


def describe(annotation: Any) -> str:
    """Put an annotation into words for an error message."""
    if annotation is type(None):
        return "null"
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, _members(typing.get_args(annotation)))))
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
    """Return ``value`` as ``annotation`` wants it: a list becomes a tuple where it must; an integer counts as a number.

    Raises:
        RecipeError: It names the place, the value and the expected type.
    """
    try:
        return _coerce(value, annotation)
    except TypeError:
        kind = {type(None): "null", dict: "a mapping"}.get(type(value)) or shorten(value)
        quoted = " Write it without quotes." if isinstance(value, str) and _is_scalar(value, annotation) else ""
        raise RecipeError(f"{where}: expected {describe(annotation)}, got {kind}.{quoted}") from None


def _is_scalar(text: str, annotation: Any) -> bool:
    try:
        _coerce(load_yaml(text, "value"), annotation)
    except (TypeError, ValueError):  # what is no YAML raises one of these, too
        return False
    return True


def _coerce(value: Any, annotation: Any) -> Any:
    """Bring what YAML has no word for into shape (tuples, paths, values of enums); the rest must have its type."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _coerce(value, args[0])
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args)
    kind = origin or annotation
    is_class = inspect.isclass(kind)
    if is_class and issubclass(kind, enum.Enum):
        return _accept(value, value in [member.value for member in kind])
    if kind is float and type(value) is int:
        return value
    if kind is Path:
        return Path(_accept(value, isinstance(value, str)))
    if is_class and issubclass(kind, Sequence) and kind is not str:
        return _coerce_items(value, kind, args)
    if is_class and issubclass(kind, Mapping):
        return _accept(value, isinstance(value, dict))
    if is_class or origin is Literal:
        type_validator("value", value, annotation)
    return value


def _members(union: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drop ``str`` beside an enum: transformers writes "SchedulerType | str" where only the enum's values do."""
    enums = [member for member in union if inspect.isclass(member) and issubclass(member, enum.Enum)]
    return tuple(member for member in union if member is not str) if enums else union


def _coerce_union(value: Any, members: tuple[Any, ...]) -> Any:
    for member in sorted(_members(members), key=lambda m: m is not type(value)):  # 1 stays an integer in "float | int"
        try:
            return _coerce(value, member)
        except TypeError:
            continue
    raise TypeError


def _coerce_items(value: Any, kind: type, args: tuple[Any, ...]) -> Sequence[Any]:
    _accept(value, isinstance(value, list | tuple))
    if kind is tuple and args and args[-1] is not Ellipsis:
        _accept(value, len(value) == len(args))
        return tuple(map(_coerce, value, args))
    items = [_coerce(item, args[0]) if args else item for item in value]
    return tuple(items) if kind is tuple else items


def _accept(value: Any, condition: bool) -> Any:
    if not condition:
        raise TypeError
    return value
