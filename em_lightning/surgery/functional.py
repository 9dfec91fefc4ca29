"""Replace activations that methods call as functions: ``F.relu(x)``, ``torch.tanh(x)``, ``x.relu_()``."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from em_lightning.surgery import select
from em_lightning.surgery.edit import AfterChange, Calls, Change, Make, Surgery, change_sites
from em_lightning.surgery.hooks import wrap
from em_lightning.surgery.select import FUNCTIONS, NoMatchError, Site, Where, is_built, matches, walk

CALLS_CHILD = "em_functional"  # the operator's name as a child of the module whose methods call the function
_IN_PLACE = frozenset(function for function in FUNCTIONS if function.__name__.endswith("_"))
_LIBRARIES = ("torch.", "lightning.", "pytorch_lightning.")  # methods of their classes are not searched


class _Swapped(TorchFunctionMode):
    """Calls an operator in place of activation functions."""

    running = False  # whether an operator runs; functions that it calls are not replaced

    def __init__(self, operator: Callable[[Tensor], Tensor], functions: frozenset[Any]) -> None:
        super().__init__()
        self.operator = operator
        self.functions = functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.functions or _Swapped.running:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        _Swapped.running = True
        try:
            inplace_by_position = any(argument is True for argument in args[1:])  # no other argument is a bool
            if func in _IN_PLACE or kwargs.get("inplace") or inplace_by_position:
                return x.copy_(self.operator(x.clone()))
            return self.operator(x)
        finally:
            _Swapped.running = False


def swap_calls(
    surgery: Surgery, where: Where, make: Make, target: Where, calls: Calls, after_change: AfterChange
) -> Surgery:
    """Replace the activations that the methods of selected modules, or of the model itself, call as functions.

    The operator becomes a child of the module, named ``em_functional``. While a method runs whose code names a function
    of ``target``, all calls of it run the operator instead, even in unselected children. A child's name, such as
    ``self.relu``, does not count. Methods of torch's and Lightning's classes and functions in containers are skipped.
    ``make``, ``calls`` and errors are those of :func:`replace_modules`; ``after_change`` is that of ``change_sites``.
    """
    model = surgery.model
    select.check_selection(model, "where", where)
    select.check_selection(model, "target", target)
    targets = select.described(target)
    modules = {kind: kind() for kind in FUNCTIONS.values()}
    root = Site(path="", module=model, parent=model, name="", ancestors=())
    kinds = [kind for kind, module in modules.items() if matches(root._replace(module=module), target)]
    if not kinds:
        known = ", ".join(kind.__name__ for kind in modules)
        raise NoMatchError(f"target={targets} has no function form; functional=True swaps those of {known}")
    functions = frozenset(function for function, kind in FUNCTIONS.items() if kind in kinds)
    names = {function.__name__ for function in functions}
    owners = [
        site
        for site in (root, *walk(model))
        if site.function is None
        and not hasattr(site.module, CALLS_CHILD)
        and not any(map(is_built, (*site.ancestors, site.module)))  # by an earlier surgery
        and matches(site, where)
        and _methods_that_call(site.module, names)
    ]
    if not owners:
        raise NoMatchError(
            f"where={select.described(where)} matches no module whose methods call {' or '.join(sorted(names))}, "
            f"functions of target={targets}; the model holds {select.contents(model)}"
        )

    def wrap_methods(site: Site, change: Change) -> None:
        change.entry["target"] = [kind.__name__ for kind in kinds]  # recorded in checkpoints
        for name in _methods_that_call(site.parent, names):
            surgery.undos.append(wrap(site.parent, name, functools.partial(_run, site.parent, functions)))
        after_change(site, change)

    sites = []  # one per owner, for its new child; kinds[0] stands for all activations that the child replaces
    for owner in owners:
        path, ancestors = f"{owner.path}.{CALLS_CHILD}".lstrip("."), (*owner.ancestors, owner.module)
        sites.append(Site(path, kinds[0](), owner.module, name=CALLS_CHILD, ancestors=ancestors, function=kinds[0]))
    return change_sites(surgery, "functional", sites, lambda _: make, calls, wrap_methods)


def _run(module: nn.Module, functions: frozenset[Any], proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Wrapper of a method: run it with the operator in place of the functions."""
    with _Swapped(getattr(module, CALLS_CHILD), functions):
        return proceed(*args, **kwargs)


def _methods_that_call(module: nn.Module, names: set[str]) -> list[str]:
    """Return the names of methods that call a function of ``names``, directly or through an attribute of the module."""
    submodules = {f"self.{path}" for path, _ in module.named_modules(remove_duplicate=False)}
    stored = {name: getattr(value, "func", value) for name, value in vars(module).items()}  # func of functools.partial
    aliases = {name for name, value in stored.items() if inspect.isbuiltin(value) and value.__name__ in names}
    functions = {name: value for name, value in stored.items() if inspect.isfunction(value)}
    callers = {name for name, value in functions.items() if _mentions(value, names, submodules)}
    names = names | aliases | callers
    # Without special methods: Python looks them up in the class, so a wrapper in the instance has no effect.
    return sorted(
        {
            name
            for base in type(module).__mro__
            if not base.__module__.startswith(_LIBRARIES)
            for name, method in vars(base).items()
            if inspect.isfunction(method) and not name.startswith("__") and _mentions(method, names, submodules)
        }
    )


def _mentions(function: Any, names: set[str], submodules: set[str], depth: int = 3) -> bool:  # chosen
    """Return whether a function reads one of the names, itself or through calls (not of torch) up to ``depth`` deep."""
    read = {path.rpartition(".")[2] for path in _paths_read(function.__code__) - submodules}
    used = [function.__globals__.get(name) for name in read] if depth else []  # functions may be recursive
    called = [one for one in used if inspect.isfunction(one) and not one.__module__.startswith("torch.")]
    return bool(names & read) or any(_mentions(one, names, submodules, depth - 1) for one in called)


@functools.cache  # disassembly is slow
def _paths_read(code: types.CodeType) -> frozenset[str]:
    """Return the globals and attributes that code and nested code read: ``relu``, ``F.relu``, ``self.block.relu``."""
    paths = set().union(*(_paths_read(nested) for nested in code.co_consts if isinstance(nested, types.CodeType)))
    path = ""
    for instruction in dis.get_instructions(code):  # one of Python 3.13 loads two variables: the second is on top
        value = instruction.argval
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path += f".{value}"
        elif instruction.opname != "EXTENDED_ARG":  # a part of the next instruction
            path = str(value[-1] if isinstance(value, tuple) and value else value)
        if instruction.opcode in dis.hasname:
            paths.add(path)
    return frozenset(paths)
