"""``hf-equissl recipes``: list the recipes that ship, or print one with everything that it extends."""

from __future__ import annotations

from collections.abc import Sequence

from ..recipes.overrides import parse_overrides, read_mapping, resolve_recipe
from ..training.recipe_options import RECIPES, find_recipe, load_recipe, recipe_lines
from ..utils.commands import command_parser, option_names, path_word, say, stop
from ..utils.strict_yaml import dump_yaml
from ..utils.suggestions import RecipeError

EXAMPLES = """\
examples:
  # all recipes, with what they are
  hf-equissl recipes
  # every value of one, as a file of your own
  hf-equissl recipes vits16_vicreg_rot > mine.yaml
  # the same with other values
  hf-equissl recipes vits16_vicreg_rot --model.image_size 96 --views.transformation.name se2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 for what can be mended."""
    parser = command_parser(
        "hf-equissl recipes",
        usage="hf-equissl recipes [NAME|PATH] [--section.key VALUE ...]",
        description="List the recipes that ship, or print one as a YAML file, with everything that it extends.",
        epilog=EXAMPLES,
    )
    parser.add_argument("recipe", nargs="?", type=path_word, metavar="NAME|PATH", help="the one to print")
    options, rest = parser.parse_known_args(argv)
    try:
        overrides = parse_overrides(rest, option_names(parser))
        if options.recipe is None:
            if overrides:
                raise RecipeError(f"--{next(iter(overrides))}: of which recipe? Name it before the values.")
            say(recipe_lines())
            return 0
        path = find_recipe(options.recipe)
        raw = read_mapping(path, "recipe")
        if overrides:
            load_recipe(options.recipe, overrides)  # refuses what a training would refuse, for which it imports torch
        say(dump_yaml(raw if "sweep" in raw and not overrides else resolve_recipe(path, overrides, [RECIPES])).rstrip())
    except RecipeError as error:
        return stop(error, code=2)
    return 0
