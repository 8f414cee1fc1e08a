"""Dotted overrides, and recipes merged over the ones that they extend: plain data before anything is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from ..utils.coercion import coerce
from ..utils.files import expand_home, is_file, readable_size
from ..utils.plain_values import shorten
from ..utils.strict_yaml import load_yaml
from ..utils.suggestions import RecipeError, check_keys, find_nearest

SECTIONS = ("model", "objectives", "views", "data", "training", "monitor")
TOP_KEYS = ("name", "description", "num_processes", "imports", *SECTIONS)
# Keys of the section `model` that name an encoder to start from.
INIT_KEYS = ("init_from", "init_revision", "init_subfolder")
# Keys that are or may be paths.
PATH_KEYS = {
    "model": ("init_from",),
    "data": ("source", "cache_dir"),
    "training": ("accelerator_config", "deepspeed", "fsdp_config"),
    "monitor": ("source",),
}
MOST_PROCESSES = 1_000_000
LARGEST_FILE = 1_000_000  # bytes of a recipe or a sweep


def resolve_recipe(path: Path, overrides: Mapping[str, Any], search: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a recipe with everything that it extends and set ``overrides`` (dotted key -> value); checks no value.

    Raises:
        RecipeError: As ``read_recipe`` and ``apply_overrides``.
    """
    raw = {"name": path.stem, **read_recipe(path, search)}
    if named := overrides.get("imports"):  # beside those of the recipe, which needs its own
        known = coerce(raw.get("imports") or [], list[str], "imports")
        overrides = {**overrides, "imports": list(dict.fromkeys([*known, *named]))}
    model = raw.get("model")
    if isinstance(model, dict) and overrides.get("model.init_from", source := model.get("init_from")) != source:
        # Those keys belong to another encoder.
        raw["model"] = {key: value for key, value in model.items() if key not in INIT_KEYS}
    return apply_overrides(raw, overrides)


def read_recipe(path: Path, search: Sequence[Path] = (), chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the mapping in ``path`` and merge it over the one that it extends.

    Mappings merge key by key, lists are replaced, and so is a mapping whose ``name`` changes.

    Args:
        path: YAML file.
        search: Folders in which ``extends`` may find a file that is not beside ``path``.
        chain: Files that led here.

    Raises:
        RecipeError: A file is missing or not YAML, has an unknown section, or extends itself in the end.
    """
    path = path.resolve()
    if path in chain:
        raise RecipeError(f"extends goes round in a circle: {' -> '.join(p.name for p in (*chain, path))}.")
    raw = read_mapping(path, "recipe")
    if "sweep" in raw:
        raise RecipeError(
            f"{path.name} is a sweep of many runs. List and run them with: python training/sweep.py --recipe "
            f"{path.stem} --list"
        )
    check_keys(raw, ("extends", *TOP_KEYS), str(path))
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    found = find_parent(parent, (path.parent, *search), str(path))
    base = read_recipe(found, search, (*chain, path))
    for key in ("name", "description"):  # they speak of the other recipe
        base.pop(key, None)
    return _merge(base, raw, top=True)


def find_parent(name: Any, folders: Sequence[str | Path], where: str) -> Path:
    """Find the recipe that ``extends`` names.

    Args:
        name: What stands there.
        folders: Where it may lie, the nearest first.
        where: The file, or the place in it, for messages.

    Raises:
        RecipeError: It is no YAML file in one of the folders.
    """
    name = expand_path(coerce(name, str, f"{where}: extends"), f"{where}: extends")
    if not name.endswith((".yaml", ".yml")):
        raise RecipeError(f"{where}: extends {shorten(name)}, expected a recipe's file, which ends in .yaml.")
    candidates = [Path(folder) / name for folder in folders]
    found = next((candidate for candidate in candidates if is_file(candidate)), None)
    if found is None:
        places = " or ".join(str(candidate.parent) for candidate in candidates)
        raise RecipeError(f"{where}: extends {shorten(name)}, which is not in {places}.")
    return found


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read the mapping in a YAML file, of which messages show no more than keys: it may be another file than was meant.

    Raises:
        RecipeError: It cannot be read, is no regular file (a pipe would never end), too large, or no mapping.
    """
    try:
        if path.exists() and not path.is_dir() and not is_file(path):
            raise RecipeError(f"{path}: the {what} is no regular file. Copy it into one.")
        if is_file(path) and path.stat().st_size > LARGEST_FILE:
            raise RecipeError(f"{path}: the {what} is larger than {readable_size(LARGEST_FILE)}, which none is.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RecipeError(f"{path}: the {what} cannot be read ({reason}).") from error
    raw = load_yaml(text, str(path))
    if raw is not None and not isinstance(raw, dict):
        kind = "a list" if isinstance(raw, list) else "one value"
        raise RecipeError(f"{path}: expected a {what}, keys with values, got {kind}.")
    return raw or {}


def parse_overrides(words: Sequence[str], options: Sequence[str] = ()) -> dict[str, Any]:
    """Turn ``["--training.max_steps", "100", "--data.streaming=true"]`` into dotted keys with values read as YAML.

    Args:
        words: What the command line says beyond the command's own options.
        options: The command's own options, to guess what a misspelt one was meant to be.

    Raises:
        RecipeError: A word is not a dotted option, an option has no value, or one is given twice.
    """
    result: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        option, has_value, text = word.partition("=")
        key = option.removeprefix("--")
        section = key.partition(".")[0]
        if not option.startswith("--") or "." not in key or section not in SECTIONS:
            dotted = {f"--{known}.{key.partition('.')[2]}" for known in SECTIONS} if "." in key else set()
            guess = find_nearest(option, [*options, *dotted])
            hint = f" Did you mean {guess}?" if guess else ""
            raise RecipeError(f"{word!r} is not an option of this command.{hint} See --help.")
        if not has_value:
            if not queue or queue[0].startswith("--"):
                raise RecipeError(f"{option}: a value must follow, e.g. {option} VALUE.")
            text = queue.pop(0)
        if key in result:
            raise RecipeError(f"{option} is given twice.")
        result[key] = load_yaml(text, option)
    return result


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``raw`` with dotted keys set. A number in a key is a position in a list."""
    changed = deepcopy(dict(raw))
    # Names first: a name that changes drops the settings of the entry that it replaces, never those that come with it.
    for key in sorted(overrides, key=lambda k: not k.endswith(".name")):
        _set(changed, key, overrides[key])
    return changed


def expand_paths(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``raw`` whose paths do not begin with ``~``.

    Raises:
        RecipeError: As ``expand_home``.
    """
    expanded = dict(raw)
    for section, keys in PATH_KEYS.items():
        if isinstance(mapping := raw.get(section), dict):
            found = {key: mapping[key] for key in keys if isinstance(mapping.get(key), str)}
            expanded[section] = {
                **mapping,
                **{key: expand_path(text, f"{section}.{key}") for key, text in found.items()},
            }
    return expanded


def expand_path(path: str, where: str) -> str:
    """Put the home folder in place of a ``~`` at the beginning of ``path``.

    Raises:
        RecipeError: There is no such home; ``where`` says which key that concerns.
    """
    try:
        return expand_home(path)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place: Any = raw
    for depth, part in enumerate(parents):
        place = _step(place, part, ".".join(parents[:depth]), key)
    if isinstance(place, list):
        place[_position(last, place, ".".join(parents), key)] = value
    elif isinstance(place, dict):
        if last == "name" and len(parents) > 1 and place.get("name") != value:
            place.clear()
        place[last] = value
    else:
        raise RecipeError(f"--{key}: {'.'.join(parents)} holds the value {shorten(place)}, not keys.")


def _step(place: Any, part: str, where: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_position(part, place, where, key)]
    if not isinstance(place, dict):
        raise RecipeError(f"--{key}: {where} holds the value {shorten(place)}, not keys.")
    if place.get(part) is None:
        place[part] = {}
    return place[part]


def _position(part: str, items: list[Any], where: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise RecipeError(
            f"--{key}: {where} is a list of {len(items)}, so {part!r} must be a position from 0 to {len(items) - 1}."
            if items
            else f"--{key}: {where} is an empty list. Set the whole list, e.g. --{where} '[{{name: ...}}]'."
        )
    return int(part)


def _merge(base: dict[str, Any], over: dict[str, Any], top: bool = False) -> dict[str, Any]:
    if not top and over.get("name", base.get("name")) != base.get("name"):
        return over
    both = (key for key in over if isinstance(base.get(key), dict) and isinstance(over[key], dict))
    return base | over | {key: _merge(base[key], over[key]) for key in both}


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """Return ``value`` if it is a mapping, an empty one for ``None``; raise ``RecipeError`` for anything else."""
    return coerce({} if value is None else value, dict, where)


def check_processes(count: int, where: str, got: str = "") -> None:
    """Refuse a number of processes that no launch can have; lists of them would fill the memory."""
    if not 1 <= count <= MOST_PROCESSES:
        expected = "1 or more" if count < 1 else f"at most {MOST_PROCESSES:,}"
        raise RecipeError(f"{where}: expected {expected}{got}.")
