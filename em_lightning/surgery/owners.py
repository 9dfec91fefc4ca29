"""The optimizer that trains a layer, and target networks and other copies of changed modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from em_lightning.surgery.select import MARKER, Site, is_built


class Owner(NamedTuple):
    """The ids of the parameters of a layer's own optimizer, and those of the other optimizers."""

    own: set[int]
    others: set[int]


def owners_of(
    sites: Iterable[Site], optimizers: Sequence[torch.optim.Optimizer], index: int | None = None
) -> dict[str, Owner]:
    """Return the owner of each layer: the optimizer of its parameters, or number ``index`` if given.

    The owner of a layer without trained parameters is the optimizer of the innermost parent module that has some.
    ValueError if no optimizer, or more than one, trains the parameters of a layer, or there is no number ``index``.
    """
    if index is not None and not 0 <= index < len(optimizers):
        raise ValueError(f"optimizer={index} must be one of the numbers 0 to {len(optimizers) - 1} of the optimizers")
    trained = [parameters_of([optimizer]) for optimizer in optimizers]
    owners: dict[str, Owner] = {}
    for site in sites:
        indices = [] if index is None else [index]
        for module in (site.module, *reversed(site.ancestors)):
            if not indices:
                indices = [i for i, ids in enumerate(trained) if any(id(p) in ids for p in module.parameters())]
        if len(indices) != 1:
            raise ValueError(
                f"{len(indices)} optimizers train the parameters of {site.path!r}, or of its innermost parent that "
                f"has any: give optimizer=, the index of the optimizer that is to train the layer"
            )
        own = trained[indices[0]]
        owners[site.path] = Owner(own, set().union(*trained) - own)
    return owners


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    """Return the ids of all parameters of these optimizers."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


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


def leaves_of(loss: Tensor) -> dict[int, Tensor]:
    """Return the parameters in the autograd graph of a loss, by their ids."""
    return {id(node.variable): node.variable for node in graph_of(loss) if hasattr(node, "variable")}


def only_for(ids: set[int], loss: Tensor) -> Tensor:
    """Return a loss of the same value, with the same gradient for the parameters of these ids and none for others."""
    parameters = [leaf for key, leaf in leaves_of(loss).items() if key in ids]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    linear = torch.stack([(g * p).sum() for g, p in zip(gradients, parameters, strict=True)]).sum()
    return linear + (loss - linear).detach()  # the value of the loss, the gradient of the linear function


class Twin(NamedTuple):
    """A module of the same class and parameter shapes as one that holds a layer, so possibly a copy of it."""

    original: str  # path of the module that holds the layer
    copy: str  # path of the other module
    layer: str  # path of the layer
    counterpart: str  # path of the same layer in the copy


def twins_of(model: nn.Module, path: str) -> Iterator[Twin]:
    """Yield the twins of each module around the layer at ``path``, those of the innermost module first."""
    modules = dict(model.named_modules())
    original = path
    while original := original.rpartition(".")[0]:
        shapes = _shapes(modules[original]) if original in modules else []
        for name, module in modules.items() if shapes else ():
            apart = name and not f"{name}.".startswith(f"{original}.") and not f"{original}.".startswith(f"{name}.")
            if apart and type(module) is type(modules[original]) and _shapes(module) == shapes:
                yield Twin(original, copy=name, layer=path, counterpart=name + path.removeprefix(original))


def _shapes(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, None if is_lazy(p) else tuple(p.shape)) for name, p in module.named_parameters()]


def refuse_original(twin: Twin, module: nn.Module, keys: Any) -> None:
    """Hook of a twin's ``load_state_dict``: raise ValueError if the weights are those of its changed original."""
    beginning = twin.layer.removeprefix(f"{twin.original}.") + "."
    if any(key.startswith(beginning) and key.endswith(MARKER) for key in keys.unexpected_keys):
        raise ValueError(
            f"weights of {twin.original!r}, in which surgery changed {twin.layer!r}, are loaded into {twin.copy!r}: "
            f"change {twin.counterpart!r} as well, as in where=[{twin.layer!r}, {twin.counterpart!r}]"
        )


def is_equal_copy(model: nn.Module, twin: Twin) -> bool:
    """Return whether a twin has the values of its original, as a target network has when it is made."""
    pairs = zip(*(model.get_submodule(path).parameters() for path in (twin.original, twin.copy)), strict=True)
    return all(not is_lazy(one) and torch.equal(one, other) for one, other in pairs)


def untrained_parameters(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Return the added parameters that no optimizer trains, except in target networks and other untrained copies."""
    trained = parameters_of(optimizers)
    parameters = dict(model.named_parameters())
    built = {id(p) for module in model.modules() if is_built(module) for p in module.parameters()}  # by surgery

    def is_untrained_copy(path: str) -> bool:
        inside = [id(p) for name, p in parameters.items() if name.startswith(f"{path}.")]
        # A copy of a part of the model has parameters that surgery did not add; a module without any was itself added.
        return any(key not in built for key in inside) and not any(key in trained for key in inside)

    untrained = []
    for name, parameter in parameters.items():
        if parameter.requires_grad and id(parameter) in built - trained:
            twins = twins_of(model, name)
            if not any(id(parameters[t.counterpart]) in trained and is_untrained_copy(t.original) for t in twins):
                untrained.append(name)
    return sorted(untrained)
