"""Swap activations for competitive ones, insert EM operators behind layers, set temperatures."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from em_lightning.activations import ACTIVATIONS
from em_lightning.competition.base import Tempered
from em_lightning.operators import EMRefinement
from em_lightning.surgery.edit import Calls, Make, Shared, Surgery, change_sites
from em_lightning.surgery.functional import swap_relu_calls
from em_lightning.surgery.select import NoMatchError, Site, Where, find_modules, units_of


def swap_activations(
    model: nn.Module,
    activation: Any = "signed",
    target: Where = nn.ReLU,
    where: Where = "*",
    *,
    dim: int | Literal["auto"] = "auto",
    shared: Shared = "separate",
    calls: Calls = None,
    functional: bool = False,
    into: Surgery | None = None,
    **arguments: Any,
) -> Surgery:
    """Replace activations by competitive ones; the function behind ``SwapActivations``.

    A function kept as an attribute, as in ``nn.TransformerEncoderLayer(activation="relu")``, counts as the equivalent
    module. Calls of ``F.relu`` in a forward are replaced only with ``functional=True``.

    Args:
        model: any module.
        activation: a key, class, mapping or instance of ``ACTIVATIONS``, or any module class.
        target: the class or classes to replace.
        where: a second selection by name or predicate, see :func:`find_modules`.
        dim: the axis of the units; "auto" takes 1 behind convolutions and their norms, else the last.
        shared: see :func:`replace_modules`.
        calls: see :func:`replace_modules`.
        into: see :func:`replace_modules`.
        functional: also replace ``relu`` where the forward of a module that ``where`` selects calls it as a function,
            see :func:`swap_relu_calls`. "auto" then takes axis 1 of tensors with as many axes as the feature maps of
            the module's convolutions, else the last.
        **arguments: of the activation, such as ``margin=2.0``.

    Raises:
        NoMatchError: nothing matches; the message lists the modules of the model.
        TypeError: the activation does not take the arguments.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> print(swap_activations(net, "signed", margin=2.0).report)
        path  before  after             parameters
        1     ReLU    SignedActivation  0
    """
    surgery = Surgery(model) if into is None else into
    make = _activation(activation, dim, arguments)

    def make_at(site: Site) -> Make:
        if not isinstance(make, functools.partial) or "dim" in make.keywords or not _takes_dim(make.func):
            return make
        return functools.partial(make, dim=units_of(site)[1])

    try:
        sites = surgery.find(where, target)
    except NoMatchError as error:
        if not functional:
            raise NoMatchError(f"{error}; relu called as a function is swapped with functional=True") from None
        return swap_relu_calls(model, where, make, calls=calls, into=surgery)
    change_sites(surgery, "replace", sites, make_at, calls, shared)
    if functional:
        with contextlib.suppress(NoMatchError):
            swap_relu_calls(model, where, make, calls=calls, into=surgery)
    return surgery


def _activation(spec: Any, dim: int | Literal["auto"], arguments: dict[str, Any]) -> Make:
    """Return the instance itself, or a partial of the class."""
    if isinstance(spec, nn.Module):
        if arguments or dim != "auto":
            raise TypeError(
                f"activation={type(spec).__name__} is an instance, which takes neither dim= nor further arguments"
            )
        return spec
    if not isinstance(spec, (str, type, Mapping)):
        raise TypeError(f"activation={spec!r} must be a key, class, mapping or instance of {', '.join(ACTIVATIONS)}")
    cls: Any
    cls, given = ACTIVATIONS.resolve(spec)
    given = {**arguments, **given}
    if dim != "auto" and _takes_dim(cls):
        given.setdefault("dim", dim)
    return functools.partial(cls, **given)


def _takes_dim(cls: Any) -> bool:
    return "dim" in inspect.signature(cls).parameters


def insert_em_operators(
    model: nn.Module,
    where: Where,
    num_components: int = 8,
    *,
    target: Where | None = None,
    num_features: int | None = None,
    dim: int | Literal["auto"] = "auto",
    shared: Shared = "separate",
    calls: Calls = None,
    into: Surgery | None = None,
    **arguments: Any,
) -> Surgery:
    """Insert a gated :class:`EMRefinement` behind layers; the function behind ``InsertEMOperator``.

    The gates start at 0, so that the outputs of the model do not change until the first training step.

    Args:
        model: any module.
        where: the layers; see :func:`find_modules`.
        target: a second selection, which must match as well.
        num_components: K.
        num_features: D, the width of the layer's output; by default read from the layer.
        dim: the axis of the features; "auto" takes 1 behind convolutions and their norms, else the last.
        shared: see :func:`replace_modules`.
        calls: see :func:`replace_modules`.
        into: see :func:`replace_modules`.
        **arguments: of :class:`EMRefinement`, such as ``num_iters=5``.

    Raises:
        NoMatchError: nothing matches; the message lists the modules of the model.
        ValueError: the width of a layer cannot be read from it.
        TypeError: the operator does not take the arguments.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        >>> print(insert_em_operators(net, "0", num_components=4, residual=False).report)
        path  before  after                   parameters
        0     Linear  Linear -> EMRefinement  1
    """
    surgery = Surgery(model) if into is None else into

    def make_at(site: Site) -> Make:
        width, axis = units_of(site, dim)
        features = width if num_features is None else num_features
        if features is None:
            raise ValueError(f"{site.path!r} is a {type(site.module).__name__} of unknown width: give num_features=")
        given = {"num_components": num_components, "num_features": features, "dim": axis, **arguments}
        return functools.partial(EMRefinement, **given)

    return change_sites(surgery, "insert_after", surgery.find(where, target), make_at, calls, shared)


def set_temperature(model: nn.Module, temperature: float, where: Where = "*") -> dict[str, Tempered]:
    """Set the temperature T > 0 of the selected competitions and activations in a model, and return these by path.

    Raises:
        NoMatchError: no selected module has a temperature; the message lists the modules of the model.

    Example:
        >>> list(set_temperature(nn.Sequential(nn.Linear(2, 2), ACTIVATIONS.build("signed")), 0.5))
        ['1']
    """
    found: dict[str, Tempered] = {}
    for site in find_modules(model, Tempered, where):
        if isinstance(site.module, Tempered):
            site.module.temperature = temperature
            found[site.path] = site.module
    return found
