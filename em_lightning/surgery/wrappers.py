"""Modules that surgery puts at a site, and the guard against operators that are called at several places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from em_lightning.surgery.hooks import first_tensor


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
    """Raises if a module is called twice within one forward of its owner.

    With parameters, one module called at several places would tie layers of different widths and meanings.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.count = 0
        self.counting = False

    def around(self, proceed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wrapper of the owner's forward."""
        self.count, self.counting = 0, True
        output = proceed(*args, **kwargs)
        self.counting = False
        return output

    def check(self, *_: Any) -> None:
        """Forward pre-hook of the module."""
        self.count += 1
        if self.counting and self.count > 1:
            raise RuntimeError(
                f"{self.path!r} is called more than once in one forward, and its replacement has parameters: set "
                f"calls='any' to share it among all calls"
            )
