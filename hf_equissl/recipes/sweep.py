"""Sweeps: one YAML file that names many runs, each a recipe with some values set.

```yaml
description: One line.
sweep:
  - name: "weight-{weight}_size-{equivariant_size}"      # {end of a key below}: the run's name and folder
    extends: vits16_ibot_se2.yaml                        # the recipe that the runs start from
    set: {training.num_train_epochs: 100}                # optional: values of all its runs
    cross:                                               # every combination; the last key changes fastest
      objectives.equivariance.0.weight: [0.1, 1]
      model.equivariant_size: [256, 2048]
  - name: "between-{num_intermediate_images}"
    extends: vits16_vicreg_rot.yaml
    zip:                                                 # the first values together, then the second ones
      objectives.equivariance.0.num_intermediate_images: [1, 2, 3]
```

Needs no torch: a sweep is listed at once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from string import Formatter
from typing import Any

from ..utils.coercion import coerce
from ..utils.suggestions import RecipeError, check_keys, did_you_mean
from .overrides import SECTIONS, apply_overrides, as_mapping, find_parent, read_mapping, read_recipe

MOST_RUNS = 10_000
_GRIDS = ("cross", "zip")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
SEED = "training.seed"
# As a pattern of names says it, with what stands between it and the rest.
_SEED_IN_NAME = re.compile(r"[._+-]?(?:seed)?[._+-]?\{(?:training\.)?seed\}")


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: Name of the run and its folder.
        recipe: File of the recipe that it starts from.
        overrides: Dotted key -> value.
        system: ``name`` without the seed.
    """

    name: str
    recipe: Path
    overrides: dict[str, Any]
    system: str = ""

    @property
    def words(self) -> list[str]:
        """The overrides as words of a command line."""
        return [word for key, value in self.overrides.items() for word in (f"--{key}", json.dumps(value))]


def is_sweep(path: str | Path) -> bool:
    """Whether the YAML file ``path`` names a sweep."""
    return "sweep" in read_mapping(Path(path), "recipe")


def read_sweep(path: str | Path, search: Sequence[str | Path] = ()) -> list[Member]:
    """Read the runs of a sweep, in the order of the file.

    Args:
        path: YAML file.
        search: Further folders in which ``extends`` may find a file.

    Raises:
        RecipeError: The file is not a sweep or has unknown keys; a recipe is missing; a key does not exist in it; two
            runs share a name.
    """
    path = Path(path)
    raw = read_mapping(path, "sweep")
    if "sweep" not in raw:
        raise RecipeError(f"{path.name} is the recipe of one run: start it with training/pretrain.py.")
    check_keys(raw, ("description", "sweep"), str(path))
    members: list[Member] = []
    for index, grid in enumerate(coerce(raw["sweep"] or [], list, f"{path.name}: sweep")):
        members += _read_grid(as_mapping(grid, f"sweep.{index}"), f"{path.name}: sweep.{index}", (path.parent, *search))
    if not members:
        raise RecipeError(f"{path.name}: sweep is an empty list. Name at least one grid.")
    names = [member.name for member in members]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise RecipeError(
            f"{path.name}: two runs are called {twice[0]!r}. Put the keys that tell them apart into `name`, as {{key}}."
        )
    return members


def choose(members: Sequence[Member], names: Sequence[str]) -> list[Member]:
    """Choose the members called ``names``, or of systems called so, in the sweep's order; without names, all of them.

    Raises:
        RecipeError: A name does not exist; the nearest one is named.
    """
    known = [member.name for member in members]
    systems = dict.fromkeys(member.system for member in members)
    for name in names:
        if name not in known and name not in systems:
            hint = did_you_mean(name, [*known, *systems])
            raise RecipeError(f"--only {name}: no run of this name.{hint} Runs: {', '.join(known)}.")
    return [member for member in members if not names or member.name in names or member.system in names]


def group_by_system(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Group members that differ in ``training.seed`` alone, by the name of their system, in the sweep's order.

    Raises:
        RecipeError: Two systems have the same name.
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        group = groups.setdefault(member.system or member.name, [])
        if group and _drop_seed(group[0]) != _drop_seed(member):
            raise RecipeError(
                f"{group[0].name} and {member.name} differ in more than {SEED}, and without it both are called "
                f"{member.system!r}. Put what tells them apart into `name`."
            )
        group.append(member)
    return groups


def _drop_seed(member: Member) -> tuple[Path, dict[str, Any]]:
    return member.recipe, {key: value for key, value in member.overrides.items() if key != SEED}


def _read_grid(grid: dict[str, Any], where: str, folders: Sequence[str | Path]) -> list[Member]:
    check_keys(grid, ("name", "extends", "set", *_GRIDS), where)
    kinds = [kind for kind in _GRIDS if kind in grid]
    for key in ("name", "extends"):
        if key not in grid:
            raise RecipeError(f"{where}: `{key}` must be given.")
    if len(kinds) != 1:
        raise RecipeError(f"{where}: expected `cross` (every combination) or `zip` (side by side), got {len(kinds)}.")
    pattern = coerce(grid["name"], str, f"{where}.name")
    recipe = find_parent(grid["extends"], folders, where)
    fixed = as_mapping(grid.get("set"), f"{where}.set")
    varied = {
        key: coerce(values, list, f"{where}.{kinds[0]}.{key}")
        for key, values in as_mapping(grid[kinds[0]], f"{where}.{kinds[0]}").items()
    }
    _check_grid(fixed, varied, kinds[0], where)
    raw = read_recipe(recipe, [Path(folder) for folder in folders])
    combine = product if kinds[0] == "cross" else zip
    members = []
    for values in combine(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        apply_overrides(raw, fixed | chosen)  # raises for keys that the recipe does not have
        name, system = _name(pattern, chosen, where), ""
        if SEED in chosen and (without := _SEED_IN_NAME.sub("", pattern).strip("._+-")):
            system = _name(without, chosen, where)
        members.append(Member(name, recipe, fixed | chosen, system or name))
    return members


def _check_grid(fixed: Mapping[str, Any], varied: Mapping[str, list[Any]], kind: str, where: str) -> None:
    for key in (*fixed, *varied):
        section, _, rest = key.partition(".")
        if section not in SECTIONS or not rest:
            raise RecipeError(f"{where}: {key!r} is no dotted key such as training.max_steps. Sections: {SECTIONS}.")
    if both := fixed.keys() & varied.keys():
        raise RecipeError(f"{where}: {min(both)!r} stands under `set` and under `{kind}`. Keep one of them.")
    lengths = {key: len(values) for key, values in varied.items()}
    if not lengths or min(lengths.values()) == 0:
        raise RecipeError(f"{where}.{kind}: expected keys with lists of at least one value, got {dict(varied)}.")
    if kind == "zip" and len(set(lengths.values())) > 1:
        raise RecipeError(f"{where}.zip: the lists must be equally long, got {lengths}.")
    count = prod(lengths.values()) if kind == "cross" else max(lengths.values())
    if count > MOST_RUNS:
        raise RecipeError(f"{where}.{kind}: {count} runs are more than a sweep can have, {MOST_RUNS}. Shorten a list.")


class _Keys(Formatter):
    """Fills a pattern whose fields are dotted keys, or their ends as far as only one key ends so."""

    def get_field(self, field_name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[str, str]:
        """Return the value of the key that is meant, as a text.

        Raises:
            KeyError: No key ends so.
            RecipeError: Several keys do.
        """
        ends = [key for key in kwargs if f".{key}".endswith(f".{field_name}")]
        found = [field_name] if field_name in kwargs else ends
        if len(found) > 1:
            fields = " or ".join(f"{{{_shortest_end(key, kwargs)}}}" for key in found)
            raise RecipeError(f"{{{field_name}}} is the end of {' and of '.join(found)}. Write {fields}.")
        if not found or not field_name:
            raise KeyError(field_name)
        value = kwargs[found[0]]
        return value if isinstance(value, str) else json.dumps(value), field_name


def _shortest_end(key: str, keys: Iterable[str]) -> str:
    """Return the shortest end of a key, in whole words, with which no other key ends."""
    words = key.split(".")
    ends = (".".join(words[start:]) for start in range(len(words) - 1, 0, -1))
    return next((end for end in ends if sum(f".{each}".endswith(f".{end}") for each in keys) == 1), key)


def _name(pattern: str, chosen: Mapping[str, Any], where: str) -> str:
    try:
        name = _Keys().vformat(pattern, (), chosen)
    except RecipeError as error:
        raise RecipeError(f"{where}.name: {pattern!r}: {error}") from error
    except (KeyError, IndexError, ValueError) as error:
        fields = ", ".join(f"{{{_shortest_end(key, chosen)}}}" for key in chosen)
        raise RecipeError(f"{where}.name: {pattern!r} may hold {fields}; {error} is none of them.") from error
    if not _NAME.fullmatch(name):
        raise RecipeError(f"{where}.name: {name!r} cannot be a folder's name. Use letters, digits and . _ + - only.")
    return name
