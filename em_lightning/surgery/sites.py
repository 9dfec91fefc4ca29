"""What stands at an operated site: the inserted operator, and the count of calls in one forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MARKER = "em_surgery"  # the buffer by which a checkpoint of an operated model refuses to load into a plain one


def mark(module: nn.Module) -> None:
    """Give a module one persistent byte, so that its state never fits a model without it."""
    if MARKER not in module._buffers:
        module.register_buffer(MARKER, torch.zeros(1, dtype=torch.uint8))


class Inserted(nn.Module):
    """A layer and the operator behind it: ``operator(layer(...))``, on the first element where that is a tuple.

    Attributes that it lacks are those of the layer, so that code which reads ``model.encoder.weight`` goes on working.
    """

    def __init__(self, layer: nn.Module, operator: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.operator = operator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns, with the operator applied."""
        output = self.layer(*args, **kwargs)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (self.operator(output[0]), *output[1:])
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(self.layer).__name__} returns {type(output).__name__}, and an operator can stand only behind a "
                f"tensor or a tuple that begins with one; insert it after a layer inside"
            )
        return self.operator(output)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # not there yet, while being unpickled
                raise
            return getattr(self.layer, name)


class Visits:
    """Counts the calls of one site within one forward of its owner, and refuses one too many.

    One module called at several places is harmless while it has no parameters; with parameters, a reused ``self.relu``
    would tie layers of other widths and meanings.
    """

    def __init__(self, path: str, allowed: int) -> None:
        self.path = path
        self.allowed = allowed
        self.count = 0
        self.open = False

    def begin(self, *_: Any) -> None:
        """Forward pre-hook of the owner."""
        self.count = 0
        self.open = True

    def end(self, *_: Any) -> None:
        """Forward hook of the owner."""
        self.open = False
        if 0 < self.count < self.allowed:
            raise RuntimeError(
                f"{self.path!r} was called {self.count} times in one forward, but calls={self.allowed} made as many "
                f"operators; set calls={self.count}"
            )

    def around(self, proceed: Any, *args: Any, **kwargs: Any) -> Any:
        """Count within one call of a wrapped method, for an owner on which no hook may stand."""
        self.begin()
        output = proceed(*args, **kwargs)
        self.end()
        return output

    def next(self) -> int:
        """Return the number of this call."""
        if self.open and self.count >= self.allowed:
            raise RuntimeError(
                f"{self.path!r} is called more than {self.allowed} time(s) in one forward, and its replacement has "
                f"parameters: set calls=N for one operator per call, or calls='any' to share one among all of them"
            )
        self.count += 1
        return (self.count - 1) % self.allowed

    def guard(self, *_: Any) -> None:
        """Forward pre-hook of the operator."""
        self.next()


class CallSites(nn.Module):
    """One operator for each call of a reused module within one forward, in the order of the calls."""

    def __init__(self, operators: Iterable[nn.Module], visits: Visits) -> None:
        super().__init__()
        self.operators = nn.ModuleList(operators)
        self.visits = visits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the operator whose turn it is."""
        return self.operators[self.visits.next()](*args, **kwargs)
