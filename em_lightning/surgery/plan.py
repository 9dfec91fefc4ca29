"""The plan of a surgery: what a checkpoint has to know to be loaded again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from torch import nn

from em_lightning.registry import import_class
from em_lightning.surgery.chain import Handle, wrap
from em_lightning.surgery.checkpoint import read_checkpoint

KEY = "em_lightning"  # under which a checkpoint holds the plan
_PLAN = "_em_surgery_plan"
_ENTRY = {"operation", "path", "class_path", "init_args", "calls", "tied", "by"}
_OPERATIONS = ("replace", "insert_after", "functional")


def recorded_plan(model: nn.Module) -> list[dict[str, Any]]:
    """Return the plan of all surgeries on a model: one entry of primitives per site."""
    return list(vars(model).get(_PLAN, []))


def keep_plan(model: nn.Module, entries: list[dict[str, Any]]) -> None:
    """Record a plan on a model and, in a LightningModule, in its checkpoints."""
    handles: list[Handle] = vars(model).pop("_em_surgery_handles", [])
    for handle in handles:
        handle.remove()
    vars(model).pop(_PLAN, None)
    if not entries:
        return
    vars(model)[_PLAN] = entries
    # Any Lightning, whatever its import path, has these two; they survive weights-only saves, pickle and deepcopy.
    if hasattr(model, "on_save_checkpoint") and hasattr(model, "on_load_checkpoint"):
        vars(model)["_em_surgery_handles"] = [
            wrap(model, "on_save_checkpoint", functools.partial(_save, model)),
            wrap(model, "on_load_checkpoint", functools.partial(_compare, model)),
        ]


def _save(model: nn.Module, proceed: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
    checkpoint[KEY] = {"surgery": recorded_plan(model)}
    return proceed(checkpoint)


def _compare(model: nn.Module, proceed: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
    stored = [_readable(entry) for entry in plan_in(checkpoint)]
    live = [_readable(entry) for entry in recorded_plan(model)]
    if sorted(stored) != sorted(live):
        missing = [entry for entry in stored if entry not in live] or ["nothing"]
        extra = [entry for entry in live if entry not in stored] or ["nothing"]
        raise ValueError(
            f"the checkpoint was saved after another surgery: only in it: {'; '.join(missing)}; only in the model: "
            f"{'; '.join(extra)}. Use the callbacks it was trained with, or em_lightning.surgery.restore_surgery"
        )
    return proceed(checkpoint)


def _readable(entry: Mapping[str, Any]) -> str:
    arguments = entry["init_args"]
    inner = "..." if arguments is None else ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    calls = "" if entry["calls"] is None else f" calls={entry['calls']}"
    tied = "" if entry["tied"] is None else f" tied to {entry['tied']}"
    return f"{entry['operation']} {entry['path']}: {entry['class_path']}({inner}){calls}{tied}"


def describe(operation: str, path: str, make: Any, module: nn.Module, calls: int | str | None) -> dict[str, Any]:
    """Return the entry of one site; ``init_args`` is None where only ``make`` itself can build the module again."""
    arguments: dict[str, Any] | None = None
    if isinstance(make, type):
        arguments = {}
    elif isinstance(make, functools.partial) and isinstance(make.func, type) and not make.args:
        arguments = dict(make.keywords) if _primitive(make.keywords) else None
    cls = type(module)
    class_path = f"{cls.__module__}.{cls.__qualname__}"
    return {"operation": operation, "path": path, "class_path": class_path, "init_args": arguments, "calls": calls}


def _primitive(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _primitive(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(_primitive(inner) for inner in value)
    return value is None or isinstance(value, (str, int, float, bool))


def plan_in(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the plan that a loaded checkpoint holds; empty where it was saved without surgery.

    Raises:
        ValueError: what stands in its place is no plan.
    """
    kept = checkpoint.get(KEY, {})
    plan = kept.get("surgery", []) if isinstance(kept, Mapping) else None
    if not isinstance(plan, list) or not all(
        isinstance(entry, Mapping) and _ENTRY <= set(entry) and entry["operation"] in _OPERATIONS for entry in plan
    ):
        raise ValueError(f"checkpoint[{KEY!r}] holds no plan of a surgery; take a checkpoint that was not altered")
    return list(plan)


def apply_plan(
    model: nn.Module,
    plan: list[dict[str, Any]],
    make: Callable[[nn.Module], nn.Module] | None = None,
    into: Any = None,
) -> None:
    """Repeat on a fresh model the surgeries of a plan.

    Args:
        model: a model as it was before them.
        plan: the entries, from :func:`plan_in`.
        make: builds the modules which the plan cannot (those that came from a function or a prototype).
        into: a surgery to extend; by default a new one for each entry.

    Raises:
        ValueError: such a module is in the plan, and no ``make`` is given.
    """
    from em_lightning.surgery.edit import Surgery, insert_after, replace_modules
    from em_lightning.surgery.functional import swap_relu_calls

    operations: dict[str, Callable[..., Surgery]] = {
        "replace": replace_modules,
        "insert_after": insert_after,
        "functional": swap_relu_calls,
    }
    for entry in plan:
        if entry["init_args"] is not None:
            # The plan may come from somebody else's file, which must not have anything but a module built.
            cls: Callable[..., nn.Module] = import_class(entry["class_path"], nn.Module)
            builder: Any = functools.partial(cls, **entry["init_args"])
        elif make is not None:
            builder = make
        else:
            raise ValueError(
                f"{entry['path']!r} holds a {entry['class_path']} whose arguments the checkpoint does not know: "
                f"pass make=, the function of the old module that builds it"
            )
        surgery = Surgery(model, entry["by"]) if into is None else into
        if entry["tied"] is None:
            operations[entry["operation"]](model, [entry["path"]], builder, calls=entry["calls"], into=surgery)
        elif entry["tied"] == entry["path"]:  # with the other names of the instance, at its first
            paths = [other["path"] for other in plan if other["tied"] == entry["tied"]]
            operations[entry["operation"]](model, paths, builder, calls=entry["calls"], shared="together", into=surgery)


def restore_surgery(
    cls: Any,
    path: str | PathLike[str],
    *,
    make: Callable[[nn.Module], nn.Module] | None = None,
    **arguments: Any,
) -> Any:
    """Load the checkpoint of an operated LightningModule without the callback that operated it.

    Args:
        cls: the LightningModule's class.
        path: the checkpoint.
        make: see :func:`apply_plan`.
        **arguments: those of ``cls.load_from_checkpoint``.

    Returns:
        A model of class ``cls`` with the surgery and the weights of the checkpoint.

    Raises:
        ValueError: the checkpoint holds no plan, or is damaged.
        TypeError: ``cls`` is no class.
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls is an instance of {type(cls).__name__}; give the class itself")

    def on_load_checkpoint(model: Any, checkpoint: dict[str, Any]) -> None:
        plan = plan_in(checkpoint)
        if not plan:
            raise ValueError(f"{path} was saved without surgery; load it with {cls.__name__}.load_from_checkpoint")
        apply_plan(model, plan, make)
        cls.on_load_checkpoint(model, checkpoint)  # type: ignore[attr-defined]

    read_checkpoint(path)  # which says more of a damaged file
    # load_from_checkpoint builds the model, then calls this hook, then loads the weights
    loader = type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__})
    model = loader.load_from_checkpoint(path, **{"weights_only": True, **arguments})  # type: ignore[attr-defined]
    model.__class__ = cls
    return model


def read_plan(path: str | PathLike[str]) -> list[dict[str, Any]]:
    """Return the plan in a checkpoint file."""
    return plan_in(read_checkpoint(path))
