"""Replace modules and insert others behind them, in any model, and undo it."""

from __future__ import annotations

import copy
import functools
import weakref
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from em_lightning.surgery.chain import wrap
from em_lightning.surgery.find import Site, Where, find_modules
from em_lightning.surgery.plan import describe, keep_plan, recorded_plan
from em_lightning.surgery.sites import CallSites, Inserted, Visits, mark

Make = nn.Module | type[nn.Module] | Callable[[nn.Module], nn.Module]
Calls = int | Literal["any"] | Mapping[str, Any] | None
_LIVE: weakref.WeakSet[Surgery] = weakref.WeakSet()
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass
class Change:
    """One operated slot: ``parent.<name>`` held ``old`` and holds ``new``."""

    path: str
    operation: str
    parent: nn.Module
    name: str
    old: Any  # a module, or the function that stood there
    new: nn.Module
    added: list[nn.Module]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that came with the change, by name."""
        names = {id(p): n for n, p in self.new.named_parameters(prefix=self.path)}
        return {names.get(id(p), self.path): p for module in self.added for p in module.parameters()}


class Surgery:
    """What was changed in a model, and the way back.

    Attributes:
        model: the model that was operated.
        changes: one :class:`Change` per slot.
    """

    def __init__(self, model: nn.Module, by: str | None = None) -> None:
        self.model = model
        self.by = by
        self.changes: list[Change] = []
        self._entries: list[dict[str, Any]] = []
        self._ways_back: list[Callable[[], Any]] = []
        _LIVE.add(self)

    @property
    def report(self) -> str:
        """A table of what changed: path, what stood there, what stands there, the parameters added."""
        rows = [("path", "before", "after", "parameters")]
        for change in self.changes:
            before = getattr(change.old, "__name__", type(change.old).__name__)
            after = " + ".join(dict.fromkeys(type(module).__name__ for module in change.added))
            if change.operation == "insert_after":
                after = f"{before} -> {after}"
            rows.append((change.path, before, after, str(sum(p.numel() for p in change.parameters().values()))))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that the surgery added, by its name in the model."""
        return {name: p for change in self.changes for name, p in change.parameters().items()}

    def undo(self) -> None:
        """Put everything back as it was; surgeries on one model can be undone in any order."""
        for change in reversed(self.changes):
            _take_out(change)
        for way_back in reversed(self._ways_back):
            way_back()
        keep_plan(self.model, [e for e in recorded_plan(self.model) if not any(e is own for own in self._entries)])
        self.changes, self._entries, self._ways_back = [], [], []
        _LIVE.discard(self)

    def __len__(self) -> int:
        return len(self.changes)

    def __enter__(self) -> Surgery:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def replace_modules(
    model: nn.Module,
    where: Where,
    make: Make,
    *,
    target: Where | None = None,
    shared: Literal["separate", "together", "refuse"] = "separate",
    calls: Calls = None,
    into: Surgery | None = None,
) -> Surgery:
    """Put another module in the place of each selected one.

    The new module takes over the hooks, device, dtype and mode of the old one. It is built from a random stream of its
    own, seeded by the path, so that the user's stream is untouched and all ranks build the same.

    Args:
        model: any module; in Lightning the LightningModule itself, so that its checkpoints carry the plan.
        where: what to replace, see :func:`find_modules`.
        make: a class or a ``functools.partial`` of one (built anew for each site), a module (copied for each site), or
            a function of the old module.
        target: a second selection that has to hold as well.
        shared: one instance under several names gets a ``"separate"`` module for each name, one for all of them
            (``"together"``), or is ``"refuse"``-d.
        calls: how often a module is called within one forward of the module that holds it, as a ResNet's reused
            ``self.relu``. An int builds as many operators, one per call; ``"any"`` shares one; a mapping from name
            patterns gives either per site. By default a second call raises where the new module has parameters.
        into: a surgery to extend; by default a new one.

    Raises:
        NoMatchError: nothing is selected.
        ValueError: a site cannot be operated (a ScriptModule, the inside of nn.MultiheadAttention, a refused sharing).
        TypeError: ``make`` gave no module.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> surgery = replace_modules(net, nn.ReLU, nn.Tanh)
        >>> print(surgery.report)
        path  before  after  parameters
        1     ReLU    Tanh   0
        >>> surgery.undo()
        >>> net[1]
        ReLU()
    """
    return _operate("replace", model, where, make, target, shared, calls, into)


def insert_after(
    model: nn.Module,
    where: Where,
    make: Make,
    *,
    target: Where | None = None,
    shared: Literal["separate", "together", "refuse"] = "separate",
    calls: Calls = None,
    into: Surgery | None = None,
) -> Surgery:
    """Put an operator behind each selected module: its output ``y`` becomes ``operator(y)``.

    Arguments, sharing and errors are those of :func:`replace_modules`. The parameters of the layer are found under
    ``<path>.layer``, those of the operator under ``<path>.operator``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with insert_after(net, "0", nn.LayerNorm(3)) as surgery:
        ...     print(type(net[0].operator).__name__)
        LayerNorm
        >>> net[0]
        Linear(in_features=2, out_features=3, bias=True)
    """
    return _operate("insert_after", model, where, make, target, shared, calls, into)


def _operate(
    operation: str,
    model: nn.Module,
    where: Where,
    make: Make,
    target: Where | None,
    shared: str,
    calls: Calls,
    into: Surgery | None,
) -> Surgery:
    if shared not in ("separate", "together", "refuse"):
        raise ValueError(f"shared={shared!r} is unknown: use 'separate', 'together' or 'refuse'")
    surgery = Surgery(model) if into is None else into
    sites = find_modules(model, where, target, closed=[change.new for change in surgery.changes])
    sites = [site for site in sites if not any(site.module is change.new for change in surgery.changes)]
    for site in sites:
        check_operable(site)
    names: dict[int, list[str]] = {}
    for site in sites:
        names.setdefault(id(site.module), []).append(site.path)
    if shared == "refuse":
        for paths in names.values():
            if len(paths) > 1:
                raise ValueError(
                    f"{' and '.join(paths)} are one instance and shared='refuse': "
                    f"give each name a module of its own, or set shared='separate' or 'together'"
                )
    built: dict[int, nn.Module] = {}
    entries = []
    for site in sites:
        new = built.get(id(site.module)) if shared == "together" else None
        wanted = calls_at(site.path, calls)
        added: list[nn.Module] = [] if new is None else [new]
        if new is None:
            new, added = new_module(operation, site, make, wanted)
            built[id(site.module)] = new
        _put_in(surgery, operation, site, new, added)
        if shared != "together":
            count_calls(surgery, site, new.operator if isinstance(new, Inserted) else new, wanted)
        entry = describe(operation, site.path, make, added[0], wanted)
        entry["by"] = surgery.by
        entry["tied"] = names[id(site.module)][0] if shared == "together" else None
        entries.append(entry)
    surgery._entries += entries
    keep_plan(model, recorded_plan(model) + entries)
    return surgery


def calls_at(path: str, calls: Calls) -> int | str | None:
    """Return how many calls a site is made for: a number, "any", or None where that was left open."""
    if isinstance(calls, Mapping):
        calls = next((n for pattern, n in calls.items() if fnmatchcase(path, pattern)), None)
    if calls is None or calls == "any" or (isinstance(calls, int) and calls >= 1):
        return calls
    raise ValueError(
        f"calls={calls!r} is no number of calls: use a positive int, 'any', or a mapping of patterns to these"
    )


def check_operable(site: Site) -> None:
    """Raise where a module's own code would pass by whatever is put there."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in (*site.ancestors, site.module)):
        raise ValueError(
            f"{site.path!r} belongs to a ScriptModule, which is compiled and cannot be changed: "
            f"operate before torch.jit.script, or leave it out through where="
        )
    if isinstance(site.parent, nn.MultiheadAttention):
        raise ValueError(
            f"{site.path!r} lies inside nn.MultiheadAttention, which reads the weights of its {site.name} and never "
            f"calls it: operate on the attention as a whole, or leave it out through where="
        )


def take_slow_path(site: Site) -> list[Callable[[], Any]]:
    """Switch off the fused inference of the transformer layers around a site; return the ways back."""
    ways_back: list[Callable[[], Any]] = []
    for module in (*site.ancestors, site.module):
        for kind, flag, off in (
            (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
            (nn.TransformerEncoder, "use_nested_tensor", False),
        ):
            if isinstance(module, kind):
                reasons = vars(module).setdefault("_em_slow_path", [getattr(module, flag)])  # first what was there
                reasons.append(site.path)
                setattr(module, flag, off)
                ways_back.append(functools.partial(_allow_fast_path, module, flag, site.path))
    return ways_back


def _allow_fast_path(module: nn.Module, flag: str, path: str) -> None:
    reasons = vars(module)["_em_slow_path"]
    reasons.remove(path)
    if len(reasons) == 1:
        setattr(module, flag, reasons[0])
        del vars(module)["_em_slow_path"]


def new_module(operation: str, site: Site, make: Make, calls: int | str | None) -> tuple[nn.Module, list[nn.Module]]:
    """Build what is to stand at a site, and return it with the modules that were made for it."""
    count = calls if isinstance(calls, int) else 1
    added = []
    for index in range(count):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # torch.manual_seed would also set the streams of every accelerator
            torch.random.default_generator.manual_seed(zlib.crc32(f"{site.path}#{index}".encode()))
            module = build(make, site.module)
        if not isinstance(module, nn.Module):
            raise TypeError(f"make returned {module!r} for {site.path!r}; it has to return an nn.Module")
        if module is site.module:
            raise ValueError(f"make returned the module that stands at {site.path!r} already; return a new one")
        _fit_in(module, site)
        mark(module)
        added.append(module)
    new = CallSites(added, Visits(site.path, count)) if count > 1 else added[0]
    if operation == "insert_after":
        new = Inserted(site.module, new)
    new.training = site.parent.training if site.function is not None else site.module.training
    return new, added


def count_calls(surgery: Surgery, site: Site, operator: nn.Module, calls: int | str | None) -> None:
    """Let the operators of a site take turns, or guard its only one, if it has parameters."""
    if isinstance(operator, CallSites):
        visits = operator.visits
    elif calls != "any" and any(True for _ in operator.parameters()):
        visits = Visits(site.path, 1)
        surgery._ways_back.append(operator.register_forward_pre_hook(visits.guard).remove)
    else:
        return
    if site.owner is surgery.model:  # under DDP a hook on the root would fire around training_step
        surgery._ways_back.append(wrap(surgery.model, "forward", visits.around).remove)
    else:
        surgery._ways_back.append(site.owner.register_forward_pre_hook(visits.begin).remove)
        surgery._ways_back.append(site.owner.register_forward_hook(visits.end).remove)


def build(make: Make, old: nn.Module) -> Any:
    """Build the module for one site from a class, a partial of a class, a prototype or a function of the old module."""
    if isinstance(make, nn.Module):
        return copy.deepcopy(make)
    if isinstance(make, type) or (isinstance(make, functools.partial) and isinstance(make.func, type)):
        return make()
    return make(old)


def _fit_in(new: nn.Module, site: Site) -> None:
    """Give a new module the device, dtype and mode of what stands at its site."""
    kept = {id(module) for module in site.module.modules()}
    for module in (site.module, *reversed(site.ancestors)):
        like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
        if like is not None:
            new.to(device=like.device, dtype=like.dtype)
            break
    for module in new.modules():
        if id(module) not in kept:  # a new module may hold the old one, whose mode is its own affair
            module.training = site.parent.training if site.function is not None else site.module.training


def _put_in(surgery: Surgery, operation: str, site: Site, new: nn.Module, added: list[nn.Module]) -> None:
    if operation == "replace":
        for hooks in _HOOKS:
            own, kept = getattr(new, hooks), getattr(site.module, hooks)
            kept.update(own)
            setattr(new, hooks, kept)  # the same dict, so that handles of the user still work
            surgery._ways_back.extend(functools.partial(kept.pop, key, None) for key in own)
        new._is_full_backward_hook = site.module._is_full_backward_hook
    surgery._ways_back.extend(take_slow_path(site))
    if site.function is not None:
        delattr(site.parent, site.name)
        setattr(site.parent, site.name, new)
    else:
        site.parent._modules[site.name] = new
    old = site.module if site.function is None else site.function
    surgery.changes.append(Change(site.path, operation, site.parent, site.name, old, new, added))


def _take_out(change: Change) -> None:
    parent, name = change.parent, change.name
    old = (
        change.new.layer if isinstance(change.new, Inserted) else change.old
    )  # the layer may itself have been replaced since
    later = [other for surgery in _LIVE for other in surgery.changes if other is not change]
    holder: Any = parent
    while holder._modules.get(name) is not change.new and isinstance(holder._modules.get(name), Inserted):
        holder, name = holder._modules[name], "layer"  # another surgery has put an operator behind this one
    if holder._modules.get(name) is change.new:
        if change.operation == "functional":  # there was nothing
            del holder._modules[name]
        elif isinstance(old, nn.Module):
            holder._modules[name] = old
        else:
            delattr(holder, name)
            setattr(holder, name, old)
    for other in later:
        if other.old is change.new:  # replaced by another surgery, which shall not bring it back
            other.old = old
        if other.parent is change.new:
            other.parent, other.name = holder, name
