"""Registries: classes by the names that recipes and commands give them, open to classes of other packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from .suggestions import check_known

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

__all__ = ["Registry"]


class Registry(dict[str, type[T]], Generic[T]):
    """A dictionary of classes by name. An unknown name meets its nearest neighbour, a taken one is refused.

    A class of your own becomes known to recipes, checkpoints and commands once the module that registers it has been
    imported::

        @INVARIANCE_OBJECTIVES.register("mine")
        class MyObjective(Objective): ...

    Args:
        kind: What the classes are, for messages, e.g. "objective".
        base: The class that all of them derive from.
        entries: Name -> class.
    """

    def __init__(self, kind: str, base: Callable[..., T], entries: Mapping[str, type[T]]) -> None:
        super().__init__(entries)
        self.kind, self.base = kind, base

    def register(self, name: str) -> Callable[[C], C]:
        """Make a decorator that adds a class under ``name``.

        Raises:
            ValueError: Another class has the name, or the class does not derive from ``base``.
        """

        def add(cls: C) -> C:
            base: Any = self.base
            if not issubclass(cls, base):
                raise ValueError(f"{cls.__qualname__} is no {self.kind}: it has to derive from {base.__qualname__}.")
            known: type[Any] = self.setdefault(name, cls)
            if known is not cls:
                raise ValueError(f"The {self.kind} {name!r} exists: {known.__qualname__}. Choose another name.")
            return cls

        return add

    def __missing__(self, name: str) -> type[T]:
        """Refuse an unknown name.

        Raises:
            RecipeError: It names the nearest one and all valid ones.
        """
        check_known(name, sorted(self), self.kind)
        raise KeyError(name)
