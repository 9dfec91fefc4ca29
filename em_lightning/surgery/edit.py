"""Replace modules of any model or insert modules after them; undo the changes."""

from __future__ import annotations

import copy
import functools
import warnings
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from em_lightning.surgery.hooks import Undo, carry_hooks, disable_fast_path, first_tensor, undo_all, wrap
from em_lightning.surgery.owners import Twin, is_equal_copy, refuse_original, twins_of
from em_lightning.surgery.record import arguments_of, keep_in_checkpoints, record_plan, recorded_plan
from em_lightning.surgery.select import MARKER, Site, Where, check_reachable, class_name, find_modules

Make = nn.Module | type[nn.Module] | Callable[[nn.Module], nn.Module]
Calls = int | Literal["any"] | None
AfterChange = Callable[[Site, "Change"], None]
_SURGERY_BY = "_em_surgery_by "  # followed by ``Surgery.by``: attribute of a model that holds this surgery
# Attribute of a new module, set by an undo while a later surgery keeps the module: what the later undo must restore.
_BEFORE = "_em_before"


class Change(NamedTuple):
    """One changed site: ``parent.<name>`` held ``old`` and now holds ``new``."""

    parent: nn.Module
    name: str
    old: Any  # a module; a function; for replaced calls the class of an equivalent module
    new: nn.Module
    added: nn.Module  # new itself, or the operator in it: the module that was built, or a PerCall of several
    modules: list[Any]  # that were built for the site: N with ``calls=N``, otherwise one
    entry: dict[str, Any]  # the change's entry in the plan
    make: Make  # which built ``modules``

    @property
    def path(self) -> str:
        """The site's dotted name from the root."""
        return self.entry["path"]


class Inserted(nn.Module):
    """A layer and the operator after it: ``operator(layer(...))``, on the first tensor of a tuple or dataclass.

    Other attributes are those of the layer, so that code which reads ``model.encoder.weight``, or sets it, still works.
    """

    def __init__(self, layer: nn.Module, operator: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.operator = operator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output with the operator applied."""
        first, put = first_tensor(self.layer(*args, **kwargs), f"the output of {type(self.layer).__name__}")
        return put(self.operator(first))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # The layer is not set yet during unpickling. By the other names, peft would take this module for its layer.
            if name in ("layer", "base_layer", "unload_and_optionally_merge_module"):
                raise
            return getattr(self.layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name.startswith("_") or name in ("layer", "operator") or name in vars(self) or hasattr(type(self), name)
        target = super() if own or not hasattr(self._modules.get("layer"), name) else self.layer
        target.__setattr__(name, value)


class CallCounter:
    """Counts the calls of a module within one forward of its caller; ``on_excess(path, why)`` is called if too many."""

    def __init__(self, path: str, allowed: int, on_excess: Callable[[str, str], None]) -> None:
        self.path = path
        self.allowed = allowed
        self.on_excess = on_excess
        self.count: int | None = None  # calls in the current forward; None outside

    def around(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrapper of the caller's forward; RuntimeError if the module was called, but fewer times than allowed."""
        self.count = 0
        output = proceed(*args, **kwargs)
        count, self.count = self.count, None
        if count and count < self.allowed:
            raise RuntimeError(f"{self.path!r} has {count} calls, not calls={self.allowed}: set calls={count}")
        return output

    def check(self, *_: Any) -> None:
        """Forward pre-hook of the module: count the call."""
        if self.count is None:
            return
        if self.count == self.allowed:
            self.on_excess(self.path, f"is called more than {self.allowed} time(s) in one forward")
        self.count += 1


def _refuse_sharing(path: str, why: str) -> None:
    """Raise, because a module with parameters would share them between unrelated layers."""
    raise RuntimeError(
        f"{path!r} {why}, and its replacement has parameters: set calls=N for one module per call, or calls='any' to "
        f"share one among all calls"
    )


class PerCall(nn.ModuleList):
    """One module for each call within one forward of the caller, in the order of the calls."""

    def __init__(self, modules: Iterable[nn.Module], counter: CallCounter) -> None:
        super().__init__(modules)
        self.register_buffer(MARKER, torch.zeros(1, dtype=torch.uint8), persistent=False)  # its modules' are persistent
        self.counter = counter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module of this call, which the counter has counted; outside of the caller's forward, the first."""
        return self[max((self.counter.count or 0) - 1, 0)](*args, **kwargs)


def surgery_by(model: nn.Module, by: str) -> Surgery:
    """Return the model's surgery with this ``by``; for a copied model, a new surgery without changes to undo."""
    return vars(model).get(_SURGERY_BY + by) or Surgery(model, by)


class Surgery:
    """The ``changes`` to a model, one :class:`Change` per site; ``by``: the state_key of the callback behind them."""

    def __init__(self, model: nn.Module, by: str | None = None) -> None:
        self.model = model
        self.by = by
        self.changes: list[Change] = []
        self.undos: list[Undo] = []
        self.first_calls: list[Any] = []  # hooks that record whether each new module was called
        self.unchanged_copies: dict[str, Twin] = {}  # target networks and other copies without surgery, by path
        if by is not None:
            vars(model)[_SURGERY_BY + by] = self

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and pickles of the model hold None: only the original can be restored

    @property
    def report(self) -> str:
        """A table of the changes: path, class before and after, number of added parameters."""
        rows = [("path", "before", "after", "parameters")]
        for change in self.changes:
            old, new = type(change.old), type(change.added)
            before, after = getattr(change.old, "__name__", old.__name__), new.__name__
            if before == after:
                before, after = class_name(old), class_name(new)
            if change.entry["operation"] == "insert_after":
                after = f"{before} -> {after}"
            parameters = sum(p.numel() for p in change.added.parameters())
            rows.append((change.path, before, after, str(parameters)))
        first, second, third, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(f"{row[0]:{first}}  {row[1]:{second}}  {row[2]:{third}}  {row[3]}" for row in rows)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all added parameters by their name in the model."""
        added = {id(p) for change in self.changes for p in change.added.parameters()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in added}

    def find(self, where: Where, target: Where | None = None) -> list[Site]:
        """Return the sites that match, as :func:`find_modules` does, without those that this surgery changed."""
        new = {change.new for change in self.changes}
        return [site for site in find_modules(self.model, where, target) if not new & {*site.ancestors, site.module}]

    def warn_of_copies(
        self, is_trained: Callable[[Tensor], bool] = lambda parameter: parameter.requires_grad
    ) -> Surgery:
        """Warn of unchanged copies that are not trained, such as teachers, while their originals are; return self."""
        for twin in self.unchanged_copies.values():
            original, copied = (self.model.get_submodule(path).parameters() for path in (twin.original, twin.copy))
            if any(map(is_trained, original)) and not any(map(is_trained, copied)):
                warnings.warn(
                    f"surgery changed {twin.layer!r}, but not {twin.counterpart!r} of an untrained copy: add it to "
                    f"where= if {twin.copy!r} follows {twin.original!r}, as target networks and teachers do",
                    stacklevel=3,
                )
        return self

    def undo(self) -> None:
        """Restore the model; several surgeries on one model can be undone in any order."""
        for change in reversed(self.changes):
            _put_back(self.model, change)
        undo_all(self.undos)
        own = {id(change.entry) for change in self.changes}
        record_plan(self.model, [entry for entry in recorded_plan(self.model) if id(entry) not in own])
        self.changes, self.unchanged_copies = [], {}
        attribute = f"{_SURGERY_BY}{self.by}"
        if vars(self.model).get(attribute) is self:
            del vars(self.model)[attribute]

    def __enter__(self) -> Surgery:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def replace_modules(model: nn.Module, where: Where, make: Make, *, calls: Calls = None) -> Surgery:
    """Replace each selected module by a new one; an instance with several names is replaced by one module per name.

    The new module takes over the hooks, device, dtype and mode of the old one. Hooks that are added to the new module
    are lost at the undo. It is built with a random seed derived from its path, so that the user's random stream does
    not change and all ranks build the same module.

    Args:
        model: any module; in Lightning the LightningModule itself, so that its checkpoints store the plan.
        where: what to replace, see :func:`find_modules`.
        make: a class or a ``functools.partial`` of one (built for each site), a module (copied for each site), or a
            function of the old module that returns the new one.
        calls: for several calls in one forward of the parent, such as those of a ResNet's reused ``self.relu``: a
            number makes one new module per call, "any" shares one. By default it raises if that has parameters.

    Raises:
        NoMatchError: nothing matches.
        ValueError: ``calls`` is out of range, or a site is part of a ScriptModule or nn.MultiheadAttention.
        TypeError: ``where`` has a wrong type, or ``make`` returned no new module.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> surgery = replace_modules(net, nn.ReLU, nn.Tanh)
        >>> print(surgery.report)
        path  before  after  parameters
        1     ReLU    Tanh   0
    """
    return change_sites(Surgery(model), "replace", find_modules(model, where), lambda _: make, calls)


def insert_after(model: nn.Module, where: Where, make: Make, *, calls: Calls = None) -> Surgery:
    """Insert an operator after each selected module: its output ``y`` becomes ``operator(y)``.

    Arguments and errors are those of :func:`replace_modules`. The layer's parameters are then named
    ``<path>.layer.*``, those of the operator ``<path>.operator.*``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with insert_after(net, "0", nn.LayerNorm(3)) as surgery:
        ...     print(type(net[0].operator).__name__)
        LayerNorm
        >>> net[0]
        Linear(in_features=2, out_features=3, bias=True)
    """
    return change_sites(Surgery(model), "insert_after", find_modules(model, where), lambda _: make, calls)


def change_sites(
    surgery: Surgery,
    operation: Literal["replace", "insert_after", "functional"],
    sites: list[Site],
    make_at: Callable[[Site], Make],
    calls: Calls = None,
    after_change: AfterChange = lambda *_: None,
) -> Surgery:
    """Change each site with ``make_at(site)``, then call ``after_change(site, change)``; used by all surgeries."""
    num_modules = 1 if calls in ("any", None) else calls  # per site
    if not isinstance(num_modules, int) or num_modules < 1:
        raise ValueError(f"calls={calls!r} must be a positive int, 'any' or None")
    known = {entry["path"] for entry in recorded_plan(surgery.model)}
    for site in sites:
        check_reachable(site)
        if isinstance(site.module, Inserted) and operation == "insert_after" and site.path not in known:
            raise ValueError(
                f"{site.path!r} has an operator from an earlier surgery on another model, which shares this layer: "
                f"undo() that surgery first, or keep its operator and omit this insertion"
            )
    if not surgery.changes:
        surgery.undos += keep_in_checkpoints(surgery.model)
    changed = {site.path for site in sites}
    twins = [twin for path in changed for twin in twins_of(surgery.model, path) if twin.counterpart not in changed]
    for twin in twins:
        copied, hook = surgery.model.get_submodule(twin.copy), functools.partial(refuse_original, twin)
        surgery.undos.append(copied.register_load_state_dict_post_hook(hook).remove)
        if is_equal_copy(surgery.model, twin):
            surgery.unchanged_copies[twin.counterpart] = twin
    for site in sites:
        make = make_at(site)
        make = functools.partial(make) if isinstance(make, type) else make  # without arguments
        counter = CallCounter(site.path, num_modules, _refuse_sharing)
        built = [_build(site, make, index) for index in range(num_modules)]
        added = PerCall(built, counter) if num_modules > 1 else built[0]
        if num_modules > 1 or (calls is None and list(added.parameters())):  # pick by call, or refuse a second
            surgery.undos.append(wrap(site.caller, "forward", counter.around))
            surgery.undos.append(added.register_forward_pre_hook(counter.check).remove)
        if operation == "replace":
            carry_hooks(site.module, added)
        new = Inserted(site.module, added) if operation == "insert_after" else added
        for inner in set(new.modules()) - set(site.module.modules()):  # a new module may contain the old one
            inner.training = (site.parent if site.function else site.module).training
        surgery.undos += disable_fast_path(site)
        setattr(site.parent, site.name, new)
        entry: dict[str, Any] = {
            "operation": operation,
            "path": site.path,
            "class_path": f"{type(built[0]).__module__}.{type(built[0]).__qualname__}",
            "init_args": arguments_of(make),
            "repr": repr(built[0]) if arguments_of(make) is None else "",  # tells instances with other arguments apart
            "calls": calls,
            "target": [],  # the classes of replaced functions, filled by swap_calls
            "by": surgery.by,
        }
        record_plan(surgery.model, [*recorded_plan(surgery.model), entry])
        change = Change(site.parent, site.name, site.function or site.module, new, added, built, entry, make)
        surgery.changes.append(change)
        after_change(site, change)
    return surgery


def _build(site: Site, make: Make, index: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # On the CPU, so that all devices build the same; torch.manual_seed would also seed every accelerator.
        torch.random.default_generator.manual_seed(zlib.crc32(f"{site.path}#{index}".encode()))
        if isinstance(make, nn.Module):
            module: Any = copy.deepcopy(make)
        elif isinstance(make, functools.partial) and isinstance(make.func, type):
            module = make()
        else:
            module = make(site.module)
    if not isinstance(module, nn.Module) or module is site.module:
        raise TypeError(f"make returned {module!r} for {site.path!r}; it must return a new nn.Module")
    module.register_buffer(MARKER, torch.zeros(1, dtype=torch.uint8))  # marks the state_dict, even without parameters
    for owner in (site.module, *reversed(site.ancestors)):  # use the device and dtype of the closest tensor
        like = next((t for t in (*owner.parameters(), *owner.buffers()) if t.is_floating_point()), None)
        if like is not None:
            module.to(device=like.device, dtype=like.dtype)
            break
    vars(module).pop(_BEFORE, None)  # copied, if ``make`` is a module of an earlier surgery
    return module


def _put_back(model: nn.Module, change: Change) -> None:
    new = change.new
    old = new.layer if isinstance(new, Inserted) else change.old  # the layer itself may have been replaced since
    while isinstance(old, nn.Module) and _BEFORE in vars(old):
        old = vars(old)[_BEFORE]
    # Other surgeries may have moved the module, or removed the parent from the model.
    parents = {change.parent, *model.modules()}
    places = [(parent, name) for parent in parents for name, child in parent._modules.items() if child is new]
    for parent, name in places:
        if not isinstance(old, nn.Module):  # torch does not assign a function to the name of a module
            delattr(parent, name)
        if change.entry["operation"] != "functional":
            setattr(parent, name, old)
    if not places:
        vars(new)[_BEFORE] = old
