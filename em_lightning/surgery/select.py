"""Select modules of a model by class, name pattern or predicate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A buffer of every module that surgery built: its key prevents loading a checkpoint into a model without the surgery.
# Errors and warnings on unexpected keys print it, so it names the functions that load such a checkpoint.
MARKER = "em_surgery__load_with_RestoreSurgery_or_restore_surgery"

Where = type | str | Callable[..., bool] | Sequence[Any]

# Modules that have function forms, and the names of the functions in torch, torch.nn.functional and Tensor.
_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("relu", "relu_"),
    nn.GELU: ("gelu",),
    nn.SiLU: ("silu",),
    nn.LeakyReLU: ("leaky_relu", "leaky_relu_"),
    nn.ELU: ("elu", "elu_"),
    nn.Tanh: ("tanh", "tanh_"),
    nn.Sigmoid: ("sigmoid", "sigmoid_"),
}
FUNCTIONS: dict[Any, type[nn.Module]] = {
    getattr(owner, name): kind
    for kind, names in _NAMES.items()
    for name in names
    for owner in (torch, F, Tensor)
    if hasattr(owner, name)
}


class Site(NamedTuple):
    """One place in a model: attribute ``name`` of ``parent`` holds ``module``, or a function such as ``F.relu``."""

    path: str  # the dotted name from the root, without the _orig_mod of compiled modules
    module: nn.Module  # for a function, the equivalent module
    parent: nn.Module
    name: str
    ancestors: tuple[nn.Module, ...]  # from the root to the parent
    function: Any = None


class NoMatchError(ValueError):
    """No module matches a selection; the message lists the modules of the model."""


def _uncompiled(module: nn.Module) -> nn.Module:
    return dict(module.named_children()).get("_orig_mod", module)  # a stable name, as state_dict keys contain it


def walk(model: nn.Module) -> Iterator[Site]:
    """Yield every site below ``model``, parents first; a shared instance is yielded under each of its names."""
    seen: set[tuple[int, str]] = set()  # the inside of a shared container is visited once

    def visit(parent: nn.Module, prefix: str, ancestors: tuple[nn.Module, ...]) -> Iterator[Site]:
        parent = _uncompiled(parent)
        ancestors = (*ancestors, parent)
        functions = {name: value for name, value in vars(parent).items() if inspect.isroutine(value)}
        # named_children() leaves out an instance's second name
        for name, value in [*parent._modules.items(), *functions.items()]:
            if (id(parent), name) in seen or any(value is above for above in ancestors):
                continue
            seen.add((id(parent), name))
            if isinstance(value, nn.Module):
                yield Site(prefix + name, value, parent, name, ancestors)
                yield from visit(value, f"{prefix}{name}.", ancestors)
            elif value in FUNCTIONS:
                yield Site(prefix + name, FUNCTIONS[value](), parent, name, ancestors, value)

    return visit(model, "", ())


def matches(site: Site, where: Where) -> bool:
    """Return whether a site matches a class, a name pattern, a predicate, or one of a list of these."""
    if isinstance(where, type):
        module = _uncompiled(site.module)
        return isinstance(module, where) or getattr(module, "original_name", None) == where.__name__  # ScriptModule
    if isinstance(where, str):
        return fnmatchcase(site.path, where.replace("_orig_mod.", ""))
    if callable(where):
        arguments = (site.module,) if len(inspect.signature(where).parameters) == 1 else (site.path, site.module)
        return bool(where(*arguments))
    if isinstance(where, Sequence):
        return any(matches(site, one) for one in where)
    raise TypeError(
        f"where={where!r} must be a class, a name pattern such as 'encoder.*', a predicate (path, module) -> bool, "
        f"or a list of these"
    )


def is_built(module: nn.Module) -> bool:
    """Return whether surgery built this module."""
    return MARKER in dict(module.named_buffers(recurse=False))


def class_name(cls: type) -> str:
    """Return the name of a class, with its module unless it is one of torch.nn."""
    return cls.__qualname__ if getattr(nn, cls.__qualname__, None) is cls else f"{cls.__module__}.{cls.__qualname__}"


def contents(model: nn.Module) -> str:
    """Return the classes of a model's modules, each with the paths of its first instances, for error messages."""
    paths: dict[str, list[str]] = {}
    for site in walk(model):
        paths.setdefault(class_name(type(site.module)), []).append(site.path)
    lines = [f"{kind}: {', '.join(p[:4])}{f' and {len(p) - 4} more' * (len(p) > 4)}" for kind, p in paths.items()]
    return "; ".join(lines) or "no submodules"


def check_patterns(model: nn.Module, where: Where | None) -> None:
    """Raise NoMatchError if a name pattern in a list matches no module of the model."""
    if isinstance(where, Sequence) and not isinstance(where, str):
        sites = list(walk(model))
        unmatched = [one for one in where if isinstance(one, str) and not any(matches(site, one) for site in sites)]
        if unmatched:
            wrong = ", ".join(map(repr, unmatched))
            raise NoMatchError(
                f"nothing matches {wrong} in where={described(where)}; the model holds {contents(model)}"
            )


def find_modules(model: nn.Module, where: Where, target: Where | None = None, inserted: bool = False) -> list[Site]:
    """Return the sites of a model that match ``where`` and, if given, ``target``.

    Each is a class; a pattern for paths, in which ``*`` also matches dots; a predicate of the module or of
    ``(path, module)``; or a list of these, any of which may match. The root itself is never selected. Submodules of a
    match are not matched again by the same entry. Submodules of modules that surgery built are selected only with
    ``inserted=True`` or by an entry that is their full path.

    Raises:
        NoMatchError: nothing matches, or a name pattern of a list does not; the message lists the modules of the model.
        TypeError: ``where`` has another type.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [site.path for site in find_modules(net, nn.Linear)]
        ['0', '2']
        >>> find_modules(net, "encoder.*")
        Traceback (most recent call last):
        em_lightning.surgery.select.NoMatchError: nothing matches where='encoder.*' (strings are name ...
    """
    for selection in (where, target):
        check_patterns(model, selection)
    entries = where if isinstance(where, Sequence) and not isinstance(where, str) else [where]
    sites = [site for site in walk(model) if inserted or site.path in entries or not any(map(is_built, site.ancestors))]
    found: set[str] = set()
    for entry in entries:
        outermost = ""
        for site in sites:
            inside = outermost and site.path.startswith(outermost + ".")
            if not inside and matches(site, entry) and (target is None or matches(site, target)):
                outermost = site.path
                found.add(outermost)
    if not found:
        wanted = f"where={described(where)}" + ("" if target is None else f" with target={described(target)}")
        raise NoMatchError(f"nothing matches {wanted} (strings are name patterns); the model holds {contents(model)}")
    return [site for site in sites if site.path in found]


def described(where: Any) -> str:
    """Return the text of a selection in errors and state keys, distinct for distinct classes and functions."""
    if isinstance(where, Sequence) and not isinstance(where, str):
        return f"[{', '.join(described(one) for one in where)}]"
    if inspect.isfunction(where):
        return f"{where.__module__}.{where.__qualname__}:{where.__code__.co_firstlineno}"
    return class_name(where) if isinstance(where, type) else repr(where)


def check_reachable(site: Site) -> None:
    """Raise ValueError where PyTorch never calls the module at a site, so that a replacement or hook has no effect."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in (*site.ancestors, site.module)):
        raise ValueError(
            f"{site.path!r} belongs to a ScriptModule, which cannot be changed: do this before torch.jit.script"
        )
    if isinstance(site.parent, nn.MultiheadAttention):
        raise ValueError(
            f"{site.path!r} lies inside nn.MultiheadAttention, which never calls its {site.name}: select the attention"
        )
