"""Where in a model to operate: selection by class, by name or by predicate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

Where = type | str | Callable[..., bool] | Sequence[Any]

# Models also keep an activation as a function on an attribute: nn.TransformerEncoderLayer does by default.
FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.elu: nn.ELU,
    F.leaky_relu: nn.LeakyReLU,
    torch.tanh: nn.Tanh,
    F.tanh: nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
    F.sigmoid: nn.Sigmoid,
}


class Site(NamedTuple):
    """One slot of a model: ``parent.<name>`` holds ``module``, and ``path`` leads there from the root.

    Where the slot is a plain attribute that holds a function such as ``F.relu``, ``function`` is that function and
    ``module`` the module that computes the same.
    """

    path: str
    module: nn.Module
    parent: nn.Module
    name: str
    ancestors: tuple[nn.Module, ...]
    function: Any = None

    @property
    def owner(self) -> nn.Module:
        """The nearest module above the slot whose forward calls it (lists and dicts of modules call nothing)."""
        callers = [module for module in self.ancestors if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]
        return callers[-1]


def walk(model: nn.Module, closed: Iterable[nn.Module] = ()) -> Iterator[Site]:
    """Yield every slot below ``model``, parents first; the names of one shared instance are slots of their own.

    The wrapper that ``torch.compile`` puts around a module does not show in the paths.

    Args:
        model: the root; it is no site itself.
        closed: modules that are yielded, but not entered.
    """
    shut = {id(module) for module in closed}
    seen: set[tuple[int, str]] = set()

    def visit(parent: nn.Module, prefix: str, ancestors: tuple[nn.Module, ...]) -> Iterator[Site]:
        if isinstance(parent, OptimizedModule):
            yield from visit(parent._orig_mod, prefix, ancestors)
            return
        ancestors = (*ancestors, parent)
        for name, child in list(parent._modules.items()):
            if child is None or (id(parent), name) in seen or any(child is above for above in ancestors):
                continue
            seen.add((id(parent), name))
            path = prefix + name
            yield Site(path, child, parent, name, ancestors)
            if id(child) not in shut:
                yield from visit(child, path + ".", ancestors)
        for name, value in list(vars(parent).items()):
            if inspect.isroutine(value) and value in FUNCTIONS and (id(parent), name) not in seen:
                seen.add((id(parent), name))
                yield Site(prefix + name, FUNCTIONS[value](), parent, name, ancestors, value)

    yield from visit(model, "", ())


def _is_a(module: nn.Module, cls: type) -> bool:
    inner = module._orig_mod if isinstance(module, OptimizedModule) else module
    return isinstance(inner, cls) or getattr(inner, "original_name", None) == cls.__name__  # the latter: ScriptModule


def matches(site: Site, where: Where) -> bool:
    """Return whether a selection holds for a site."""
    if isinstance(where, type):
        return _is_a(site.module, where)
    if isinstance(where, str):
        return fnmatchcase(site.path, where.replace("_orig_mod.", ""))
    if callable(where):
        arguments = (site.module,) if len(inspect.signature(where).parameters) == 1 else (site.path, site.module)
        return bool(where(*arguments))
    if isinstance(where, Sequence):
        return any(matches(site, one) for one in where)
    raise TypeError(
        f"where={where!r} selects no modules: give a class, a name pattern such as 'encoder.*', "
        f"a predicate (path, module) -> bool, or a list of these"
    )


def contents(model: nn.Module) -> str:
    """Name what there is to select in a model: each class with the paths of its instances."""
    paths: dict[str, list[str]] = {}
    for site in walk(model):
        paths.setdefault(type(site.module).__name__, []).append(site.path)
    lines = [
        f"{kind}: {', '.join(p[:4])}{f' and {len(p) - 4} more' if len(p) > 4 else ''}" for kind, p in paths.items()
    ]
    return "; ".join(lines) or "no submodules"


class NoMatchError(ValueError):
    """A selection that matched nothing; the message lists what the model holds."""


def find_modules(
    model: nn.Module, where: Where, target: Where | None = None, *, closed: Iterable[nn.Module] = ()
) -> list[Site]:
    """Return the sites of a model that ``where`` (and ``target``, if given) selects.

    Args:
        model: any module; the root itself is never selected.
        where: a class; a pattern for paths, in which ``*`` also stands for dots; a predicate of the module or of
            ``(path, module)``; or a list of these, of which one has to hold.
        target: a second selection that has to hold as well.
        closed: modules that are not searched inside.

    Returns:
        The outermost sites: what lies inside a selected module is not selected again (for a list: by the same entry).

    Raises:
        NoMatchError: nothing is selected; the message lists what is there.
        TypeError: ``where`` is none of these.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [site.path for site in find_modules(net, nn.Linear)]
        ['0', '2']
        >>> find_modules(net, "encoder.*")
        Traceback (most recent call last):
        em_lightning.surgery.find.NoMatchError: nothing matches where='encoder.*'; the model holds Linear: 0, 2; ReLU: 1
    """
    sites = list(walk(model, closed))
    found: dict[str, Site] = {}
    for entry in where if isinstance(where, Sequence) and not isinstance(where, str) else [where]:
        outermost: list[Site] = []
        for site in sites:
            inside = outermost and site.path.startswith(outermost[-1].path + ".")
            if not inside and matches(site, entry) and (target is None or matches(site, target)):
                outermost.append(site)
        found.update((site.path, site) for site in outermost)
    if not found:
        wanted = f"where={named(where)}" + ("" if target is None else f" with target={named(target)}")
        kinds = {type(site.module).__name__ for site in sites}
        misread = [one for one in (where, target) if isinstance(one, str) and one.removeprefix("nn.") in kinds]
        hint = f" ({misread[0]!r} is read as a name pattern; give the class itself)" if misread else ""
        raise NoMatchError(f"nothing matches {wanted}{hint}; the model holds {contents(model)}")
    return [site for site in sites if site.path in found]


def named(where: Where) -> str:
    """Return a selection as messages write it."""
    if isinstance(where, Sequence) and not isinstance(where, str):
        return f"[{', '.join(named(one) for one in where)}]"
    return getattr(where, "__qualname__", None) or repr(where)
