"""Removable wrappers around bound methods, forward hooks that capture tensors, and hooks carried to a new module."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor, nn

from em_lightning.surgery.select import NoMatchError, Site, Where, check_reachable, described, find_modules

Link = Callable[..., Any]
Undo = Callable[[], Any]

# The dictionaries in which nn.Module.__call__ looks up hooks. They are private, but torch offers no other way to move
# the hooks of a module to the module that replaces it.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


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
        """Remove a wrapper; with the last one the original method returns. A second call does nothing."""
        if link in self.links:
            self.links.remove(link)
        if not self.links and vars(self.owner).get(self.name) is self:
            delattr(self.owner, self.name)
            if self.previous is not None:
                setattr(self.owner, self.name, self.previous)


def wrap(owner: object, name: str, link: Link) -> Undo:
    """Wrap the method ``owner.name`` of this instance only, and return the function that removes the wrapper.

    The wrapper is called as ``link(proceed, *args, **kwargs)``; ``proceed`` is the method or the next wrapper.

    Example:
        >>> class Greeter:
        ...     def greet(self, name):
        ...         return f"hello {name}"
        >>> greeter = Greeter()
        >>> remove = wrap(greeter, "greet", lambda proceed, name: proceed(name).upper())
        >>> greeter.greet("ann")
        'HELLO ANN'
        >>> remove()
        >>> greeter.greet("ann")
        'hello ann'
    """
    present = vars(owner).get(name)
    chain = present if isinstance(present, Chain) else Chain(owner, name)
    chain.links.append(link)
    setattr(owner, name, chain)
    return functools.partial(chain.remove, link)


def undo_all(undos: list[Undo]) -> None:
    """Call and forget a list of undo functions, the last one first."""
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
    """Disable the fused inference of the transformer layers around a site, and return the undo functions."""
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


class Taps:
    """Captures the outputs or the inputs of the layers that :func:`find_modules` selects, while ``recording`` is true.

    Raises:
        NoMatchError: nothing matches, or only functions, which have no hooks.
        ValueError: ``tap`` has another value, or a hook on a layer would never fire.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> taps = Taps(net, "0")
        >>> taps.attach()
        >>> y = net(torch.ones(4, 2))
        >>> {path: [tuple(tensor.shape) for tensor in tensors] for path, tensors in taps.take().items()}
        {'0': [(4, 3)]}
        >>> taps.remove()
    """

    def __init__(
        self, model: nn.Module, where: Where, tap: Literal["output", "input"] = "output", target: Where | None = None
    ) -> None:
        if tap not in ("output", "input"):
            raise ValueError(f"tap={tap!r} must be 'output' or 'input'")
        self.tap = tap
        self.recording = True
        self.captured: list[tuple[str, Tensor, int]] = []
        self._undos: list[Undo] = []
        self.sites: list[Site] = []
        for site in find_modules(model, where, target):
            check_reachable(site)
            if site.function is None and not any(site.module is known.module for known in self.sites):
                self.sites.append(site)
        if not self.sites:
            raise NoMatchError(f"where={described(where)} matches only functions, which have no hooks")

    @contextlib.contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Record, or do not record, inside the context."""
        before, self.recording = self.recording, on
        try:
            yield
        finally:
            self.recording = before

    def attach(self) -> None:
        """Register the hooks."""
        for site in self.sites:
            self._undos += [*disable_fast_path(site), self._register(site.module, site.path)]

    def remove(self) -> None:
        """Remove the hooks and what they captured."""
        undo_all(self._undos)
        self.captured = []

    def _register(self, module: nn.Module, path: str) -> Undo:
        # Functions, as deepcopy(model) copies bound methods with the captured tensors, which cannot be copied.
        if self.tap == "output":
            return module.register_forward_hook(lambda _, inputs, output: self._capture(path, output)).remove
        return module.register_forward_pre_hook(
            lambda _, inputs, kwargs: self._capture(path, inputs or tuple(kwargs.values())), with_kwargs=True
        ).remove

    def _capture(self, path: str, value: Any) -> None:
        if not self.recording:
            return
        while isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"the {self.tap} of {path!r} is {kind}; it must be a tensor or a tuple with one first")
        self.captured.append((path, value, _version(value)))

    def take(self, wanted: Callable[[Tensor], bool] = lambda _: True) -> dict[str, list[Tensor]]:
        """Return the captured tensors that are wanted, by path, and forget them.

        Raises:
            RuntimeError: a tensor was overwritten in place after it was captured.
        """
        taken: dict[str, list[Tensor]] = {}
        captured, self.captured = self.captured, []
        for path, tensor, version in captured:
            if not wanted(tensor):
                self.captured.append((path, tensor, version))
                continue
            if _version(tensor) != version:
                raise RuntimeError(
                    f"the {self.tap} of {path!r} was overwritten in place after it was captured, as "
                    f"nn.ReLU(inplace=True) does: set inplace=False in the next layer, or tap its output"
                )
            taken.setdefault(path, []).append(tensor)
        return taken


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # torch's only record of in-place changes
