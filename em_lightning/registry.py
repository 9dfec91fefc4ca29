"""Registries of classes by name, which build an object from a key, a mapping, a class or an instance."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_IMPORTABLE = ("torch.nn.", "em_lightning.")  # packages whose modules a class_path may import


def import_class(path: str, base: type = object) -> type[Any]:
    """Return the class with a dotted path, which may come from a checkpoint of someone else.

    Importing a module runs its code. Therefore only modules of torch.nn and em_lightning are imported, except their
    ``__main__`` modules; others must be imported already. ValueError otherwise, or if it is no subclass of ``base``.
    """
    module, _, name = str(path).rpartition(".")
    if module not in sys.modules and (not module.startswith(_IMPORTABLE) or "__main__" in module.split(".")):
        raise ValueError(f"class_path={path!r} is in a module not imported yet; if you trust it, import {module}")
    try:
        found = importlib.import_module(module)
        # getattr() for the lazy names of em_lightning, vars() for torch, whose __getattr__ may import more modules.
        cls = getattr(found, name, None) if module.startswith("em_lightning") else vars(found).get(name)
    except ImportError as error:
        raise ValueError(f"class_path={path!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"class_path={path!r} is not a class derived from {base.__module__}.{base.__qualname__}")
    return cls


class Registry(Generic[T]):
    """A mapping from keys to classes that builds objects.

    Other packages add classes with an entry point in the group ``em_lightning.<group>``: its name is the key, its value
    the class. Entry points are loaded at the first lookup that needs them, not at import.

    Args:
        kind: singular noun for error messages, such as "kernel".
        group: last part of the entry-point group, or ``None`` for a registry without plug-ins.
        base: classes given by ``class_path`` must be derived from this one.

    Example:
        >>> shapes = Registry("shape")
        >>> @shapes.register("round")
        ... class Round:
        ...     def __init__(self, radius=1.0):
        ...         self.radius = radius
        >>> list(shapes), shapes.build("round").radius
        (['round'], 1.0)
        >>> shapes.build({"name": "round", "radius": 3.0}).radius
        3.0
        >>> shapes.build("rond")
        Traceback (most recent call last):
        ValueError: unknown shape 'rond'; did you mean 'round'? Known: round
    """

    def __init__(self, kind: str, group: str | None = None, base: type = object) -> None:
        self.kind = kind
        self.base = base
        self._classes: dict[str, type[T]] = {}
        self._plugin_group = group and f"em_lightning.{group}"  # None after loading

    def register(self, key: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that registers the class under ``key``, a lower-case identifier."""
        if not key.isidentifier() or key != key.lower():
            raise ValueError(f"key={key!r} of a {self.kind} must be a lower-case identifier, such as 'my_part'")
        return lambda cls: self._add(key, cls)

    def _add(self, key: str, cls: type[T]) -> type[T]:
        known = self._classes.setdefault(key, cls)
        # A reloaded module defines the same class again.
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{self.kind} {key!r} is already {known}; register {cls} under another key")
        self._classes[key] = cls
        return cls

    def _with_plugins(self) -> dict[str, type[T]]:
        group, self._plugin_group = self._plugin_group, None
        for entry in entry_points(group=group) if group else ():
            try:
                cls = entry.load()
            except Exception as error:  # any error in the code of another package
                message = f"{self.kind} {entry.name!r} cannot be loaded from {entry.value!r}: {error}"
                raise ImportError(message) from error
            self._add(entry.name, cls)
        return self._classes

    def __getitem__(self, key: str) -> type[T]:
        if key not in self:
            similar = difflib.get_close_matches(str(key), self._classes, n=1)
            hint = f"; did you mean {similar[0]!r}?" if similar else "."
            raise ValueError(f"unknown {self.kind} {key!r}{hint} Known: {', '.join(sorted(self._classes))}")
        return self._classes[key]

    def __contains__(self, key: object) -> bool:
        return key in self._classes or key in self._with_plugins()

    def __iter__(self) -> Iterator[str]:
        return iter(self._with_plugins())

    def __len__(self) -> int:
        return len(self._with_plugins())

    def resolve(self, spec: str | type | Mapping[str, Any]) -> tuple[type[T], dict[str, Any]]:
        """Return the class and the constructor arguments that a key, a class or a mapping describes."""
        if isinstance(spec, type):
            return spec, {}
        if isinstance(spec, str):
            return self[spec], {}
        if "class_path" in spec:
            return import_class(spec["class_path"], self.base), dict(spec.get("init_args") or {})
        if "name" not in spec:
            raise ValueError(f"{dict(spec)!r} has no 'name' of a {self.kind}; write {{'name': KEY, ...}}")
        return self[spec["name"]], {str(key): value for key, value in spec.items() if key != "name"}

    def build(self, spec: Any, **arguments: Any) -> T:
        """Build an object.

        Args:
            spec: a key; a class; ``{"name": key, **arguments}`` or ``{"class_path": ..., "init_args": {...}}``; or an
                instance, which is returned unchanged.
            **arguments: constructor arguments, overridden by those of a mapping.

        Raises:
            ValueError: the key is unknown, or the mapping has neither ``name`` nor an importable ``class_path``.
            TypeError: ``spec`` is none of these, arguments are given with an instance, or the constructor refuses them.
        """
        if isinstance(spec, (str, type, Mapping)):
            cls, options = self.resolve(spec)
            try:
                return cls(**{**arguments, **options})
            except TypeError as error:
                raise TypeError(f"{self.kind} {spec!r}: {error}") from error
        if not callable(spec):  # an instance is a module or a function
            keys = ", ".join(sorted(self))
            raise TypeError(f"{spec!r} is not a {self.kind}: give a key ({keys}), a class, a mapping or an instance")
        if arguments:
            names = ", ".join(sorted(arguments))
            raise TypeError(f"{names} cannot be set on an instance of {type(spec).__name__}; give its key or class")
        return spec
