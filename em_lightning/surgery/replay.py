"""Repeat the surgery that a checkpoint records on a fresh model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from em_lightning.registry import import_class
from em_lightning.surgery.edit import Change, Inserted, Surgery, change_sites
from em_lightning.surgery.em import watch_first_call
from em_lightning.surgery.functional import CALLS_CHILD, swap_calls
from em_lightning.surgery.record import keep_in_checkpoints, plan_in, record_plan, recorded_plan, shown_entry, use_axes
from em_lightning.surgery.select import MARKER, Site, find_modules, is_built, walk

# Most elements that a plan may build (1 GiB in float32), against files that fill the memory. Each module or tensor adds
# 2^14, so there are at most 2^14 of them: building many layers takes time that is quadratic in their number.
_MAX_ELEMENTS, _PER_OBJECT = 2**28, 2**14


def apply_plan(model: nn.Module, plan: list[dict[str, Any]], into: Surgery | None = None) -> Surgery:
    """Repeat the surgeries of a plan on a fresh model; entries that the model already records are skipped.

    Raises:
        NoMatchError: the model has no module at a path of the plan.
        ValueError: a module is too large, has no recorded arguments (made by a function or copied) or cannot be built.
    """
    surgery = Surgery(model) if into is None else into
    done = recorded_plan(model)
    if not done:  # the model may contain a module that was passed as a hyperparameter and has had its surgery already
        changed = [_recorded_path(site) for site in walk(model) if any(map(is_built, site.module.modules()))]
        done = [entry for entry in plan if entry["path"] in changed]
        if done:
            surgery.undos += keep_in_checkpoints(model)
            record_plan(model, done)
    with _limited_memory():
        for entry in plan:
            if shown_entry(entry) not in map(shown_entry, done):  # equal texts: the same surgery
                surgery.by = entry["by"]  # the callback that made the change
                try:
                    _apply(surgery, entry)
                except ValueError:
                    raise
                except Exception as error:  # constructors raise errors of many types
                    raise ValueError(f"the plan cannot be applied at {entry['path']!r}: {error}") from error
    return surgery


def _recorded_path(site: Site) -> str:
    """Return the path of a site without the names ``layer``, which inserted operators add to it."""
    names = zip(site.path.split("."), site.ancestors, strict=True)
    return ".".join(name for name, parent in names if not (name == "layer" and isinstance(parent, Inserted)))


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Raise ValueError if new modules exceed ``_MAX_ELEMENTS``, before their initialization."""
    left = _MAX_ELEMENTS

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal left
        left -= _PER_OBJECT + (value.numel() if isinstance(value, Tensor) else 0)
        if left < 0:
            raise ValueError(
                f"the plan builds over {_MAX_ELEMENTS:,} elements, counting {_PER_OBJECT:,} per module and tensor"
            )

    with contextlib.ExitStack() as hooks:
        for kind in ("parameter", "buffer", "module"):
            register = getattr(nn.modules.module, f"register_module_{kind}_registration_hook")
            hooks.enter_context(register(count))
        yield


def _check_numbers(arguments: Any) -> None:
    """Raise ValueError if an integer argument other than a seed exceeds ``_MAX_ELEMENTS``: it may be a size."""
    if isinstance(arguments, Mapping):
        arguments = [value for name, value in arguments.items() if name != "seed"]
    for value in arguments if isinstance(arguments, (list, tuple)) else ():
        if isinstance(value, int) and value > _MAX_ELEMENTS:
            raise ValueError(f"the plan has the argument {value}, which must be at most {_MAX_ELEMENTS:,}")
        _check_numbers(value)


def _apply(surgery: Surgery, entry: dict[str, Any]) -> None:
    path, calls = entry["path"], entry["calls"]
    if entry["init_args"] is None:
        raise ValueError(
            f"{path!r} holds a {entry['class_path']} with unknown arguments, made by a function or copied from an "
            f"instance: repeat this surgery on a new model, then call model.load_state_dict"
        )
    cls: Any = import_class(entry["class_path"], nn.Module)  # so that a plan cannot call anything but modules
    _check_numbers(entry["init_args"])
    make = functools.partial(cls, **entry["init_args"])

    def after_change(site: Site, change: Change) -> None:
        watch_first_call(surgery, site, change)
        use_axes(change.entry, entry)

    if entry["operation"] == "functional":
        target = [getattr(nn, name) for name in entry["target"]]
        where = path.removesuffix(CALLS_CHILD).removesuffix(".")  # the module that calls the function
        swap_calls(surgery, where, make, target, calls, after_change)
    else:
        sites = find_modules(surgery.model, [path])
        change_sites(surgery, entry["operation"], sites, lambda _: make, calls, after_change)


def read_plan(path: str | PathLike[str], weights_only: bool = True) -> list[dict[str, Any]]:
    """Return the plan in a checkpoint file; the plan is empty if the model had no surgery.

    ``weights_only=False`` also loads objects of any class, such as hyperparameters, from a file that you trust.

    Raises:
        ValueError: the file is damaged, its plan is malformed, or it has weights of a changed model without a plan.
    """
    from em_lightning.checkpoints import read_checkpoint  # imports Lightning, which surgery itself does not need

    checkpoint = read_checkpoint(path, weights_only)
    plan = plan_in(checkpoint)
    keys = [key for part in (checkpoint, *checkpoint.values()) if isinstance(part, Mapping) for key in part]
    if not plan and any(MARKER in str(key) for key in keys):
        raise ValueError(
            f"{path} has weights of a changed model, but no plan: a Trainer stores one only if the surgery was on the "
            f"LightningModule itself; repeat the surgery on a new model, then call load_state_dict"
        )
    return plan


def restore_surgery(cls: Any, path: str | PathLike[str], **arguments: Any) -> Any:
    """Build a LightningModule of class ``cls`` with the surgery and the weights of a checkpoint, without a callback.

    Further arguments are those of ``cls.load_from_checkpoint``; ``weights_only`` is True by default.

    Raises:
        ValueError: the checkpoint stores no plan, is damaged, or lacks the arguments of a module.
        TypeError: ``cls`` is not the class of a LightningModule.
    """
    if isinstance(cls, nn.Module) or not hasattr(cls, "load_from_checkpoint"):
        shown = cls.__name__ if isinstance(cls, type) else f"an instance of {type(cls).__name__}"
        raise TypeError(f"cls must be the class of a LightningModule, got {shown}")
    arguments = {"weights_only": True, **arguments}
    plan = read_plan(path, arguments["weights_only"] is not False)
    if not plan:
        raise ValueError(f"{path} was saved without surgery; load it with {cls.__name__}.load_from_checkpoint")

    def on_load_checkpoint(model: Any, checkpoint: dict[str, Any]) -> None:
        apply_plan(model, plan)
        cls.on_load_checkpoint(model, checkpoint)

    # load_from_checkpoint builds the model, calls this hook, then loads the weights. A subclass can change the hook
    # without a change of the user's class; the name is the same, as models may log or compare it.
    loader = type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__})
    load: Any = loader.load_from_checkpoint  # type: ignore[attr-defined]
    try:
        model = load(path, **arguments)
    except TypeError as error:
        if "weights_only" not in str(error):
            raise
        del arguments["weights_only"]  # load_from_checkpoint of the class passes it itself
        model = load(path, **arguments)
    model.__class__ = cls
    return model
