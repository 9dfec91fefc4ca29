"""Select modules of a model by class, name pattern or predicate."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A buffer of every module that surgery built: its key prevents a strict load into a model without the surgery.
# Errors and warnings on unexpected keys print it, so it names the functions that load such a checkpoint.
MARKER = "em_surgery__load_with_RestoreSurgery_or_restore_surgery"

Where = type | str | Callable[..., bool] | Sequence[Any]

# Modules that have function forms, in torch, torch.nn.functional or Tensor. Forms that work in place end with "_".
_FUNCTION_NAMES = {nn.LeakyReLU: "leaky_relu"} | {
    kind: kind.__name__.lower()
    for kind in (
        *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid),
        *(nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
    )
}
FUNCTIONS: dict[Any, type[nn.Module]] = {  # from each form to the class of the module
    getattr(owner, name): kind
    for kind, base_name in _FUNCTION_NAMES.items()
    for name in (base_name, f"{base_name}_")
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

    @property
    def caller(self) -> nn.Module:
        """The innermost module around the site whose forward can call it: no ModuleList or ModuleDict."""
        return [module for module in self.ancestors if not isinstance(module, (nn.ModuleList, nn.ModuleDict))][-1]


class NoMatchError(ValueError):
    """No module matches a selection; the message lists the modules of the model."""


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or the module itself."""
    return dict(module.named_children()).get("_orig_mod", module)  # a stable name, as state_dict keys contain it


def walk(model: nn.Module) -> Iterator[Site]:
    """Yield every site below ``model``, parents first; a shared instance is yielded under each of its names."""
    seen: set[tuple[int, str]] = set()  # the inside of a shared container is visited once

    def visit(parent: nn.Module, prefix: str, ancestors: tuple[nn.Module, ...]) -> Iterator[Site]:
        parent = uncompiled(parent)
        ancestors = (*ancestors, parent)
        # callable() first: inspect.isroutine() takes ten times as long
        functions = {name: each for name, each in vars(parent).items() if callable(each) and inspect.isroutine(each)}
        # named_children() leaves out an instance's second name
        for name, value in [*parent._modules.items(), *functions.items()]:
            if (id(parent), name) in seen or any(value is above for above in ancestors):  # visited, or an ancestor
                continue
            seen.add((id(parent), name))
            if isinstance(value, nn.Module):
                yield Site(prefix + name, value, parent, name, ancestors)
                yield from visit(value, f"{prefix}{name}.", ancestors)
            elif value in FUNCTIONS:
                yield Site(prefix + name, FUNCTIONS[value](), parent, name, ancestors, function=value)

    return visit(model, "", ())


def matches(site: Site, where: Where) -> bool:
    """Return whether a site matches a class, a name pattern, a predicate, or one of a list of these."""
    if isinstance(where, type):
        module = uncompiled(site.module)
        return isinstance(module, where) or getattr(module, "original_name", None) == where.__name__  # ScriptModule
    if isinstance(where, str):
        return fnmatchcase(site.path, where.replace("_orig_mod.", ""))
    if callable(where):
        arguments = (site.module,) if len(inspect.signature(where).parameters) == 1 else (site.path, site.module)
        return bool(where(*arguments))
    return any(matches(site, entry) for entry in where)


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
    return "; ".join(f"{kind}: {shortened(names)}" for kind, names in paths.items()) or "no submodules"


def shortened(paths: list[str]) -> str:
    """Return the first four paths as text, and the number of further ones."""
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def check_selection(model: nn.Module, argument: str, selection: Where) -> None:
    """Raise TypeError if a selection has a wrong type, NoMatchError if a name pattern of a list matches nothing."""
    in_list = isinstance(selection, Sequence) and not isinstance(selection, str)
    for entry in selection if in_list else [selection]:  # type: ignore[union-attr]
        cls = type(entry) if isinstance(entry, nn.Module) else FUNCTIONS.get(entry) if callable(entry) else None
        if cls is not None or not (isinstance(entry, (str, type, Sequence)) or callable(entry)):
            hint = f"; give the class, {class_name(cls)}" if cls is not None else ""
            raise TypeError(
                f"{argument}={entry!r} must be a class, a name pattern such as 'encoder.*', a predicate "
                f"(path, module) -> bool, or a list of these{hint}"
            )
        if in_list and isinstance(entry, str) and not any(matches(site, entry) for site in walk(model)):
            raise _no_match(model, f"{entry!r} in {argument}={described(selection)}", [entry])


def _no_match(model: nn.Module, selection: str, entries: Iterable[Any]) -> NoMatchError:
    names = (entry for entry in entries if isinstance(entry, str))
    named = {type(site.module).__name__ for site in walk(model)}.intersection(names)
    hint = "".join(f"; {name!r} is the name of a class: give the class itself" for name in sorted(named))
    return NoMatchError(
        f"nothing matches {selection} (strings are name patterns{hint}); the model holds {contents(model)}"
    )


def find_modules(model: nn.Module, where: Where, target: Where | None = None, inserted: bool = False) -> list[Site]:
    """Return the sites of a model that match ``where`` and, if given, ``target``.

    Each is a class; a pattern for paths, in which ``*`` also matches dots; a predicate of the module or of
    ``(path, module)``; or a list of these, any of which may match. The root itself is never selected. Submodules of a
    match are not matched again by the same entry. Submodules of modules that surgery built are selected only by their
    full path or with ``inserted=True``, which also omits the warning about plain lists: earlier surgery has given it.

    Raises:
        NoMatchError: nothing matches, or a name pattern of a list does not; the message lists the modules of the model.
        TypeError: ``where`` or ``target`` has none of the types above.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [site.path for site in find_modules(net, nn.Linear)]
        ['0', '2']
    """
    kind = "*" if target is None else target
    check_selection(model, "where", where)
    check_selection(model, "target", kind)
    entries = where if isinstance(where, Sequence) and not isinstance(where, str) else [where]
    sites = [site for site in walk(model) if inserted or site.path in entries or not any(map(is_built, site.ancestors))]
    found: set[str] = set()
    for entry in entries:
        match = ""  # the last match of this entry; sites are in the order of the walk, so its submodules come next
        for site in sites:
            is_inside = match and site.path.startswith(f"{match}.")
            if not is_inside and matches(site, entry) and matches(site, kind):
                match = site.path
                found.add(match)
    unknown = () if inserted else _unregistered(model)  # earlier surgery has already warned
    unregistered = [site.path for site in unknown if matches(site, where) and matches(site, kind)]
    if unregistered:
        warnings.warn(
            f"{shortened(unregistered)} stay as they are, because PyTorch does not register modules in plain lists and "
            f"dictionaries: use nn.ModuleList or nn.ModuleDict",
            stacklevel=3,
        )
    if not found:
        selection = f"where={described(where)}" + ("" if target is None else f" with target={described(target)}")
        raise _no_match(model, selection, [*entries, target])
    return [site for site in sites if site.path in found]


def _unregistered(model: nn.Module) -> Iterator[Site]:
    """Yield the modules in plain lists and dictionaries of a model, and those inside them: PyTorch knows of none."""
    registered = set(model.modules())
    for path, owner in [("", model), *((site.path, site.module) for site in walk(model))]:
        for name, value in vars(owner).items():
            # Lightning keeps hyperparameters in dictionaries.
            if name.startswith(("_modules", "_hparams")) or not isinstance(value, (list, tuple, dict)):
                continue
            for key, module in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(module, nn.Module) and module not in registered:
                    place = f"{path}.{name}[{key!r}]".lstrip(".")
                    yield Site(place, module, owner, name, (owner,))
                    yield from (site._replace(path=f"{place}.{site.path}") for site in walk(module))


def described(where: Any) -> str:
    """Return the text of a selection for errors and state keys; of a function with its line, to tell lambdas apart."""
    if isinstance(where, Sequence) and not isinstance(where, str):
        return f"[{', '.join(described(one) for one in where)}]"
    if inspect.isfunction(where):
        return f"{where.__module__}.{where.__qualname__}:{where.__code__.co_firstlineno}"
    return class_name(where) if isinstance(where, type) else repr(where)


def check_reachable(site: Site) -> None:
    """Raise ValueError if a replacement or hook at a site is impossible, or has no effect as PyTorch never calls it."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in (*site.ancestors, site.module)):
        raise ValueError(
            f"{site.path!r} belongs to a ScriptModule, which cannot be changed: do this before torch.jit.script"
        )
    if isinstance(site.parent, nn.MultiheadAttention):
        raise ValueError(
            f"{site.path!r} lies inside nn.MultiheadAttention, which never calls its {site.name}: select the attention"
        )
