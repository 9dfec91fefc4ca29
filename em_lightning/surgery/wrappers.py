"""Modules that surgery puts at a site: a layer with an operator behind it, and one operator per call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from em_lightning.surgery.hooks import first_tensor
from em_lightning.surgery.select import Site

# A buffer whose key keeps the checkpoint from loading into a model without the surgery. Errors on unexpected keys print
# it, and so do the warnings of strict=False: it names what loads such a checkpoint.
MARKER = "em_surgery__load_with_RestoreSurgery_or_restore_surgery"


def is_added(module: nn.Module) -> bool:
    """Return whether surgery built a module."""
    return MARKER in dict(module.named_buffers(recurse=False))


def outside_added(sites: list[Site]) -> list[Site]:
    """Return the sites that do not lie inside modules that surgery built, or all if there are no others."""
    return [site for site in sites if not any(map(is_added, site.ancestors))] or sites


def added_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of the modules that surgery built in a model, by name."""
    added = {id(p) for module in filter(is_added, model.modules()) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in added and p.requires_grad}


class Inserted(nn.Module):
    """A layer and the operator behind it: ``operator(layer(...))``, on the first tensor of a tuple or dataclass.

    Other attributes are those of the layer, so that code which reads ``model.encoder.weight`` still works.
    """

    def __init__(self, layer: nn.Module, operator: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.operator = operator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output with the operator applied."""
        output = self.layer(*args, **kwargs)
        try:
            first, put = first_tensor(output)
        except TypeError as error:
            raise TypeError(f"the output of {type(self.layer).__name__} {error}") from None
        return put(self.operator(first))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # not set yet, during unpickling
                raise
            return getattr(self.layer, name)


class CallCounter:
    """Counts the calls of one site within one forward of its owner, and raises if there are too many or too few.

    With parameters, one module called at several places would tie layers of different widths and meanings.
    """

    def __init__(self, path: str, allowed: int) -> None:
        self.path = path
        self.allowed = allowed
        self.count = 0
        self.counting = False

    def around(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrapper of the owner's forward."""
        self.count, self.counting = 0, True
        output = proceed(*args, **kwargs)
        self.counting = False
        if 0 < self.count < self.allowed:
            raise RuntimeError(
                f"{self.path!r} has {self.count} calls, not calls={self.allowed}: set calls={self.count}"
            )
        return output

    def next(self) -> int:
        """Return the index of the operator for this call."""
        if self.counting and self.count >= self.allowed:
            raise RuntimeError(
                f"{self.path!r} is called more than {self.allowed} time(s) in one forward, and its replacement has "
                f"parameters: set calls=N for one operator per call, or calls='any' to share one among all calls"
            )
        self.count += 1
        return (self.count - 1) % self.allowed

    def guard(self, *_: Any) -> None:
        """Forward pre-hook of a site's only operator."""
        self.next()


class CallSites(nn.Module):
    """One operator for each call of a reused module within one forward, in the order of the calls."""

    def __init__(self, operators: Iterable[nn.Module], counter: CallCounter) -> None:
        super().__init__()
        self.operators = nn.ModuleList(operators)
        self.counter = counter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the operator of this call."""
        return self.operators[self.counter.next()](*args, **kwargs)
