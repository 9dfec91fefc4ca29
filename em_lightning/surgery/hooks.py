"""Removable wrappers of bound methods, transfer of hooks to a new module, and the first tensor of an output."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from em_lightning.surgery.select import Site

Link = Callable[..., Any]  # a wrapper of a method, called as link(proceed, *args, **kwargs)
Undo = Callable[[], Any]

# The dictionaries in which nn.Module.__call__ looks up hooks, or flags of hooks. They are private, but torch offers no
# other way to move the hooks of a module to the module that replaces it.
_HOOKS = [name for name in vars(nn.Module()) if name.startswith(("_forward_", "_backward_")) and "hooks" in name]


class Chain:
    """The wrappers around one method of one object, stored in the object's ``__dict__`` under the method's name.

    All wrappers of a method share one chain, so that they can be removed in any order. The one added last is outermost.
    """

    def __init__(self, owner: object, name: str) -> None:
        self.owner = owner
        self.name = name
        self.previous: Any = vars(owner).get(name)  # a method that the user set on the instance
        self.links: list[Link] = []

    @property
    def __wrapped__(self) -> Any:  # Lightning reads the signature of the user's method through this name
        if self.previous is not None:
            return inspect.unwrap(self.previous)
        return types.MethodType(getattr(type(self.owner), self.name), self.owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the outermost wrapper."""
        proceed = self.previous or functools.partial(getattr(type(self.owner), self.name), self.owner)
        for link in self.links:
            proceed = functools.partial(link, proceed)
        return proceed(*args, **kwargs)

    def remove(self, link: Link) -> None:
        """Remove a wrapper; removing the last one restores the method. A second call does nothing."""
        if link in self.links:
            self.links.remove(link)
        if not self.links and vars(self.owner).get(self.name) is self:
            del vars(self.owner)[self.name]
            if self.previous is not None:
                vars(self.owner)[self.name] = self.previous


def wrap(owner: object, name: str, link: Link) -> Undo:
    """Wrap the method ``owner.name`` of this instance only, and return the function that removes the wrapper.

    The wrapper is called as ``link(proceed, *args, **kwargs)``; ``proceed`` is the method or the next wrapper.
    """
    present = vars(owner).get(name)
    chain = present if isinstance(present, Chain) else Chain(owner, name)
    chain.links.append(link)
    vars(owner)[name] = chain  # setattr of a Fabric module would set it on the module inside
    return functools.partial(chain.remove, link)


def undo_all(undos: list[Undo]) -> None:
    """Call the undo functions of a list, the last one first, and empty the list."""
    while undos:
        undos.pop()()


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let the hooks of a module also fire for the module that replaces it, until they are removed."""
    for name in _HOOKS:
        hooks = getattr(old, name)
        for key, hook in hooks.items():
            getattr(new, name)[key] = functools.partial(_call_registered, hooks, key) if callable(hook) else hook
    new._is_full_backward_hook = old._is_full_backward_hook


def _call_registered(hooks: dict[int, Any], key: int, *args: Any, **kwargs: Any) -> Any:
    return hooks[key](*args, **kwargs) if key in hooks else None


def disable_fast_path(site: Site) -> list[Undo]:
    """Disable the fused inference of the transformer layers at and around a site; return the undo functions."""
    flags = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    return [
        wrap(module, "forward", functools.partial(_with_flag_off, module, flag))
        for module in (*site.ancestors, site.module)
        for kind, flag in flags.items()
        if isinstance(module, kind)
    ]


def _with_flag_off(module: nn.Module, flag: str, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before = getattr(module, flag)
    setattr(module, flag, False)  # the fused kernels ignore a replaced activation and fire no hooks
    try:
        return proceed(*args, **kwargs)
    finally:
        setattr(module, flag, before)


def first_tensor(value: Any, what: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the first tensor of a layer's output, and the function that puts another tensor in its place.

    The output is a tensor, or a tuple, list, named tuple or dataclass whose first entry that is not None is again such
    an output. For other values TypeError is raised; its message begins with ``what``, a name of the value.
    """
    if isinstance(value, Tensor):
        return value, lambda new: new
    entries: dict[Any, Any] = {}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, (tuple, list)):
        entries = dict(enumerate(value))
    key = next((key for key, entry in entries.items() if entry is not None), None)
    if key is None:
        kind = type(value).__name__
        raise TypeError(f"{what} is {kind}; it must be a tensor, or a tuple, list or dataclass that begins with one")
    first, put = first_tensor(entries[key], what)
    return first, lambda new: _with_entry(value, key, put(new))


def _with_entry(value: Any, key: Any, entry: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{key: entry})  # type: ignore[type-var]
    entries = [*value[:key], entry, *value[key + 1 :]]
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
