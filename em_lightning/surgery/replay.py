"""Repeat the surgery that a checkpoint records on a fresh model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import nn

from em_lightning.registry import import_class
from em_lightning.surgery.edit import Change, Make, Shared, Surgery, change_sites
from em_lightning.surgery.em import watch_first_call
from em_lightning.surgery.functional import NAME, swap_calls
from em_lightning.surgery.record import keep_in_checkpoints, plan_in, record_plan, recorded_plan, settled
from em_lightning.surgery.select import Site, find_modules, walk
from em_lightning.surgery.wrappers import CallSites, Inserted, is_added


def apply_plan(
    model: nn.Module,
    plan: list[dict[str, Any]],
    make: Callable[[nn.Module], nn.Module] | None = None,
    into: Surgery | None = None,
) -> Surgery:
    """Repeat the surgeries of a plan on a fresh model; entries that the model records already are skipped.

    Args:
        model: a model in its state before the surgeries.
        plan: the entries, from :func:`read_plan` or :func:`recorded_plan`.
        make: builds the modules that the plan cannot (those from a function or a prototype).
        into: a surgery to extend; by default a new one.

    Raises:
        NoMatchError: the model has no module at a path of the plan.
        ValueError: the plan cannot build a module and ``make`` is None.
    """
    surgery = Surgery(model) if into is None else into
    done = [settled(entry) for entry in recorded_plan(model)]
    held = [entry for entry in plan if settled(entry) not in done and _holds(model, entry)]
    if held:
        surgery.undos += keep_in_checkpoints(model)
        record_plan(model, [*recorded_plan(model), *held])
    for entry in plan:
        first = entry["tied"] in (None, entry["path"])  # tied modules are built at their first path
        if settled(entry) in done or entry in held or not first:
            continue
        surgery.by = entry["by"]
        _apply(surgery, entry, [other["path"] for other in plan if other["tied"] == entry["path"]], make)
    return surgery


def _holds(model: nn.Module, entry: dict[str, Any]) -> bool:
    """Return whether a model was built from a module that had the surgery, stored with its hyperparameters."""
    pending = [site.module for site in walk(model) if site.path == entry["path"]]
    while pending:
        module = pending.pop()
        if isinstance(module, Inserted):
            pending += [module.layer, module.operator]
        elif isinstance(module, CallSites):
            pending += module.operators
        elif is_added(module):
            cls = type(module)
            if f"{cls.__module__}.{cls.__qualname__}" == entry["class_path"]:
                return True
    return False


def _apply(surgery: Surgery, entry: dict[str, Any], tied: list[str], make: Make | None) -> None:
    path, calls = entry["path"], entry["calls"]
    if entry["init_args"] is not None:
        cls: Any = import_class(entry["class_path"], nn.Module)  # a foreign plan must not call anything but modules
        make = functools.partial(cls, **entry["init_args"])
    if make is None:
        raise ValueError(f"{path!r} holds a {entry['class_path']} of unknown arguments: pass make=, which builds it")
    if entry["operation"] == "functional":
        target = [getattr(nn, name) for name in entry.get("target", ["ReLU"])]
        where = path.removesuffix(NAME).removesuffix(".")
        swap_calls(surgery.model, where, make, target, calls=calls, verbose=False, into=surgery)
        return

    def prepare(surgery: Surgery, site: Site, change: Change) -> None:
        watch_first_call(surgery, site, change, entry.get("undecided", False))

    sites = find_modules(surgery.model, tied or [path])
    shared: Shared = "together" if tied else "separate"
    change_sites(surgery, entry["operation"], sites, lambda _: make, calls, shared, prepare)


def read_plan(path: str | PathLike[str], weights_only: bool = True) -> list[dict[str, Any]]:
    """Return the plan in a checkpoint file, which is empty if it was saved without surgery.

    Args:
        path: the checkpoint.
        weights_only: False loads a file that you trust with objects of any class, such as hyperparameters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    from em_lightning.checkpoints import read_checkpoint  # imports Lightning, which the rest of surgery does without

    return plan_in(read_checkpoint(path, weights_only))


def restore_surgery(
    cls: Any,
    path: str | PathLike[str],
    *,
    make: Callable[[nn.Module], nn.Module] | None = None,
    **arguments: Any,
) -> Any:
    """Build a LightningModule of class ``cls`` with the surgery and the weights of a checkpoint, without a callback.

    Args:
        cls: the LightningModule's class.
        path: the checkpoint.
        make: see :func:`apply_plan`.
        **arguments: those of ``cls.load_from_checkpoint``; ``weights_only`` is True by default.

    Raises:
        ValueError: the checkpoint stores no plan, or is damaged.
    """
    arguments = {"weights_only": True, **arguments}
    plan = read_plan(path, arguments["weights_only"] is not False)
    if not plan:
        raise ValueError(f"{path} was saved without surgery; load it with {cls.__name__}.load_from_checkpoint")

    def on_load_checkpoint(model: Any, checkpoint: dict[str, Any]) -> None:
        apply_plan(model, plan, make)
        cls.on_load_checkpoint(model, checkpoint)

    # load_from_checkpoint builds the model, calls this hook, then loads the weights.
    loader = type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__})
    model = loader.load_from_checkpoint(path, **arguments)  # type: ignore[attr-defined]
    model.__class__ = cls
    return model
