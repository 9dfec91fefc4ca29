"""Activations that a forward calls as functions: ``F.relu(x)``, ``torch.relu(x)``, ``x.relu_()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from em_lightning.surgery.chain import wrap
from em_lightning.surgery.edit import Calls, Change, Make, Surgery, calls_at, check_operable, count_calls, new_module
from em_lightning.surgery.find import NoMatchError, Site, Where, contents, matches, named, walk
from em_lightning.surgery.plan import describe, keep_plan, recorded_plan

_NAME = "em_functional"
_IN_PLACE = {torch.relu_, F.relu_, Tensor.relu_}
_RELU = {F.relu, torch.relu, Tensor.relu, *_IN_PLACE}


class _Swapped(TorchFunctionMode):
    """Calls an operator wherever relu is called.

    An operator over the last axis is meant for units, which feature maps have on axis 1: of tensors with as many axes
    as the convolutions of the module put out, the channels are handed over last.
    """

    def __init__(self, operator: Callable[[Tensor], Tensor], map_dims: frozenset[int]) -> None:
        super().__init__()
        self.operator = operator
        self.map_dims = map_dims

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _RELU:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        if func in _IN_PLACE or kwargs.get("inplace") or len(args) > 1:
            return x.copy_(self._operated(x.clone()))
        return self._operated(x)

    def _operated(self, x: Tensor) -> Tensor:
        if x.dim() not in self.map_dims or getattr(self.operator, "dim", None) != -1:
            return self.operator(x)
        return self.operator(x.movedim(1, -1)).movedim(-1, 1)


def _map_dims(module: nn.Module) -> frozenset[int]:
    """Return the numbers of axes that the feature maps of a module's convolutions and their norms have."""
    layers = [type(layer).__name__ for layer in module.modules() if isinstance(layer, (_ConvNd, _NormBase))]
    return frozenset(2 + int(name[-2]) for name in layers if name[-2:] in ("1d", "2d", "3d"))


def swap_relu_calls(
    model: nn.Module, where: Where, make: Make, *, calls: Calls = None, into: Surgery | None = None
) -> Surgery:
    """Let another module compute every ``relu`` that the forwards of selected modules call as a function.

    The operator becomes a child of the module, named ``em_functional``; all other names stay. It serves every call of
    that forward, those in unselected children included; with parameters it is refused at a second one, see ``calls`` of
    :func:`em_lightning.surgery.replace_modules`.

    Args:
        model: any module; it may be selected itself, as the path "".
        where: which modules; those that do not name ``relu`` in their forward, and those of torch.nn, are left out.
        make: as for :func:`em_lightning.surgery.replace_modules`.
        calls: as there.
        into: a surgery to extend; by default a new one.

    Raises:
        NoMatchError: no selected module names ``relu`` in its forward; the message lists what is there.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return F.relu(x)
        >>> net = Net()
        >>> surgery = swap_relu_calls(net, "*", nn.Tanh)
        >>> torch.equal(net(torch.ones(1)), torch.ones(1).tanh())
        True
    """
    surgery = Surgery(model) if into is None else into
    entries = where if isinstance(where, (list, tuple)) else [where]
    root = Site("", model, model, "", (model,))
    sites = [site for site in (root, *walk(model)) if site.function is None and _calls_relu(site.module)]
    sites = [site for site in sites if any(matches(site, entry) for entry in entries)]
    sites = [site for site in sites if _NAME not in site.module._modules]
    if not sites:
        raise NoMatchError(
            f"no module that matches where={named(where)} names relu in its forward; the model holds {contents(model)}"
        )
    plan = []
    for site in sites:
        check_operable(site)
        wanted = calls_at(site.path, calls)
        path, ancestors = f"{site.path}.{_NAME}".lstrip("."), (*site.ancestors, site.module)
        inner = Site(path, nn.ReLU(), site.module, _NAME, ancestors, F.relu)
        new, added = new_module("replace", inner, make, wanted)
        site.module.add_module(_NAME, new)
        surgery.changes.append(Change(inner.path, "functional", site.module, _NAME, F.relu, new, added))
        surgery._ways_back.append(wrap(site.module, "forward", _Around(site.module)).remove)
        count_calls(surgery, inner, new, wanted)
        entry = describe("functional", site.path, make, added[0], wanted)
        entry.update(by=surgery.by, tied=None)
        plan.append(entry)
    surgery._entries += plan
    keep_plan(model, recorded_plan(model) + plan)
    return surgery


class _Around:
    """The link around the forward of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.map_dims = _map_dims(module)

    def __call__(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Swapped(getattr(self.module, _NAME), self.map_dims):
            return proceed(*args, **kwargs)


def _calls_relu(module: nn.Module) -> bool:
    forward = type(module).forward
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return not type(module).__module__.startswith("torch.nn.") and ("relu" in names or "relu_" in names)


def calls_relu(model: nn.Module) -> bool:
    """Return whether the forward of any module, those of torch.nn aside, names ``relu``."""
    return any(_calls_relu(module) for module in model.modules())
