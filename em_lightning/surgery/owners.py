"""The optimizer that trains a layer, and target networks and other copies of changed modules."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from em_lightning.surgery.hooks import Undo
from em_lightning.surgery.select import MARKER, Site, is_built


class Owner(NamedTuple):
    """The ids of the parameters of a layer's own optimizer, and those of the other optimizers."""

    own: set[int]
    others: set[int]


def owners_of(
    sites: Iterable[Site], optimizers: Sequence[torch.optim.Optimizer], index: int | None = None
) -> dict[str, Owner]:
    """Return the owner of each layer: the optimizer of its parameters, or of those of the smallest module around it.

    With ``index`` it is this optimizer for all layers.

    Raises:
        ValueError: no optimizer, or more than one, trains the parameters of a layer.
    """
    trained = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
    owners: dict[str, Owner] = {}
    for site in sites:
        found = [] if index is None else [index]
        for module in (site.module, *reversed(site.ancestors)):
            if not found:
                found = [i for i, ids in enumerate(trained) if any(id(p) in ids for p in module.parameters())]
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} optimizers train the parameters of {site.path!r}, or of the smallest module around it "
                f"that has any: give optimizer=, the number of the optimizer that its loss belongs to"
            )
        own = trained[found[0]]
        owners[site.path] = Owner(own, set().union(*trained) - own)
    return owners


def graph_of(loss: Tensor) -> set[Any]:
    """Return all nodes of the autograd graph of a loss."""
    nodes: set[Any] = set()
    ahead = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            ahead.extend(following for following, _ in node.next_functions)
    return nodes


def leaves_of(graph: Iterable[Any]) -> dict[int, Tensor]:
    """Return the parameters among the nodes of a graph, by their ids."""
    leaves = [node.variable for node in graph if hasattr(node, "variable")]
    return {id(leaf): leaf for leaf in leaves}


def only_for(parameters: list[Tensor], loss: Tensor) -> Tensor:
    """Return a loss of the same value, with the same gradient for these parameters and none for others."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    linear = torch.stack([(g * p).sum() for g, p in zip(gradients, parameters, strict=True)]).sum()
    return linear + (loss - linear).detach()


def twins_of(model: nn.Module, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield (owner, twin, rest) for each split of ``path`` into owner.rest; twins have the owner's class and shapes."""
    modules = dict(model.named_modules())
    owner, _, rest = path.rpartition(".")
    while owner:
        first = _form(modules[owner]) if owner in modules else None
        for name, module in modules.items():
            related = f"{name}.".startswith(f"{owner}.") or f"{owner}.".startswith(f"{name}.") or not name
            if first and not related and type(module) is type(modules[owner]) and _form(module) == first:
                yield owner, name, rest
        owner, _, last = owner.rpartition(".")
        rest = f"{last}.{rest}"


def _form(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]


def guard_twins(model: nn.Module, sites: list[Site]) -> list[Undo]:
    """Make copies of modules that will change raise when changed weights are loaded; return the undo functions."""
    changed = {site.path for site in sites}
    return [
        model.get_submodule(twin)
        .register_load_state_dict_post_hook(functools.partial(_refuse, f"{owner}.{rest}", f"{twin}.{rest}", rest))
        .remove
        for path in changed
        for owner, twin, rest in twins_of(model, path)
        if f"{twin}.{rest}" not in changed
    ]


def _refuse(path: str, twin: str, rest: str, module: nn.Module, keys: Any) -> None:
    if any(key.startswith(f"{rest}.") and key.endswith(MARKER) for key in keys.unexpected_keys):
        raise ValueError(
            f"a copy of the module that holds {path!r}, which surgery changed, is loaded with its weights: change "
            f"{twin!r} as well, as in where=[{path!r}, {twin!r}]"
        )


def untrained_parameters(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Return the added parameters that no optimizer trains, except in target networks and other untrained copies."""
    optimized = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    built = {id(p) for module in model.modules() if is_built(module) for p in module.parameters()}

    def is_copy(owner: str) -> bool:
        inside = [p for name, p in parameters.items() if name.startswith(f"{owner}.")]
        return any(id(p) not in built for p in inside) and not any(id(p) in optimized for p in inside)

    return sorted(
        name
        for name, p in parameters.items()
        if id(p) in built - optimized
        and p.requires_grad
        and not any(
            id(parameters[f"{twin}.{rest}"]) in optimized and is_copy(owner)
            for owner, twin, rest in twins_of(model, name)
        )
    )
