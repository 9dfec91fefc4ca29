"""Named parts that a string, a mapping, a class or an instance can stand for."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def import_class(path: str, base: type = object) -> type[Any]:
    """Return the class that a dotted path such as ``package.module.Name`` stands for.

    Args:
        path: the path, which may come from a file that somebody else wrote.
        base: what the class must be derived from, so that such a file cannot have anything else called.

    Raises:
        ValueError: there is no such class, or it is not derived from the base.
    """
    room, _, name = str(path).rpartition(".")
    try:
        cls = getattr(importlib.import_module(room), name, None) if room else None
    except (ImportError, TypeError) as error:  # TypeError: a relative path
        raise ValueError(f"class_path={path!r} cannot be imported: {error}") from error
    if not isinstance(cls, type):
        raise ValueError(f"class_path={path!r} is no class; write package.module.ClassName")
    if not issubclass(cls, base):
        raise ValueError(f"class_path={path!r} is no {base.__module__}.{base.__qualname__}, and is not built")
    return cls


class Registry(Generic[T]):
    """A mapping from names to classes that builds a part from whatever names it.

    Other packages add parts without an import of theirs in user code: an entry point in the group
    ``em_lightning.<group>`` whose name is the key and whose value is the class. Entry points are read
    at the first look-up that needs them, so importing the library runs nobody else's code.

    Args:
        kind: what the parts are, in the singular, as error messages say it ("kernel").
        group: the last word of the entry-point group; ``None`` takes no plug-ins.
        base: what a class named by ``class_path`` must be derived from.

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
        self.group = None if group is None else f"em_lightning.{group}"
        self._classes: dict[str, type[T]] = {}
        self._plugins_read = group is None

    def register(self, key: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that files the class under ``key``.

        Raises:
            ValueError: another class already has the key, or the key is no plain lower-case name.
        """
        if not key.isidentifier() or key != key.lower():
            raise ValueError(f"key={key!r} is no name for a {self.kind}: use a lower-case identifier such as 'my_part'")

        def file(cls: type[T]) -> type[T]:
            self._add(key, cls)
            return cls

        return file

    def _add(self, key: str, cls: type[T]) -> None:
        present = self._classes.get(key)
        # A reloaded module defines its classes anew; that is no clash between two authors.
        if present is not None and (present.__module__, present.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{self.kind} {key!r} is already {present.__module__}.{present.__qualname__}; "
                f"register {cls.__module__}.{cls.__qualname__} under another name"
            )
        self._classes[key] = cls

    def _read_plugins(self) -> None:
        if self._plugins_read:
            return
        self._plugins_read = True
        for entry in entry_points(group=str(self.group)):
            try:
                cls = entry.load()
            except Exception as error:  # a broken plug-in must not take the built-in parts down with it
                raise ImportError(
                    f"the {self.kind} {entry.name!r} of another package could not be loaded from {entry.value!r}: "
                    f"{error}; repair or uninstall that package"
                ) from error
            self._add(entry.name, cls)

    def __getitem__(self, key: str) -> type[T]:
        if key not in self._classes:
            self._read_plugins()
        if key not in self._classes:
            near = difflib.get_close_matches(str(key), self._classes, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown {self.kind} {key!r}{hint} Known: {', '.join(sorted(self._classes))}")
        return self._classes[key]

    def __contains__(self, key: object) -> bool:
        if key not in self._classes:
            self._read_plugins()
        return key in self._classes

    def __iter__(self) -> Iterator[str]:
        self._read_plugins()
        return iter(self._classes)

    def __len__(self) -> int:
        self._read_plugins()
        return len(self._classes)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self)})"

    def name_of(self, part: object) -> str | None:
        """Return the key of a part's class, or ``None`` where it has none."""
        cls = part if isinstance(part, type) else type(part)
        return next((key for key in self if self._classes[key] is cls), None)

    def build(self, spec: Any, **arguments: Any) -> T:
        """Build a part from a key, a class, a mapping or an instance.

        Args:
            spec: a key; a class; ``{"name": key, **arguments}`` (or ``class_path`` with ``init_args``, as configs
                write it); or an instance, which is returned as it is.
            **arguments: constructor arguments; those in a mapping win over these.

        Raises:
            ValueError: the key is unknown, or a mapping names no part.
            TypeError: arguments came together with an instance, or the constructor does not take them.
        """
        if isinstance(spec, str):
            return self._construct(self[spec], repr(spec), arguments)
        if isinstance(spec, type):
            return self._construct(spec, spec.__qualname__, arguments)
        if isinstance(spec, Mapping):
            return self._build_mapping(spec, arguments)
        if spec is None or not callable(spec):
            raise TypeError(
                f"{spec!r} stands for no {self.kind}: give a key ({', '.join(sorted(self))}), a class, "
                f"a mapping with 'name', or an instance"
            )
        if arguments:
            raise TypeError(
                f"the {self.kind} {type(spec).__name__} is built already and cannot take "
                f"{', '.join(sorted(arguments))}; give its key or class instead"
            )
        return spec

    def _build_mapping(self, spec: Mapping[str, Any], arguments: dict[str, Any]) -> T:
        if "class_path" in spec:
            given = spec.get("init_args") or {}
            cls = import_class(spec["class_path"], self.base)
            return self._construct(cls, cls.__name__, {**arguments, **given})
        if "name" not in spec:
            raise ValueError(f"{dict(spec)!r} names no {self.kind}; write {{'name': KEY, ...}}")
        given = {str(key): value for key, value in spec.items() if key != "name"}
        return self.build(spec["name"], **{**arguments, **given})

    def _construct(self, cls: type[Any], name: str, arguments: dict[str, Any]) -> Any:
        try:
            return cls(**arguments)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise TypeError(f"{self.kind} {name}: {error}") from error


def from_options(argument: str, cls: type[T], options: Mapping[str, Any]) -> T:
    """Return ``cls(**options)``, for an argument that may be a mapping of options.

    Args:
        argument: its name, for messages.
        cls: the class that the options are for.
        options: keyword arguments.

    Raises:
        TypeError: the class takes no such option; the message names those that it takes.

    Example:
        >>> from em_lightning.mixture import UniformBackground
        >>> from_options("background", UniformBackground, {"wait": 0.1})
        Traceback (most recent call last):
            ...
        TypeError: background={'wait': 0.1}: there is no 'wait'; give weight, energy, learnable or estimate
    """
    known = [str(name) for name in inspect.signature(cls).parameters]
    for name in options:
        if name not in known:
            choices = f"{', '.join(known[:-1])} or {known[-1]}"
            raise TypeError(f"{argument}={dict(options)!r}: there is no {name!r}; give {choices}")
    return cls(**options)
