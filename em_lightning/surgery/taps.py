"""Forward hooks that capture the outputs or inputs of layers, with the axis of their units."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.checks import check_choice
from em_lightning.surgery.axes import Observation, announce, unit_axis
from em_lightning.surgery.edit import CallCounter
from em_lightning.surgery.hooks import Undo, disable_fast_path, first_tensor, undo_all, wrap
from em_lightning.surgery.select import NoMatchError, Site, Where, check_reachable, described, find_modules, walk

TAPS = ("output", "input")


class _Hook:
    """A hook of this model only: in a copy of the model, or in one that was pickled, it does nothing."""

    def __init__(self, function: Callable[..., Any] = lambda *_: None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class Taps:
    """Captures the outputs or the inputs of the layers that :func:`find_modules` selects, while ``recording`` is true.

    The axis of the units is decided at the first capture, see :func:`unit_axis`, and printed with ``verbose``. With
    ``detach`` the forward continues with a detached tensor. With ``skip``, a value that cannot be captured
    raises no error; ``skip(path, error)`` is called instead. An activation that serves several places of a model is one
    layer, and its tensors are those of all places; a warning says so.

    Attributes:
        axes: the axis of the units of each layer.
        seen: the layers of which a tensor was captured.
        frozen: the layers whose tensor required no gradient while gradients were enabled, since the last :meth:`clear`.

    Raises:
        NoMatchError: nothing matches, or only functions, which have no hooks.
        ValueError: ``tap`` is neither "output" nor "input", or a hook on a layer would never fire.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> taps = Taps(net, "0", verbose=False)
        >>> y = net(torch.ones(4, 2))
        >>> {path: [tuple(tensor.shape) for tensor in tensors] for path, tensors in taps.take().items()}
        {'0': [(4, 3)]}
        >>> taps.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        where: Where,
        tap: Literal["output", "input"] = "output",
        dim: int | Literal["auto"] = "auto",
        detach: bool = False,
        verbose: bool = True,
        skip: Callable[[str, Exception], None] | None = None,
    ) -> None:
        check_choice("tap", tap, TAPS)
        self.tap = tap
        self.detach = detach
        self.verbose = verbose
        self.skip = skip
        self.recording = True
        self.frozen: set[str] = set()
        self.captured: list[tuple[str, Tensor, int]] = []  # path, tensor and its _version()
        self._undos: list[Undo] = []
        self.sites: list[Site] = []
        for site in find_modules(model, where):
            check_reachable(site)
            if site.function is None and all(site.module is not earlier.module for earlier in self.sites):
                self.sites.append(site)
        if not self.sites:
            raise NoMatchError(f"where={described(where)} matches only functions, which have no hooks")
        self.axes = {site.path: unit_axis(site, dim, tap) for site in self.sites}
        self.seen: set[str] = set()
        all_sites = list(walk(model))
        for site in self.sites:
            self._undos += [*disable_fast_path(site), *_warn_if_shared(all_sites, site)]
            self._undos.append(self._register(site.module, site.path))

    @contextlib.contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Record, or do not record, inside the context."""
        before, self.recording = self.recording, on
        try:
            yield
        finally:
            self.recording = before

    def remove(self) -> None:
        """Remove the hooks and the captured tensors."""
        undo_all(self._undos)
        self.clear()

    def clear(self) -> None:
        """Discard the captured tensors and the list of frozen layers."""
        self.captured, self.frozen = [], set()

    def _register(self, module: nn.Module, path: str) -> Undo:
        if self.tap == "output":
            return module.register_forward_hook(_Hook(lambda _, inputs, output: self._capture(path, output))).remove

        def capture_input(_: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            passed = self._capture(path, (*inputs, *kwargs.values()))
            return passed[: len(inputs)], dict(zip(kwargs, passed[len(inputs) :], strict=True))

        return module.register_forward_pre_hook(_Hook(capture_input), with_kwargs=True).remove

    def _capture(self, path: str, value: Any) -> Any:
        """Keep the first tensor of a value; return the value, with ``detach`` with a detached tensor in its place."""
        if not (self.recording and Observation.enabled):  # off during an audit
            return value
        try:
            tensor, put = first_tensor(value, f"the {self.tap} of {path!r}")
            dim = self.axes[path](tensor.shape)
        except (TypeError, ValueError) as error:
            if self.skip is None:
                raise
            self.skip(path, error)
            return value
        if path not in self.seen:
            announce(path, self.tap, tensor.shape, dim, self.verbose)
        self.seen.add(path)
        if torch.is_grad_enabled() and not tensor.requires_grad:
            self.frozen.add(path)
        self.captured.append((path, tensor, _version(tensor)))
        return put(tensor.detach()) if self.detach else value

    def take(self, wanted: Callable[[Tensor], bool] = lambda _: True) -> dict[str, list[Tensor]]:
        """Remove and return the wanted tensors by path; raise RuntimeError if one was overwritten in place."""
        taken: dict[str, list[Tensor]] = {}
        captured, self.captured = self.captured, []
        for path, tensor, version in captured:
            if not wanted(tensor):
                self.captured.append((path, tensor, version))
                continue
            if _version(tensor) != version:
                raise RuntimeError(
                    f"the {self.tap} of {path!r} was overwritten in place after it was captured, as "
                    f"nn.ReLU(inplace=True) does: set inplace=False in the next layer, or tap its output"
                )
            taken.setdefault(path, []).append(tensor)
        return taken


def _warn_if_shared(all_sites: list[Site], site: Site) -> list[Undo]:
    """Warn of an instance without parameters that serves several places; return the undo functions of the hooks.

    Such an instance has several paths, or the module that holds it calls it several times in one forward.
    """
    if list(site.module.parameters()):
        return []  # the same weights are the same layer

    def warn_once(path: str, why: str) -> None:
        counter.on_excess = _Hook()  # does nothing
        warnings.warn(
            f"{path!r} {why}, and its tap joins all places where it is called: give each place an activation of its "
            f"own, or tap the layers before it",
            stacklevel=3,
        )

    counter = CallCounter(site.path, allowed=1, on_excess=_Hook(warn_once))
    paths = [other.path for other in all_sites if other.module is site.module]
    if len(paths) > 1:
        warn_once(site.path, f"has the names {', '.join(paths)}")
        return []
    return [wrap(site.caller, "forward", counter.around), site.module.register_forward_pre_hook(counter.check).remove]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # torch's only record of in-place changes
