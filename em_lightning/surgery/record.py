"""The plan of a surgery, stored in checkpoints and compared on loading: one entry of plain values per site."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from em_lightning.surgery.hooks import Undo, wrap
from em_lightning.surgery.select import MARKER

KEY = "em_lightning"  # key in the checkpoint dictionary
_PLAN = "_em_surgery_plan"  # attribute of a changed model
# Of an entry, besides "axes", see use_axes. target: classes of the replaced functions; by: a state_key or None
_FIELDS = {"operation", "path", "class_path", "init_args", "calls", "target", "by"}
_OPERATIONS = ("replace", "insert_after", "functional")


def recorded_plan(model: nn.Module) -> list[dict[str, Any]]:
    """Return the plan of all surgeries on a model: one entry of plain values per site."""
    return list(vars(model).get(_PLAN, []))


def record_plan(model: nn.Module, plan: list[dict[str, Any]]) -> None:
    """Set the plan of a model; an empty plan removes the attribute."""
    vars(model)[_PLAN] = plan
    if not plan:
        del vars(model)[_PLAN]


def keep_in_checkpoints(model: nn.Module) -> list[Undo]:
    """Let a LightningModule store its plan in its checkpoints and compare it on loading; return the undo functions."""
    _warn_of_dropped_surgeries()
    links = {"on_save_checkpoint": _save, "on_load_checkpoint": _compare}
    # Not isinstance(model, LightningModule), as lightning and pytorch_lightning each define one.
    return [wrap(model, name, functools.partial(link, model)) for name, link in links.items() if hasattr(model, name)]


def _warn_of_dropped_surgeries() -> None:
    """Let ``load_state_dict(strict=False)`` of any model warn if it drops a surgery: torch has no global hook."""
    load = nn.Module.load_state_dict
    if hasattr(load, "warns_of_surgery"):
        return

    @functools.wraps(load)
    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        keys = load(self, *args, **kwargs)
        dropped = [key.removesuffix(MARKER).rstrip(".") for key in keys.unexpected_keys if key.endswith(MARKER)]
        if dropped:
            warnings.warn(
                f"strict=False drops the surgery at {', '.join(dropped)} of {type(self).__name__}: load the checkpoint "
                f"with RestoreSurgery or restore_surgery",
                stacklevel=2,
            )
        return keys

    vars(load_state_dict)["warns_of_surgery"] = True
    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _save(model: nn.Module, proceed: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
    checkpoint[KEY] = {"surgery": recorded_plan(model)}
    return proceed(checkpoint)


def _compare(model: nn.Module, proceed: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
    plans = [sorted(plan, key=shown_entry) for plan in (plan_in(checkpoint), recorded_plan(model))]
    stored, live = ([shown_entry(entry) for entry in plan] for plan in plans)
    if stored != live:
        missing = "; ".join(entry for entry in stored if entry not in live) or "nothing"
        extra = "; ".join(entry for entry in live if entry not in stored) or "nothing"
        advice = "Use the callbacks of the run that saved it, or em_lightning.surgery.restore_surgery"
        if not stored:
            advice = (
                "To start from its weights, load them before the fit, with "
                "model.load_state_dict(torch.load(path)['state_dict']), and fit without ckpt_path"
            )
        raise ValueError(
            f"the checkpoint was saved {'after another' if stored else 'without'} surgery: only in the checkpoint: "
            f"{missing}; only in the model: {extra}. {advice}"
        )
    for saved, own in zip(*plans, strict=True):
        use_axes(own, saved)
    return proceed(checkpoint)


def shown_entry(entry: Mapping[str, Any]) -> str:
    """Return an entry as text for errors, equal for entries of the same surgery."""
    return f"{entry['operation']} {entry['path']}: {entry['class_path']}({entry['init_args'] or entry.get('repr', '')})"


def use_axes(entry: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """Copy the axes of a stored entry to one of a model, whose dictionaries are ``UnitAxis.decided`` of its modules."""
    for decided, kept in zip(entry.get("axes", []), stored.get("axes", []), strict=False):
        decided.update({int(num_axes): int(axis) for num_axes, axis in kept.items()})


def arguments_of(make: Any) -> dict[str, Any] | None:
    """Return the constructor arguments that a plan stores, or None if only ``make`` itself can build the module."""
    if not (isinstance(make, functools.partial) and isinstance(make.func, type)) or make.args:
        return None
    with contextlib.suppress(TypeError, ValueError):
        json.dumps(make.keywords)  # plain values only
        return dict(make.keywords)
    return None


def plan_in(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the plan in a loaded checkpoint, empty without surgery; raise ValueError if it is malformed."""
    stored = checkpoint.get(KEY, {})
    plan = stored.get("surgery", []) if isinstance(stored, Mapping) else None
    if not isinstance(plan, list) or not all(
        isinstance(entry, Mapping) and _FIELDS <= set(entry) and entry["operation"] in _OPERATIONS for entry in plan
    ):
        raise ValueError(f"checkpoint[{KEY!r}] holds no plan of a surgery; entries have the fields {sorted(_FIELDS)}")
    return list(plan)
