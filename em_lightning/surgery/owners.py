"""The optimizer that a layer's loss belongs to, and losses whose gradient is limited to its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_lightning.surgery.select import Site


class Owner(NamedTuple):
    """The ids of the parameters of the optimizer that a layer's loss belongs to, and of those of the others."""

    own: set[int]
    others: set[int]


def owners_of(
    sites: Iterable[Site], optimizers: Sequence[torch.optim.Optimizer], index: int | None = None
) -> dict[str, Owner]:
    """Return the owner of each layer: the optimizer of its parameters, or of those of the smallest module around it.

    Args:
        sites: the layers.
        optimizers: of the model.
        index: the optimizer to take for all layers.

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
    """Return a loss of the same value and of the same gradient for these parameters, and of none for others."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    linear = torch.stack([(g * p).sum() for g, p in zip(gradients, parameters, strict=True)]).sum()
    return linear + (loss - linear).detach()
