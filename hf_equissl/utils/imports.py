"""Modules of users, which register classes of their own: objectives, measurements, tasks. Needs no torch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .options import Option
from .suggestions import RecipeError

# Of commands that read no recipe; those that do put the modules into it (``hf_equissl.training.recipe_options``).
IMPORT = Option(
    "--import",
    "import a module of yours that registers measurements, transformations or tasks; repeat it for more",
    "MODULE",
    setting="imports",
    repeated=True,
)


def import_named(argv: Sequence[str] | None) -> None:
    """Import what ``--import`` names in a command line, whose parser is made of what is registered by then.

    What is wrong with the words themselves is left to that parser.

    Raises:
        RecipeError: There is no such module, or importing it fails.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(IMPORT.flag, dest=IMPORT.key, action="append", nargs="?", default=[])
    known, _ = parser.parse_known_args(argv)
    import_modules([name for name in known.imports if name])


def import_modules(names: Sequence[str]) -> None:
    """Import modules from the installed packages or the working directory, so that what they register has its name.

    Raises:
        RecipeError: There is no such module, or importing it fails.
    """
    here = os.getcwd()
    if names and here not in sys.path:
        sys.path.append(here)  # a command that is started by its path finds only what lies beside it
    for name in names:
        if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
            raise RecipeError(
                f"imports (--import): {name!r} is not the name of a module. Give it as in `import my_objectives`, "
                "without folder and .py, and start the command in its folder."
            )
        try:
            import_module(name)
        except (Exception, SystemExit) as error:  # users' code: it may raise anything
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                raise RecipeError(
                    f"imports (--import): there is no module {name!r}, neither among the installed packages nor in "
                    f"{here}. Install it, or start the command in its folder."
                ) from error
            raise RecipeError(
                f"imports (--import): importing {name!r} fails with {type(error).__name__}: {error}"
            ) from error
