"""What flows through chosen layers, captured by hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from em_lightning.surgery.edit import check_operable
from em_lightning.surgery.find import NoMatchError, Site, Where, contents, find_modules


class Taps:
    """Captures the outputs or the inputs of layers while ``recording``.

    Args:
        model: any module.
        where: the layers, see :func:`find_modules`.
        tap: "output", or "input" for what goes into the layer.
        target: a second selection that has to hold as well.

    Raises:
        NoMatchError: nothing is selected, or nothing but functions, which carry no hooks.
        ValueError: ``tap`` is neither, or a layer can carry no working hook.
    """

    def __init__(
        self, model: nn.Module, where: Where, tap: Literal["output", "input"] = "output", target: Where | None = None
    ) -> None:
        if tap not in ("output", "input"):
            raise ValueError(f"tap={tap!r} is unknown: use 'output' or 'input'")
        self.tap = tap
        self.recording = True
        self.captured: dict[str, list[tuple[Tensor, int]]] = {}
        self._handles: list[RemovableHandle] = []
        self.sites: list[Site] = []
        for site in find_modules(model, where, target):
            if site.function is None and not any(site.module is known.module for known in self.sites):
                check_operable(site)
                self.sites.append(site)
        if not self.sites:
            raise NoMatchError(f"where={where!r} matches only functions, which cannot be tapped; {contents(model)}")

    def attach(self) -> Taps:
        """Put the hooks on; those of an earlier call are taken off first."""
        self.remove()
        for site in self.sites:
            if self.tap == "output":
                handle = site.module.register_forward_hook(
                    lambda _module, _inputs, output, path=site.path: self._capture(path, output)
                )
            else:
                handle = site.module.register_forward_pre_hook(
                    lambda _module, inputs, kwargs, path=site.path: self._capture(
                        path, inputs or tuple(kwargs.values())
                    ),
                    with_kwargs=True,
                )
            self._handles.append(handle)
        return self

    def remove(self) -> None:
        """Take the hooks off and forget what they captured."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.captured = {}

    def _capture(self, path: str, value: Any) -> None:
        if not self.recording:
            return
        while isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the {self.tap} of {path!r} is {type(value).__name__}, not a tensor or a tuple that begins with one: "
                f"tap a layer inside"
            )
        self.captured.setdefault(path, []).append((value, _version(value)))

    def take(self, wanted: Callable[[Tensor], bool] = lambda _: True) -> dict[str, list[Tensor]]:
        """Return what was captured and is wanted, by path, and forget it.

        Raises:
            RuntimeError: a tensor was overwritten in place after it was captured.
        """
        taken: dict[str, list[tuple[Tensor, int]]] = {}
        left: dict[str, list[tuple[Tensor, int]]] = {}
        for path, pairs in self.captured.items():
            for pair in pairs:
                (taken if wanted(pair[0]) else left).setdefault(path, []).append(pair)
        self.captured = left
        for path, pairs in taken.items():
            if any(_version(tensor) != version for tensor, version in pairs):
                raise RuntimeError(
                    f"the {self.tap} of {path!r} was overwritten in place after it was captured, as "
                    f"nn.ReLU(inplace=True) does: set inplace=False in the layer that follows, or tap its output"
                )
        return {path: [tensor for tensor, _ in pairs] for path, pairs in taken.items()}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors keep no count
