"""The axis of a layer's units, from its type or from the shape at the first batch, and the line printed then."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import rich
import torch
from torch import Tensor, nn

from em_lightning.surgery.select import Site
from em_lightning.surgery.wrappers import Inserted

# Layers with units on axis 1, and layers with units on the last axis.
_MAPS = tuple(
    getattr(nn, f"{kind}{d}d") for d in (1, 2, 3) for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm")
)
_CHANNELS_FIRST = (*_MAPS, nn.SyncBatchNorm, nn.GroupNorm)
_LAST = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Transformer),
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
)


class UnitAxis:
    """The axis of the units of one layer, decided from the first shape unless the layer's type defines it.

    Args:
        path: the layer's name.
        widths: possible numbers of units, the most likely first.
        dim: the axis if it is known, else "auto".
    """

    def __init__(self, path: str, widths: Sequence[int], dim: int | Literal["auto"] = "auto") -> None:
        self.path = path
        self.widths = tuple(dict.fromkeys(widths))
        self.dim = dim

    def __call__(self, shape: Sequence[int]) -> int:
        """Return the axis for tensors of this shape; the first decision is final.

        Raises:
            ValueError: neither or both of axes 1 and -1 have the layer's number of units, or ``dim`` is out of range.
        """
        if self.dim == "auto":
            self.dim = -1 if len(shape) < 3 else self._decide(shape)
        if not -len(shape) <= self.dim < len(shape):
            raise ValueError(f"dim={self.dim} must be an axis of {self.path!r}, of shape {tuple(shape)}")
        return self.dim

    def _decide(self, shape: Sequence[int]) -> int:
        for width in self.widths:
            fitting = [axis for axis in (1, -1) if shape[axis] == width]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                raise ValueError(
                    f"dim='auto' is ambiguous at {self.path!r}: axes 1 and -1 of its shape {tuple(shape)} both have "
                    f"{width} units; give dim=1 or dim=-1"
                )
        widths = " or ".join(map(str, self.widths)) or "an unknown number of"
        raise ValueError(
            f"dim='auto' fails at {self.path!r}: neither axis 1 nor -1 of its shape {tuple(shape)} has {widths} units, "
            f"as the layers in or before it have; give dim="
        )


def unit_axis(site: Site, dim: int | Literal["auto"] = "auto", tap: Literal["output", "input"] = "output") -> UnitAxis:
    """Return the axis of the units of a site's output or input."""
    if dim == "auto":
        dim = _axis_by_type(site)
    return UnitAxis(site.path, widths_of(site, tap), dim)


def num_units(module: nn.Module, tap: Literal["output", "input"] = "output") -> int | None:
    """Return the width of a layer's output or input, or None if its type does not define one."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.RNNBase):
        width = module.proj_size or module.hidden_size
        return module.input_size if tap == "input" else width * (1 + module.bidirectional)
    first = ("in_features", "in_channels", "input_size") if tap == "input" else ("out_features", "out_channels")
    for name in (*first, "num_features", "num_channels", "embedding_dim", "embed_dim", "hidden_size"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def widths_of(site: Site, tap: Literal["output", "input"] = "output") -> list[int]:
    """Return the widths of the site's own layer, else of those in it, before it or behind it, the likeliest first."""
    own = num_units(site.module, tap)  # an Inserted has the attributes of its layer
    if own is not None:
        return [own]
    order = 1 if tap == "input" else -1
    widths = widths_in([site.module], tap)[::order]
    for owner, name in zip(reversed(site.ancestors), reversed(site.path.split(".")), strict=True):
        if widths:
            break
        children = dict(owner._modules)  # by name, as an instance may have several
        position = list(children).index(name) if name in children else len(children)
        before, behind = list(children.values())[:position], list(children.values())[position + 1 :]
        widths = widths_in(before, "output")[::-1] or widths_in(behind, "input")
    return widths


def widths_in(modules: Sequence[nn.Module | None], tap: Literal["output", "input"] = "output") -> list[int]:
    """Return the widths of the layers in some modules."""
    inner = [inner for module in modules if module is not None for inner in _layers(module)]
    return [width for module in inner if (width := num_units(module, tap)) is not None]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and those in it, without the operators that were inserted."""
    if isinstance(module, Inserted):
        yield from _layers(module.layer)
        return
    yield module
    for child in module.children():
        yield from _layers(child)


def _axis_by_type(site: Site) -> int | Literal["auto"]:
    """Return the axis that the layer's type defines, or the type of the layer before an activation in a Sequential."""
    modules = [site.module]
    if isinstance(site.parent, nn.Sequential) and _keeps_axes(site.module):
        names = list(site.parent._modules)
        for name in reversed(names[: names.index(site.name)]):
            modules.append(site.parent._modules[name])
            if not _keeps_axes(modules[-1]):
                break
    last = modules[-1]
    while isinstance(last, Inserted):
        last = last.layer
    if isinstance(last, _CHANNELS_FIRST):
        return 1
    if isinstance(last, _LAST) or (isinstance(last, (nn.LayerNorm, nn.RMSNorm)) and len(last.normalized_shape) == 1):
        return -1
    return "auto"


def _keeps_axes(module: nn.Module) -> bool:
    return (
        num_units(module) is None
        and not any(True for _ in module.children())
        and (
            type(module).__module__.startswith(
                ("torch.nn.modules.activation", "torch.nn.modules.dropout", "em_lightning.")
            )
            or isinstance(module, nn.Identity)
        )
    )


def announce(path: str, kind: str, shape: Sequence[int], dim: int | None, sets: str = "") -> None:
    """Print the line on a layer at its first batch, on rank 0 and outside of compiled code only."""
    if torch.compiler.is_compiling() or (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        return
    units = "elementwise"
    if dim is not None:
        items = sets or f"{math.prod(shape) // max(shape[dim], 1)} items"
        units = f"axis {dim} has {shape[dim]} units, {items}"
    rich.get_console().print(f"{path}: {kind}, shape {tuple(shape)}, {units}", soft_wrap=True, markup=False)


def takes_dim(cls: Any) -> bool:
    """Return whether a module class has the axis of its units as an argument."""
    return "dim" in inspect.signature(cls).parameters


def own_dim(module: Any, make: Any) -> int | Literal["auto"] | None:
    """Return the axis along which the units of a module compete: "auto" if ``make`` gives none, None if elementwise."""
    if not takes_dim(type(module)) or not getattr(module, "competes", True):
        return None
    given = {} if isinstance(make, type) else getattr(make, "keywords", {"dim": None})
    return module.dim if "dim" in given else "auto"


class FirstCall:
    """Forward pre-hook that sets the axis of an activation or operator at its first call, and prints the line.

    The axis is None for elementwise activations.
    """

    def __init__(self, path: str, axis: UnitAxis | None, verbose: bool) -> None:
        self.path = path
        self.axis = axis
        self.verbose = verbose
        self.done = False

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        """Decide and print at the first call that has a tensor."""
        if self.done or not args or not isinstance(args[0], Tensor):
            return
        shape = args[0].shape
        dim = None if self.axis is None else self.axis(shape)
        if dim is not None:
            module.dim = dim
        if self.verbose:
            sets = module.describe_sets(shape) if hasattr(module, "describe_sets") else ""
            announce(self.path, type(module).__name__, shape, dim, sets)
        self.done = True
