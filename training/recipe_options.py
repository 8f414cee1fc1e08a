"""Recipes as the scripts are told of them: by name or file, with values from the command line. Needs no torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_equissl.data.errors import ImageSourceError
from hf_equissl.data.places import check_place
from hf_equissl.encoders.places import check_source
from hf_equissl.recipes.overrides import parse_overrides, resolve_recipe
from hf_equissl.utils.commands import option_names
from hf_equissl.utils.files import is_file
from hf_equissl.utils.load_errors import LoadError
from hf_equissl.utils.strict_yaml import load_yaml
from hf_equissl.utils.suggestions import RecipeError, did_you_mean

if TYPE_CHECKING:
    from hf_equissl.recipes.recipe import Recipe

RECIPES = Path(__file__).resolve().parent / "recipes"


def parse_words(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Split a command line into the options of ``parser`` and the values of the recipe, ``--section.key VALUE``.

    Raises:
        RecipeError: A word is neither.
    """
    options, rest = parser.parse_known_args(argv)
    overrides = parse_overrides(rest, option_names(parser))
    if options.imports:
        overrides["imports"] = options.imports
    return options, overrides


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add ``--import MODULE``, which every command that reads a recipe takes."""
    text = "import a module of yours that registers objectives or transformations; repeat it for more (imports)"
    parser.add_argument("--import", dest="imports", action="append", metavar="MODULE", help=text)


def import_words(overrides: dict[str, Any]) -> list[str]:
    """Write the modules among ``overrides`` as words of a command line."""
    return [word for name in overrides.get("imports", ()) for word in ("--import", name)]


def set_value(overrides: dict[str, Any], key: str, option: str, value: Any) -> None:
    """Set a value of the recipe that has an ``option`` of its own, if it was given.

    Raises:
        RecipeError: It was given as ``--key VALUE`` too.
    """
    if value is not None:
        if key in overrides:
            raise RecipeError(f"{option} and --{key} say the same: give one of them.")
        overrides[key] = value


def find_recipe(name: str | None) -> Path:
    """Find the file of ``--recipe NAME|PATH``.

    Raises:
        RecipeError: None is named, or no recipe that ships has this name.
    """
    if name is None:
        raise RecipeError("--recipe is missing: a name (training/pretrain.py --list_recipes) or a YAML file.")
    return find_file(name, RECIPES, "--recipe", "recipe")


def find_file(name: str, folder: Path, option: str, what: str) -> Path:
    """Find the YAML file that ``option`` names: one that ships in ``folder``, or a path.

    Raises:
        RecipeError: None that ships has this name.
    """
    given = Path(name)
    is_file_name = name.endswith((".yaml", ".yml"))
    if os.sep in name or (is_file_name and is_file(given)):
        return given
    name = given.stem if is_file_name else name
    path = folder / f"{name}.yaml"
    if not is_file(path):
        names = sorted(item.stem for item in folder.glob("*.yaml"))
        raise RecipeError(
            f"{option} {name}: no {what} of this name.{did_you_mean(name, names)} {what.capitalize()}s: "
            f"{', '.join(names)}; or give a YAML file."
        )
    return path


def load_recipe(name: str | None, overrides: dict[str, Any], *, reads_data: bool = False) -> Recipe:
    """Read the recipe of ``--recipe NAME|PATH`` and set ``overrides`` in it.

    Args:
        name: What stands there.
        overrides: Dotted key -> value.
        reads_data: Whether the command will read data and first weights, which are looked for then.

    Raises:
        RecipeError: There is no such recipe, or it cannot be read; it says where what is missing was looked for.
    """
    path = find_recipe(name)
    raw = resolve_recipe(path, overrides, [RECIPES])
    if reads_data:
        check_places(raw)

    from hf_equissl.recipes.recipe import Recipe

    return Recipe.from_dict(raw, str(path), overrides)


def check_places(raw: dict[str, Any], *, starts: bool = True) -> None:
    """Refuse a resolved recipe whose data or first weights are not where it says, before torch is imported.

    Args:
        raw: As ``resolve_recipe`` returns it; what has a wrong type is refused later.
        starts: Whether first weights will be read: a run that goes on needs none.

    Raises:
        RecipeError: It says what loading them would say.
    """
    data, model = raw.get("data"), raw.get("model")
    source = data.get("source") if isinstance(data, dict) else None
    encoder = model.get("init_from") if isinstance(model, dict) and starts else None
    if isinstance(source, str):
        check_data(source)
    if isinstance(encoder, str):
        try:
            check_source(encoder)
        except LoadError as error:
            raise RecipeError(f"model.init_from (--init_from): {error}") from error


def check_data(source: str) -> None:
    """Refuse a source of images that is not where ``--data`` says.

    Raises:
        RecipeError: It says what loading it would say.
    """
    try:
        check_place(source)
    except ImageSourceError as error:
        raise RecipeError(f"data.source (--data): {error}") from error


def recipe_lines() -> str:
    """List the recipes that ship, a line each: the name and what it is."""
    texts = {
        path.stem: load_yaml(path.read_text(encoding="utf-8"), str(path)) for path in sorted(RECIPES.glob("*.yaml"))
    }
    width = max(map(len, texts), default=0)
    kinds = {name: "[sweep.py] " if "sweep" in raw else "" for name, raw in texts.items()}
    return "\n".join(f"  {name:<{width}}  {kinds[name]}{raw.get('description', '')}" for name, raw in texts.items())
