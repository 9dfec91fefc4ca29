"""EM by surgery: competitive activations in place of elementwise ones, EM operators behind layers."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from em_lightning.activations import ACTIVATIONS
from em_lightning.operators import EMOperator, EMRefinement
from em_lightning.registry import import_class
from em_lightning.surgery.edit import Calls, Surgery, insert_after, replace_modules
from em_lightning.surgery.find import NoMatchError, Site, Where, find_modules
from em_lightning.surgery.functional import calls_relu, swap_relu_calls
from em_lightning.surgery.units import units_of


def swap_activations(
    model: nn.Module,
    activation: Any = "signed",
    target: Where = nn.ReLU,
    where: Where = "*",
    *,
    dim: int | Literal["auto"] = "auto",
    shared: Literal["separate", "together", "refuse"] = "separate",
    calls: Calls = None,
    functional: bool = False,
    into: Surgery | None = None,
    **arguments: Any,
) -> Surgery:
    """Replace activations by competitive ones: the function behind ``SwapActivations``.

    Functions on attributes, as ``nn.TransformerEncoderLayer(activation="relu")`` keeps one, count as the modules that
    compute the same. Calls of ``F.relu`` in a forward are swapped only if ``functional`` asks for it.

    Args:
        model: any module.
        activation: a key, class, mapping or instance of ``ACTIVATIONS``, or any module class.
        target: what to replace: a class, or several.
        where: and where, by name or predicate; see :func:`em_lightning.surgery.find_modules`.
        dim: the axis of the units; "auto" takes 1 behind convolutions and the norms of their kind, else the last.
        shared: see :func:`em_lightning.surgery.replace_modules`.
        calls: see there.
        functional: also swap ``relu`` where the forward of a module that ``where`` selects calls it as a function; see
            :func:`em_lightning.surgery.functional.swap_relu_calls`. The units are then on ``dim``; "auto" takes axis 1
            of tensors with as many axes as the module's convolutions and their norms put out, else the last.
        into: a surgery to extend; by default a new one.
        **arguments: of the activation, such as ``margin=2.0``.

    Raises:
        NoMatchError: nothing is selected; the message lists what is there.
        TypeError: the activation does not take the arguments.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> print(swap_activations(net, "signed", margin=2.0).report)
        path  before  after             parameters
        1     ReLU    SignedActivation  0
    """
    if isinstance(activation, nn.Module):
        if arguments or dim != "auto":
            raise TypeError(
                f"activation={type(activation).__name__} is built already and takes neither dim= nor further "
                f"arguments; give its key or class instead"
            )
        surgery = Surgery(model) if into is None else into
        swap: Callable[..., Any] = functools.partial(replace_modules, model, where, activation, target=target)
        return _with_functions(
            functools.partial(swap, shared=shared, calls=calls, into=surgery),
            activation,
            functional,
            where,
            calls,
            surgery,
        )
    cls, given = _resolve(activation)
    given = {**arguments, **given}
    _check_arguments(cls, given)

    def make(site: Site) -> functools.partial[nn.Module]:
        if "dim" not in inspect.signature(cls).parameters or "dim" in given:
            return functools.partial(cls, **given)
        return functools.partial(cls, dim=units_of(site)[1] if dim == "auto" else dim, **given)

    surgery = Surgery(model) if into is None else into
    takes_dim = "dim" in inspect.signature(cls).parameters and "dim" not in given and dim != "auto"
    builder = functools.partial(cls, **given, **({"dim": dim} if takes_dim else {}))
    swap = functools.partial(_per_site, replace_modules, model, where, target, make, shared, calls, surgery)
    return _with_functions(swap, builder, functional, where, calls, surgery)


def _with_functions(
    swap: Callable[[], Any], make: Any, functional: bool, where: Where, calls: Calls, surgery: Surgery
) -> Surgery:
    """Swap modules, function calls, or what there is of both."""
    if not functional:
        try:
            swap()
        except NoMatchError as error:
            if calls_relu(surgery.model):
                raise NoMatchError(
                    f"{error}; forwards here call relu as a function, which functional=True swaps"
                ) from None
            raise
        return surgery
    try:
        swap()
    except NoMatchError:
        swap_relu_calls(surgery.model, where, make, calls=calls, into=surgery)
    else:
        with contextlib.suppress(NoMatchError):
            swap_relu_calls(surgery.model, where, make, calls=calls, into=surgery)
    return surgery


def insert_em_operators(
    model: nn.Module,
    where: Where,
    num_components: int = 8,
    *,
    target: Where | None = None,
    num_features: int | None = None,
    dim: int | Literal["auto"] = "auto",
    shared: Literal["separate", "together", "refuse"] = "separate",
    calls: Calls = None,
    into: Surgery | None = None,
    **arguments: Any,
) -> Surgery:
    """Put a gated :class:`EMRefinement` behind layers: the function behind ``InsertEMOperator``.

    The gates start at 0, so the outputs of the model are the same, bit for bit, until the first step.

    Args:
        model: any module.
        where: the layers; see :func:`em_lightning.surgery.find_modules`.
        num_components: K.
        target: a second selection that has to hold as well.
        num_features: the width of the layer's output; read off the layer where it is left out.
        dim: the axis of the features; "auto" takes 1 behind convolutions and the norms of their kind, else the last.
        shared: see :func:`em_lightning.surgery.replace_modules`.
        calls: see there.
        into: a surgery to extend; by default a new one.
        **arguments: of :class:`EMRefinement`, such as ``num_iters=5``.

    Raises:
        NoMatchError: nothing is selected; the message lists what is there.
        ValueError: the width of a layer cannot be read off it.
        TypeError: the operator does not take the arguments.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        >>> print(insert_em_operators(net, "0", num_components=4, residual=False).report)
        path  before  after                   parameters
        0     Linear  Linear -> EMRefinement  1
    """
    _check_arguments(EMRefinement, arguments, EMOperator)
    if not isinstance(num_components, int):
        raise TypeError(f"num_components={num_components!r} is no number of components; give an int such as 8")

    def make(site: Site) -> functools.partial[Any]:
        width, axis = units_of(site)
        features = width if num_features is None else num_features
        if features is None:
            raise ValueError(
                f"{site.path!r} is a {type(site.module).__name__}, which does not tell its width: give num_features="
            )
        axis = axis if dim == "auto" else dim
        return functools.partial(
            EMRefinement, num_components=num_components, num_features=features, dim=axis, **arguments
        )

    return _per_site(insert_after, model, where, target, make, shared, calls, into)


def _per_site(
    operate: Callable[..., Surgery],
    model: nn.Module,
    where: Where,
    target: Where | None,
    make: Callable[[Site], functools.partial[Any]],
    shared: str,
    calls: Calls,
    into: Surgery | None,
) -> Surgery:
    surgery = Surgery(model) if into is None else into
    closed = [change.new for change in surgery.changes]
    sites = [site for site in find_modules(model, where, target, closed=closed) if site.module not in closed]
    makers = {site.path: make(site) for site in sites}  # all of them before the first is used: some may raise
    groups: dict[str, list[str]] = {}
    for path, maker in makers.items():
        groups.setdefault(repr((maker.func, sorted(maker.keywords.items(), key=str))), []).append(path)
    for paths in groups.values():
        operate(model, paths, makers[paths[0]], shared=shared, calls=calls, into=surgery)
    return surgery


def _check_arguments(cls: type, given: Mapping[str, Any], *behind: type) -> None:
    """Raise TypeError for arguments that neither a class nor those behind it take."""
    parameters = [parameter for one in (cls, *behind) for parameter in inspect.signature(one).parameters.values()]
    if not behind and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(dict.fromkeys(known)) or 'none'}"
            raise TypeError(f"{cls.__name__} takes no argument {name!r}{hint}")


def _resolve(spec: Any) -> tuple[type[nn.Module], dict[str, Any]]:
    if isinstance(spec, str):
        return ACTIVATIONS[spec], {}
    if isinstance(spec, type):
        return spec, {}
    if isinstance(spec, Mapping) and "class_path" in spec:
        return import_class(spec["class_path"], nn.Module), dict(spec.get("init_args") or {})
    if isinstance(spec, Mapping) and "name" in spec:
        return ACTIVATIONS[spec["name"]], {key: value for key, value in spec.items() if key != "name"}
    raise TypeError(
        f"activation={spec!r} stands for no activation: give a key ({', '.join(ACTIVATIONS)}), a class, "
        f"a mapping with 'name', or a module"
    )
