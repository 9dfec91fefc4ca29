"""Replace activations that methods call as functions: ``F.relu(x)``, ``torch.tanh(x)``, ``x.relu_()``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from em_lightning.surgery.axes import UnitAxis, announce, own_dim, widths_in
from em_lightning.surgery.edit import Calls, Change, Make, Surgery, change_sites
from em_lightning.surgery.hooks import wrap
from em_lightning.surgery.select import (
    FUNCTIONS,
    NoMatchError,
    Site,
    Where,
    check_patterns,
    contents,
    described,
    is_built,
    matches,
    walk,
)

NAME = "em_functional"  # the operator's name as a child of the module whose methods call the function
_IN_PLACE = frozenset(function for function in FUNCTIONS if function.__name__.endswith("_"))


class _Swapped(TorchFunctionMode):
    """Calls an operator in place of activation functions."""

    running = False  # whether an operator runs; functions that it calls are not replaced

    def __init__(self, operator: Callable[[Tensor], Tensor], functions: frozenset[Any], axes: CallAxes) -> None:
        super().__init__()
        self.operator = operator
        self.functions = functions
        self.axes = axes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.functions or _Swapped.running:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        _Swapped.running = True
        try:
            inplace = kwargs.get("inplace") or any(argument is True for argument in args[1:])  # or positional
            if func in _IN_PLACE or inplace:
                return x.copy_(self._swapped(x.clone()))
            return self._swapped(x)
        finally:
            _Swapped.running = False

    def _swapped(self, x: Tensor) -> Tensor:
        dim = self.axes(x)
        return self.operator(x) if dim == -1 else self.operator(x.movedim(dim, -1)).movedim(-1, dim)


@dataclasses.dataclass
class CallAxes:
    """The axis of the units in the calls of one module, decided once for each number of axes of a tensor."""

    path: str  # of the operator
    widths: list[int]  # of the layers in the module, the last first
    class_name: str  # of the operator
    dim: int | Literal["auto"] | None  # None for elementwise operators
    verbose: bool
    decided: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the operator was called."""
        return bool(self.decided)

    def __call__(self, x: Tensor) -> int:
        """Return the axis to move to the last position; -1, no move, if the operator has its own axis."""
        if x.ndim not in self.decided:
            axis = UnitAxis(self.path, self.widths)(x.shape) if self.dim == "auto" else self.dim
            announce(self.path, self.class_name, x.shape, axis, self.verbose)
            self.decided[x.ndim] = axis if self.dim == "auto" and axis is not None else -1
        return self.decided[x.ndim]


def swap_calls(
    surgery: Surgery, where: Where, make: Make, target: Where, calls: Calls = None, verbose: bool = False
) -> Surgery:
    """Replace the activations that the methods of selected modules, or of the model itself, call as functions.

    The operator becomes a child of the module, named ``em_functional``. While a method of the module that mentions the
    function runs, the operator replaces all calls of the function, including calls by unselected children. Modules of
    torch.nn are skipped, and functions that are reached only through containers or other objects are not found.

    Raises:
        NoMatchError: no method of a selected module mentions the function; the message lists the modules of the model.
    """
    model = surgery.model
    check_patterns(model, where)
    modules = {kind: kind() for kind in FUNCTIONS.values()}
    kinds = [kind for kind, module in modules.items() if matches(Site("", module, model, "", (model,)), target)]
    functions = frozenset(function for function, kind in FUNCTIONS.items() if kind in kinds)
    names = {function.__name__ for function in functions}
    owners = [
        site
        for site in (Site("", model, model, "", (model,)), *walk(model))
        if site.function is None
        and not hasattr(site.module, NAME)
        and not any(map(is_built, (*site.ancestors, site.module)))
        and matches(site, where)
        and _methods_that_call(type(site.module), names)
    ]
    if not owners:
        raise NoMatchError(
            f"where={described(where)} matches no module whose methods call {' or '.join(sorted(names))}, functions of "
            f"target={described(target)}; the model holds {contents(model)}"
        )

    def prepare(site: Site, change: Change) -> None:
        change.entry["target"] = [kind.__name__ for kind in kinds]
        widths, built = widths_in([site.parent])[::-1], change.modules[0]
        axes = CallAxes(site.path, widths, type(built).__name__, own_dim(built, make), verbose)
        surgery.first_calls.append(axes)
        for name in _methods_that_call(type(site.parent), names):
            surgery.undos.append(wrap(site.parent, name, functools.partial(_run, site.parent, functions, axes)))

    sites = [
        Site(f"{site.path}.{NAME}".lstrip("."), kinds[0](), site.module, NAME, (*site.ancestors, site.module), kinds[0])
        for site in owners
    ]
    return change_sites(surgery, "functional", sites, lambda _: make, calls, prepare)


def _run(
    module: nn.Module, functions: frozenset[Any], axes: CallAxes, proceed: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Wrapper of a method: run it with the operator in place of the functions."""
    with _Swapped(getattr(module, NAME), functions, axes):
        return proceed(*args, **kwargs)


def _methods_that_call(cls: type[nn.Module], names: set[str]) -> list[str]:
    """Return the methods of a user's class, or of its bases, that mention one of the names."""
    return sorted(
        {
            name
            for base in cls.__mro__
            if not base.__module__.startswith(("torch.", "lightning.", "pytorch_lightning."))
            for name, method in vars(base).items()
            if inspect.isfunction(method) and not name.startswith("__") and _mentions(method.__code__, names, method)
        }
    )


def _mentions(code: types.CodeType, names: set[str], function: Any, depth: int = 3) -> bool:
    """Return whether code, the functions nested in it or the functions of its own module that it calls use a name."""
    if names & set(code.co_names):
        return True
    if any(_mentions(one, names, function, depth) for one in code.co_consts if isinstance(one, types.CodeType)):
        return True
    called = [function.__globals__.get(name) for name in code.co_names] if depth else []
    return any(
        _mentions(one.__code__, names, one, depth - 1)
        for one in called
        if inspect.isfunction(one) and not one.__module__.startswith("torch.")
    )
