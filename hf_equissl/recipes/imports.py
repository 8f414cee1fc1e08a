"""Modules of users, which register objectives and transformations of their own. Needs no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..utils.suggestions import RecipeError


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
