"""The axis of a layer's units, from its type or from the first batch, and the line printed at that batch."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.surgery.edit import Inserted
from em_lightning.surgery.select import Site

# Layers with units on axis 1, and layers with units on the last axis.
_MAPS = tuple(
    getattr(nn, f"{kind}{d}d") for d in (1, 2, 3) for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm")
)
_CHANNELS_FIRST = (*_MAPS, nn.SyncBatchNorm, nn.GroupNorm)
LAST_AXIS = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Transformer),
    *(nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder, nn.TransformerDecoderLayer),
)
# Percentage points of accuracy that activations lost against ReLU over 128 units. Over 8 and 16 channels three of them
# lost nothing. The warning begins at _WIDE units, a width between 16 and 128: chosen, not measured.
_LOST = {
    "DirectionActivation": 65.0,
    "SoftmaxGatedActivation": 7.3,
    "ReLUGatedActivation": 6.6,
    "SparseminActivation": 6.0,
    "NegLogSoftminActivation": 4.8,
    "ResidualSoftmaxActivation": 4.6,
    "LogSoftmaxActivation": 4.5,
}
_WIDE = 32
Layers = list[tuple[nn.Module, int]]  # each with its width, the number of units of its output or input
_ACTIVATIONS = ("torch.nn.modules.activation", "em_lightning.activations")  # modules that define activations


class UnitAxis:
    """The axis of the units of one layer.

    With ``dim="auto"`` the type of the layer defines it, or for an activation in an ``nn.Sequential`` the type of the
    layer before it, see :func:`unit_axis`. If no type defines it, tensors of fewer than three axes have it on the last
    axis. For others the first batch decides: it is the one of axes 1 and -1 whose size is the width of the layer, and
    checkpoints store the decision. A layer that is called with tensors of 2 and of 4 axes has an axis for each.
    ``widths`` are the possible widths, the likeliest first.
    """

    channel_widths: Sequence[int] = ()  # of layers at, in or around it that have their units on axis 1
    feature_widths: Sequence[int] = ()  # of those that have their units on axis -1
    in_order = False  # whether the order of ``widths`` can be trusted, see :func:`layers_of`

    def __init__(self, path: str, widths: Sequence[int], dim: int | Literal["auto"] = "auto") -> None:
        self.path = path
        self.widths = tuple(dict.fromkeys(widths))
        self.dim = dim
        self.decided: dict[int, int] = {}  # with dim="auto": number of axes -> axis of the units

    def __call__(self, shape: Sequence[int]) -> int:
        """Return the axis for tensors of this shape; the first decision for a number of axes is final.

        Raises:
            ValueError: neither or both of axes 1 and -1 have the layer's width, or ``dim`` cannot be the axis of units.
        """
        dim = self.dim
        if dim == "auto":
            if len(shape) not in self.decided:
                self.decided[len(shape)] = -1 if len(shape) < 3 else self._decide(shape)
            dim = self.decided[len(shape)]
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"dim={dim} must be an axis of {self.path!r}, of shape {tuple(shape)}")
        only_others_fit = shape[0] not in self.widths and not {*shape[1:]}.isdisjoint(self.widths)
        if dim % len(shape) == 0 and only_others_fit:
            raise ValueError(f"dim={dim} must be the axis of the units of {self.path!r}, not of items: {tuple(shape)}")
        return dim

    def _decide(self, shape: Sequence[int]) -> int:
        widths_by_type = ((1, self.channel_widths), (-1, self.feature_widths))
        by_type = [axis for axis, widths in widths_by_type if shape[axis] in widths]
        if len(shape) > 3 and by_type == [1]:  # (B, C, H, W), whose W may equal a likelier width by chance
            return 1
        by_width = ([axis for axis in (1, -1) if shape[axis] == width] for width in self.widths)
        likeliest = next(filter(None, by_width), [])  # the axes of the likeliest width that an axis has
        if len(likeliest) == 1 and (by_type in ([], likeliest) or (len(by_type) == 2 and self.in_order)):
            return likeliest[0]
        widths = " or ".join(map(str, self.widths)) or "an unknown number of"
        raise ValueError(
            f"dim='auto' needs one of axes 1 and -1 of {self.path!r} to have the width of the layers in or before it, "
            f"and the other not: its shape is {tuple(shape)}, and they have {widths} units; give dim="
        )


def unit_axis(site: Site, dim: int | Literal["auto"] = "auto", tap: Literal["output", "input"] = "output") -> UnitAxis:
    """Return the axis of the units of a site's output or input."""
    if dim == "auto":
        dim = _axis_by_type(site)
    likeliest, near, in_order = layers_of(site, tap)
    axis = UnitAxis(site.path, [width for _, width in likeliest], dim)
    axis.in_order = in_order
    axis.channel_widths = [width for layer, width in near if isinstance(layer, _CHANNELS_FIRST)]
    axis.feature_widths = [width for layer, width in near if isinstance(layer, (*LAST_AXIS, nn.LayerNorm, nn.RMSNorm))]
    return axis


def num_units(module: nn.Module, tap: Literal["output", "input"] = "output") -> int | None:
    """Return the width of a layer's output or input, or None if neither its type nor its bias defines one."""
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
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    return len(bias) if tap == "output" and bias is not None and bias.ndim == 1 else None


def layers_of(site: Site, tap: Literal["output", "input"] = "output") -> tuple[Layers, Layers, bool]:
    """Return the layers whose width a site probably has, likeliest first; all that it may have; and ``in_order``.

    The first are the site's own layer, else those in it, else those declared before it, else behind it. ``in_order``:
    whether the width is the site's own, or the site is declared between layers, probably in the order of the calls.
    """
    own = num_units(site.module, tap)  # an Inserted has the attributes of its layer
    if own is not None:
        return [(site.module, own)], [(site.module, own)], True
    inside = layers_in([site.module], tap)
    if inside:
        inside = inside if tap == "input" else inside[::-1]
        return inside, inside, False
    for owner, name in zip(reversed(site.ancestors), reversed(site.path.split(".")), strict=True):
        children = dict(owner._modules)  # looked up by name, as an instance may have several names
        position = list(children).index(name) if name in children else len(children)
        siblings = list(children.values())
        before, behind = layers_in(siblings[:position], "output")[::-1], layers_in(siblings[position + 1 :], "input")
        near = [*before, *behind, *layers_in(siblings[position + 1 :], "output")]
        if near:
            return before or near, near, bool(before and behind)
    return [], [], False


def layers_in(modules: Iterable[Any], tap: Literal["output", "input"] = "output") -> Layers:
    """Return the layers in some modules, except inserted operators, with their widths."""
    layers: Layers = []
    for module in modules:
        while isinstance(module, Inserted):
            module = module.layer
        if module is not None:
            width = num_units(module, tap)
            layers += [] if width is None else [(module, width)]
            layers += layers_in(module.children(), tap)
    return layers


def _axis_by_type(site: Site) -> int | Literal["auto"]:
    """Return the axis that the layer's type defines, or the type of the layer before an activation in a Sequential."""
    layer: Any = site.module
    is_activation = site.function is None and type(layer).__module__.startswith(_ACTIVATIONS)
    if is_activation and isinstance(site.parent, nn.Sequential):
        before = list(site.parent)[: list(site.parent._modules).index(site.name)]
        any_axis = (*_ACTIVATIONS, "torch.nn.modules.dropout")  # modules whose classes tell nothing about the axis
        telling = [one for one in before if not isinstance(one, (nn.Identity, type(None)))]
        layer = next((one for one in reversed(telling) if not type(one).__module__.startswith(any_axis)), layer)
    while isinstance(layer, Inserted):
        layer = layer.layer
    if isinstance(layer, _CHANNELS_FIRST):
        return 1
    normalizes_last = isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and len(layer.normalized_shape) == 1
    return -1 if normalizes_last or isinstance(layer, LAST_AXIS) else "auto"


class Observers:
    """Whether taps record tensors, and lines and warnings on the first batch are printed; off during an audit."""

    on = True


def announce(path: str, kind: str, shape: Sequence[int], dim: int | None, verbose: bool, sets: str = "") -> None:
    """Warn of an unsuitable width of a layer, print its line; ``kind``: its class or tap; ``sets``: an operator's."""
    if not Observers.on:
        return
    units = None if dim is None else shape[dim]
    if units == 1 and not sets:
        warnings.warn(
            f"{path!r} has 1 unit (axis {dim} of shape {tuple(shape)}), which competes with no other: select a wider "
            f"layer, or give dim=, the axis of the units",
            stacklevel=2,
        )
    if units is not None and units >= _WIDE and kind in _LOST:
        warnings.warn(
            f"{kind} over the {units} units of {path!r}: over 128 units of an MLP on MNIST it lost {_LOST[kind]} "
            f"points of accuracy against ReLU (documentation, open questions, C); 'signed' and 'grouped' lost none",
            stacklevel=2,
        )
    if verbose:
        what = "elementwise"
        if units is not None:
            items = sets or f"{math.prod(shape) // max(units, 1)} items"
            what = f"axis {dim} has {units} unit{'s' * (units != 1)}, {items}"
        print_line(f"{path}: {kind}, shape {tuple(shape)}, {what}")


def print_line(text: str) -> None:
    """Print a line, on rank 0 and outside of compiled code only."""
    is_rank_zero = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if is_rank_zero and not torch.compiler.is_compiling():
        print(text)


def takes_dim(cls: Any) -> bool:
    """Return whether the constructor of a module class takes ``dim``, the axis of its units."""
    return "dim" in inspect.signature(cls).parameters


def own_dim(module: Any, make: Any) -> int | Literal["auto"] | None:
    """Return the axis along which the units of a module compete: "auto" if ``make`` gives none, None if elementwise."""
    if not takes_dim(type(module)) or not getattr(module, "competes", True):
        return None
    arguments = {} if isinstance(make, type) else getattr(make, "keywords", {"dim": None})  # an instance keeps its dim
    return module.dim if "dim" in arguments else "auto"


class FirstCall:
    """Forward pre-hook that sets the axis and width of a module; prints at the first call with each number of axes."""

    def __init__(self, path: str, axis: UnitAxis | None, verbose: bool) -> None:
        self.path = path
        self.axis = axis  # None for a module that treats each unit by itself
        self.verbose = verbose
        self.seen: set[int] = set()  # numbers of axes

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        """Set the axis; at a first call also set the width and print."""
        if not args or not isinstance(args[0], Tensor):
            return
        shape = args[0].shape
        dim = None if self.axis is None else self.axis(shape)
        if dim is not None and module.dim != dim:
            module.dim = dim
        if len(shape) in self.seen:
            return
        if dim is not None and not getattr(module, "width_is_given", True):
            module.resize(shape[dim])
        sets = module.describe_sets(shape) if hasattr(module, "describe_sets") else ""
        announce(self.path, type(module).__name__, shape, dim, self.verbose, sets)
        self.seen.add(len(shape))
