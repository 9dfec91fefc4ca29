"""Target networks and other copies in a model, which exchange weights with the modules that surgery changes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from em_lightning.surgery.hooks import Undo
from em_lightning.surgery.select import Site
from em_lightning.surgery.wrappers import MARKER


def twins_of(model: nn.Module, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield (owner, twin, rest) for every module above ``path`` and other module of its class and shapes.

    ``rest`` is the remainder of the path below the owner, and below its twin.
    """
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
    """Let copies of the modules that are about to change refuse the changed weights, and return the undo functions."""
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


def trained_in_a_twin(model: nn.Module, name: str, added: Collection[str], optimized: set[int]) -> bool:
    """Return whether an added parameter lies in an untrained copy, such as a target network, of a trained module."""
    parameters = dict(model.named_parameters())

    def is_copy(owner: str) -> bool:
        inside = [key for key in parameters if key.startswith(f"{owner}.")]
        return any(key not in added for key in inside) and not any(id(parameters[key]) in optimized for key in inside)

    return any(
        id(parameters[f"{twin}.{rest}"]) in optimized and is_copy(owner) for owner, twin, rest in twins_of(model, name)
    )
