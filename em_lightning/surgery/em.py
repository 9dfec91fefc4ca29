"""Replace activations by those of the library, insert EM operators behind layers, set temperatures."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from em_lightning.activations import ACTIVATIONS
from em_lightning.competition.base import Tempered
from em_lightning.surgery.axes import FirstCall, print_line, unit_axis
from em_lightning.surgery.edit import Calls, Change, Make, Surgery, change_sites
from em_lightning.surgery.functional import CALLS_CHILD, swap_calls
from em_lightning.surgery.refinement import SetRefinement, batch_dim_of, observe_forwards
from em_lightning.surgery.select import NoMatchError, Site, Where, find_modules, matches, shortened, walk


def swap_activations(
    model: nn.Module,
    activation: Any = "signed",
    target: Where = nn.ReLU,
    where: Where = "*",
    *,
    dim: int | Literal["auto"] = "auto",
    calls: Calls = None,
    functional: bool = False,
    verbose: bool = True,
    into: Surgery | None = None,
    **arguments: Any,
) -> Surgery:
    """Replace activations by those of the library, such as competitive ones; the function behind ``SwapActivations``.

    A function kept as an attribute, as in ``nn.TransformerEncoderLayer(activation="relu")``, counts as the equivalent
    module. Calls such as ``F.relu(x)`` are replaced only with ``functional=True``.

    Args:
        model: any module.
        activation: a key, class, mapping or instance of ``ACTIVATIONS``, or any module or module class.
        target: the class or classes to replace.
        where: a second selection by name or predicate, see :func:`find_modules`.
        dim: the axis of the units, or "auto", see :class:`UnitAxis`.
        calls: see :func:`replace_modules`.
        functional: also replace calls of the target's function, such as ``F.relu(x)`` for ``nn.ReLU``, in the methods
            of modules that ``where`` selects, see :func:`swap_calls`.
        verbose: whether to print a line per activation at the first batch: path, shape, axis of units, units, items.
        into: a surgery to extend; by default a new one.
        **arguments: arguments of the activation, such as ``margin=2.0``.

    Raises:
        NoMatchError: nothing matches; the message lists the modules of the model.
        TypeError: the activation does not take the arguments.
        ValueError: at the first batch, if the axis of the units cannot be decided.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> print(swap_activations(net, "signed", margin=2.0).report)
        path  before  after             parameters
        1     ReLU    SignedActivation  0
    """
    surgery = Surgery(model) if into is None else into
    make = _activation_maker(activation, dim, arguments)
    after_change = functools.partial(watch_first_call, surgery, verbose=verbose)
    try:
        sites = surgery.find(where, target)
    except NoMatchError as error:
        if not functional:
            raise NoMatchError(f"{error}; calls of functions such as relu are swapped with functional=True") from None
        sites = []
    if sites:
        change_sites(surgery, "replace", sites, lambda _: make, calls, after_change)
    if functional:
        try:
            swap_calls(surgery, where, make, target, calls, after_change)
        except NoMatchError as error:
            if not sites:
                raise
            warnings.warn(f"functional=True has no effect: {error}", stacklevel=2)
        if verbose:
            _print_found(surgery, where)
    return surgery.warn_of_copies() if into is None else surgery  # callbacks warn later, when optimizers are known


def _print_found(surgery: Surgery, where: Where) -> None:
    """Print the paths of the changes, and the outermost selected modules of users' classes that contain no change."""
    changed = [change.path for change in surgery.changes]
    # "encoder." if "encoder" has the child CALLS_CHILD: all calls in its methods are replaced, also by modules inside.
    covered_prefixes = [path.removesuffix(CALLS_CHILD) for path in changed if path.endswith(CALLS_CHILD)]
    unchanged_prefixes: list[str] = []
    for site in walk(surgery.model):
        prefix = f"{site.path}."
        is_users = not type(site.module).__module__.startswith("torch.") and list(site.module.parameters())
        if is_users and matches(site, where) and not prefix.startswith((*covered_prefixes, *unchanged_prefixes)):
            if not any(f"{path}.".startswith(prefix) for path in changed):
                unchanged_prefixes.append(prefix)
    nothing = f", and finds nothing in {shortened([p[:-1] for p in unchanged_prefixes])}" if unchanged_prefixes else ""
    print_line(f"functional=True changes {shortened(changed)}{nothing}")


def _activation_maker(spec: Any, dim: int | Literal["auto"], arguments: dict[str, Any]) -> Make:
    """Return the given instance, or a partial of the class that was given, for :func:`change_sites`."""
    if isinstance(spec, nn.Module):
        if arguments or dim != "auto":
            name = type(spec).__name__
            raise TypeError(f"activation={name} is an instance, which takes neither dim= nor further arguments")
        return spec
    if not isinstance(spec, (str, type, Mapping)):
        raise TypeError(f"activation={spec!r} must be a key, class, mapping or instance of {', '.join(ACTIVATIONS)}")
    cls: Any
    cls, in_spec = ACTIVATIONS.resolve(spec)
    arguments = {**arguments, **in_spec}
    if dim != "auto" and "dim" in inspect.signature(cls).parameters:
        arguments.setdefault("dim", dim)
    return functools.partial(cls, **arguments)


def insert_em_operators(
    model: nn.Module,
    where: Where,
    num_components: int = 8,
    *,
    num_features: int | None = None,
    dim: int | Literal["auto"] = "auto",
    set_dim: int | Literal["auto"] = "auto",
    causal: bool = False,
    calls: Calls = None,
    verbose: bool = True,
    into: Surgery | None = None,
    **arguments: Any,
) -> Surgery:
    """Insert a gated :class:`SetRefinement` behind layers; the function behind ``InsertEMOperator``.

    The gates start at 0, so that the outputs of the model do not change until the first training step. Each set of the
    batch has its own mixture, and padding takes no part in it. With ``causal=False``, a warning at the first batch says
    if recurrent layers of one direction, causal convolutions or sums over earlier positions are around the layer.

    Args:
        model: any module.
        where: the layers; see :func:`find_modules`.
        num_components: K.
        num_features: D, the width of the layer's output; by default read from the layers, and corrected at the first
            batch if no parameter of the operator depends on it.
        dim: the axis of the features, or "auto", see :class:`UnitAxis`.
        set_dim: the axis of the items; "auto" takes all axes but those of the batch and the features. Outputs (B, D)
            then have one item per set; ``set_dim=0`` fits one mixture to the rows of the batch.
        causal: whether an item depends only on itself and the items before it.
        calls: see :func:`replace_modules`.
        verbose: whether to print a line per layer at the first batch: path, shape, features and axis, sets, items.
        into: a surgery to extend; by default a new one.
        **arguments: arguments of :class:`~em_lightning.operators.EMRefinement`, such as ``num_iters=5``.

    Raises:
        NoMatchError: nothing matches; the message lists the modules of the model.
        ValueError: at the first batch, an axis cannot be decided, the width differs from that of the parameters, or
            ``causal=False`` would mix positions with later ones, which the attention of the model masks.
        TypeError: the operator does not take the arguments.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        >>> print(insert_em_operators(net, "0", num_components=4).report)
        path  before  after                    parameters
        0     Linear  Linear -> SetRefinement  1
    """
    surgery = Surgery(model) if into is None else into
    given = {"num_components": num_components, "set_dim": set_dim, "causal": causal, **arguments}
    if dim != "auto":
        given["dim"] = dim

    def make_at(site: Site) -> Make:
        width = next(iter(unit_axis(site).widths), 1)  # 1 if no layer has one, until the first batch corrects it
        features = width if num_features is None else num_features
        return functools.partial(SetRefinement, num_features=features, batch_dim=batch_dim_of(site), **given)

    def after_change(site: Site, change: Change) -> None:
        for module in change.modules:
            module.width_is_given = num_features is not None
        watch_first_call(surgery, site, change, verbose)

    change_sites(surgery, "insert_after", surgery.find(where), make_at, calls, after_change)
    return surgery.warn_of_copies() if into is None else surgery


def watch_first_call(surgery: Surgery, site: Site, change: Change, verbose: bool = False) -> None:
    """Register hooks that decide and print the unit axis of the modules of a change at their first call."""
    make = change.make
    # A class without the argument dim leaves the axis open. Otherwise it is that of the module, such as of a copy.
    is_open = isinstance(make, functools.partial) and "dim" not in make.keywords
    for module in change.modules:
        axis = None  # stays so if the units do not compete
        if "dim" in inspect.signature(type(module)).parameters and getattr(module, "competes", True):
            axis = unit_axis(site, "auto" if is_open else module.dim)
            if isinstance(module, SetRefinement):
                others = () if module.width_is_given else axis.widths
                axis.widths = (module.operator.num_features, *others)  # candidates; first the one it was built for
                surgery.undos += observe_forwards(site, change.new, module)
            if axis.dim != "auto":
                module.dim = axis.dim
            change.entry.setdefault("axes", []).append(axis.decided)  # recorded; filled at the first call
        surgery.first_calls.append(FirstCall(site.path, axis, verbose))
        surgery.undos.append(module.register_forward_pre_hook(surgery.first_calls[-1]).remove)


def set_temperature(model: nn.Module, temperature: float, where: Where = "*") -> dict[str, Tempered]:
    """Set the temperature T > 0 of the selected competitions and activations in a model, and return these by path.

    Raises:
        NoMatchError: no selected module has a temperature; the message lists the modules of the model.

    Example:
        >>> list(set_temperature(nn.Sequential(nn.Linear(2, 2), ACTIVATIONS.build("signed")), 0.5))
        ['1']
    """
    try:
        sites = find_modules(model, Tempered, where, inserted=True)
    except NoMatchError as error:
        raise NoMatchError(
            f"no selected module has a temperature: swap first, with SwapActivations before TemperatureSchedule in the "
            f"callbacks, or with swap_activations ({error})"
        ) from None
    found: dict[str, Any] = {site.path: site.module for site in sites}
    for module in found.values():
        module.temperature = temperature
    return found
