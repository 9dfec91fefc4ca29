"""Replace ``relu`` where a forward calls it as a function: ``F.relu(x)``, ``torch.relu(x)``, ``x.relu_()``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from em_lightning.surgery.edit import Calls, Make, Surgery, change_sites
from em_lightning.surgery.hooks import wrap
from em_lightning.surgery.select import MAPS, NoMatchError, Site, Where, contents, described, matches, walk

NAME = "em_functional"  # of the operator, as a child of the module whose forward calls relu
_IN_PLACE = {torch.relu_, F.relu_, Tensor.relu_}
_RELU = {F.relu, torch.relu, Tensor.relu, *_IN_PLACE}


class _Swapped(TorchFunctionMode):
    """Calls an operator in place of relu.

    An operator over the last axis competes over units, which feature maps have on axis 1: for tensors with as many
    axes as the feature maps of the module's convolutions, the channels are moved to the last axis.
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
            return x.copy_(self._swapped(x.clone()))
        return self._swapped(x)

    def _swapped(self, x: Tensor) -> Tensor:
        if x.dim() not in self.map_dims or getattr(self.operator, "dim", None) != -1:
            return self.operator(x)
        return self.operator(x.movedim(1, -1)).movedim(-1, 1)


def swap_relu_calls(
    model: nn.Module, where: Where, make: Make, *, calls: Calls = None, into: Surgery | None = None
) -> Surgery:
    """Replace every ``relu`` that the forwards of selected modules call as a function.

    The operator becomes a child of the module, named ``em_functional``; all other names stay. It serves all calls in
    that forward, including those of unselected children. The model itself may be selected, as the path ""; modules of
    torch.nn and those whose forward does not mention ``relu`` are skipped. For ``make``, ``calls`` and ``into`` see
    :func:`replace_modules`.

    Raises:
        NoMatchError: no selected forward mentions ``relu``; the message lists the modules of the model.

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
    sites = [
        Site(f"{site.path}.{NAME}".lstrip("."), nn.ReLU(), site.module, NAME, (*site.ancestors, site.module), F.relu)
        for site in (root, *walk(model))
        if site.function is None
        and not surgery.contains(site)
        and _calls_relu(site.module)
        and not hasattr(site.module, NAME)
        and any(matches(site, entry) for entry in entries)
    ]
    if not sites:
        raise NoMatchError(
            f"where={described(where)} matches no module whose forward calls relu; the model holds {contents(model)}"
        )
    change_sites(surgery, "functional", sites, lambda _: make, calls)
    for site in sites:
        kinds = [type(one) for one in site.parent.modules()]
        dims = frozenset(dims for dims, maps in MAPS.items() if any(issubclass(kind, maps) for kind in kinds))
        surgery.undos.append(wrap(site.parent, "forward", functools.partial(_with_operator, site.parent, dims)))
    return surgery


def _with_operator(
    module: nn.Module, map_dims: frozenset[int], proceed: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with _Swapped(getattr(module, NAME), map_dims):
        return proceed(*args, **kwargs)


def _calls_relu(module: nn.Module) -> bool:
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    return not type(module).__module__.startswith("torch.nn.") and ("relu" in names or "relu_" in names)
