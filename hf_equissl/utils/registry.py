"""Registries: classes by the names that recipes and commands give them, open to classes of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from .suggestions import check_known

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])

__all__ = ["Later", "Registry"]


class Later:
    """A class that a registry imports when it is asked for, so that its name and options are known without torch.

    Args:
        module: Full name of its module.
        name: Its name there.
        **declared: Attributes of the class that ``Registry.read_declared`` tells before it is imported.
    """

    def __init__(self, module: str, name: str, **declared: Any) -> None:
        self.module, self.name, self.attributes = module, name, declared

    def load(self) -> type[Any]:
        """Import the class.

        Raises:
            RuntimeError: What is declared of it is not what it has.
        """
        cls = getattr(import_module(self.module), self.name)
        for attribute, value in self.attributes.items():
            if getattr(cls, attribute) != value:
                raise RuntimeError(f"{self.name}.{attribute} is not what the registry declares: {value!r}.")
        return cls


class Registry(MutableMapping[str, type[T]], Generic[T]):
    """A mapping of names to classes. An unknown name meets its nearest neighbour, a taken one is refused.

    A class of your own becomes known to recipes, checkpoints and commands once the module that registers it has been
    imported::

        @INVARIANCE_OBJECTIVES.register("mine")
        class MyObjective(Objective): ...

    Args:
        kind: What the classes are, for messages, e.g. "objective".
        base: The class that all of them derive from.
        entries: Name -> class, or where it is imported from.
    """

    def __init__(self, kind: str, base: Callable[..., T] | Later, entries: Mapping[str, type[T] | Later]) -> None:
        self.kind, self.base = kind, base
        self._entries: dict[str, type[Any] | Later] = dict(entries)

    def register(self, name: str) -> Callable[[C], C]:
        """Make a decorator that adds a class under ``name``.

        Raises:
            ValueError: Another class has the name, or the class does not derive from ``base``.
        """

        def add(cls: C) -> C:
            base: Any = self.base.load() if isinstance(self.base, Later) else self.base
            if not issubclass(cls, base):
                raise ValueError(f"{cls.__qualname__} is no {self.kind}: it has to derive from {base.__qualname__}.")
            known: type[Any] = self.setdefault(name, cls)
            if known is not cls:
                raise ValueError(f"The {self.kind} {name!r} exists: {known.__qualname__}. Choose another name.")
            return cls

        return add

    def read_declared(self, name: str, attribute: str) -> Any:
        """Return an attribute of a class, without importing the class where it is declared.

        Raises:
            RecipeError: There is no class of this name.
        """
        entry = self._entries.get(name)
        if isinstance(entry, Later) and attribute in entry.attributes:
            return entry.attributes[attribute]
        return getattr(self[name], attribute)

    def __getitem__(self, name: str) -> type[T]:
        """Return the class of this name.

        Raises:
            RecipeError: There is none; it names the nearest one and all valid ones.
        """
        if name not in self._entries:
            check_known(name, sorted(self), self.kind)
        entry = self._entries[name]
        if isinstance(entry, Later):
            entry = self._entries[name] = entry.load()
        return entry

    def get(self, name: str, default: Any = None) -> Any:
        """Return the class of this name, or ``default`` where there is none."""
        if name not in self:
            return default
        return self[name]

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return the class of this name, which is ``default`` from now on where there was none."""
        if name not in self:
            self[name] = default
        return self[name]

    def pop(self, name: str, *default: Any) -> Any:
        """Take the class of this name out and return it; where there is none, ``default`` or as ``[]`` does."""
        if name not in self and default:
            return default[0]
        cls = self[name]
        del self[name]
        return cls

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __setitem__(self, name: str, cls: type[T]) -> None:
        self._entries[name] = cls

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
