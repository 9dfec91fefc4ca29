"""Select modules of a model by class, name pattern or predicate; find the axis and number of their units."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

Where = type | str | Callable[..., bool] | Sequence[Any]

# Functions that models keep as attributes (nn.TransformerEncoderLayer.activation), and the equivalent modules.
FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.elu: nn.ELU,
    F.leaky_relu: nn.LeakyReLU,
    torch.tanh: nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
}

# Layers with channels on axis 1, by the number of axes of their feature maps.
MAPS: dict[int, tuple[type[nn.Module], ...]] = {
    d + 2: tuple(getattr(nn, f"{kind}{d}d") for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm"))
    for d in (1, 2, 3)
}
_CHANNELS_FIRST = (*(kind for kinds in MAPS.values() for kind in kinds), nn.SyncBatchNorm, nn.GroupNorm)


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
    return dict(module.named_children()).get("_orig_mod", module)  # the child's name is part of every state_dict


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


def contents(model: nn.Module) -> str:
    """Return the classes of a model's modules, each with the paths of its first instances, for error messages."""
    paths: dict[str, list[str]] = {}
    for site in walk(model):
        paths.setdefault(type(site.module).__name__, []).append(site.path)
    lines = [f"{kind}: {', '.join(p[:4])}{f' and {len(p) - 4} more' * (len(p) > 4)}" for kind, p in paths.items()]
    return "; ".join(lines) or "no submodules"


def find_modules(model: nn.Module, where: Where, target: Where | None = None) -> list[Site]:
    """Return the sites of a model that match ``where`` and, if given, ``target``.

    The root itself is never selected. The inside of a match is not searched for further matches of the same entry.

    Args:
        model: any module.
        where: a class; a pattern for paths, in which ``*`` also matches dots; a predicate of the module or of
            ``(path, module)``; or a list of these, any of which may match.
        target: a second selection, which must match as well.

    Raises:
        NoMatchError: nothing matches; the message lists the modules of the model.
        TypeError: ``where`` has another type.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [site.path for site in find_modules(net, nn.Linear)]
        ['0', '2']
        >>> find_modules(net, "encoder.*")
        Traceback (most recent call last):
        em_lightning.surgery.select.NoMatchError: nothing matches where='encoder.*' (strings are name ...
    """
    sites = list(walk(model))
    found: set[str] = set()
    for entry in where if isinstance(where, Sequence) and not isinstance(where, str) else [where]:
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


def described(where: Where) -> str:
    """Return a selection as error messages and state keys show it."""
    if isinstance(where, Sequence) and not isinstance(where, str):
        return f"[{', '.join(described(one) for one in where)}]"
    return getattr(where, "__qualname__", None) or repr(where)


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


def num_units(module: nn.Module) -> int | None:
    """Return the width of a layer's output, or None if its type does not define one."""
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    for name in ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim", "embed_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def units_of(site: Site, dim: int | Literal["auto"] = "auto") -> tuple[int | None, int]:
    """Return the number of units of a site's output and their axis.

    Both are read from the site's own layer; for an activation or a container, from the last layer inside it, else the
    last one before it, else the first one after it. Convolutions and their norms have units on axis 1, others on the
    last.

    Args:
        site: the site.
        dim: the axis, if it is known.
    """
    sized = _sized([site.module]) if num_units(site.module) is None else [site.module]
    for owner, name in zip(reversed(site.ancestors), reversed(site.path.split(".")), strict=True):
        if sized:
            break
        children = dict(owner._modules)  # by name, as an instance may have several
        position = list(children).index(name) if name in children else len(children)
        before, behind = list(children.values())[:position], list(children.values())[position + 1 :]
        sized = _sized(before) or _sized(behind)[:1]
    if dim == "auto":
        dim = 1 if sized and isinstance(sized[-1], _CHANNELS_FIRST) else -1
    return (num_units(sized[-1]) if sized else None), dim


def _sized(modules: Sequence[nn.Module | None]) -> list[nn.Module]:
    inner = [inner for module in modules if module is not None for inner in module.modules()]
    return [module for module in inner if num_units(module) is not None]
