"""The axis of a layer's units, from its type or from the first batch, and the line printed at that batch."""

from __future__ import annotations

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
_NORMS = (nn.LayerNorm, nn.RMSNorm)  # normalize the last axis, or several
# Percentage points of accuracy that activations lost against ReLU over 128 units; a warning for _WIDE units says so.
_LOST = {
    "DirectionActivation": 65.0,
    "SoftmaxGatedActivation": 7.3,
    "ReLUGatedActivation": 6.6,
    "SparseminActivation": 6.0,
    "NegLogSoftminActivation": 4.8,
    "ResidualSoftmaxActivation": 4.6,
    "LogSoftmaxActivation": 4.5,
}
_WIDE = 32  # chosen, not measured
Dim = int | Literal["auto"]  # an axis of units
Layers = Sequence[tuple[nn.Module, int]]  # each with its width, the number of units of its output or input
_ACTIVATIONS = ("torch.nn.modules.activation", "em_lightning.activations")  # modules that define activations


class UnitAxis:
    """The axis of the units of one layer.

    With ``dim="auto"`` the type of the layer defines it, or for an activation in an ``nn.Sequential`` the type of the
    layer before it. If no type defines it, the units of tensors of fewer than three axes are on the last axis. For
    others the first batch decides between axes 1 and -1: it is the one whose size is the likeliest of the possible
    widths, unless the types of the layers with these widths contradict. Checkpoints store the decision. A layer that is
    called with tensors of 2 and of 4 axes has an axis for each. ``widths`` are the possible widths, the likeliest
    first; ``near`` and ``in_order`` are results of :func:`layers_of`.
    """

    def __init__(
        self, path: str, widths: Sequence[int], dim: Dim = "auto", near: Layers = (), in_order: bool = False
    ) -> None:
        self.path, self.dim, self.in_order = path, dim, in_order
        self.widths = tuple(dict.fromkeys(widths))
        types = {1: _CHANNELS_FIRST, -1: (*LAST_AXIS, *_NORMS)}  # of layers with units on axis 1 and on axis -1
        self.widths_by_type = {axis: {n for layer, n in near if isinstance(layer, types[axis])} for axis in types}
        self.decided: dict[int, int] = {}  # with dim="auto": number of axes -> axis of the units

    def __call__(self, shape: Sequence[int]) -> int:
        """Return the axis for tensors of this shape, the same for each number of axes; ValueError if it is unclear."""
        dim = self.dim
        if dim == "auto":
            if len(shape) not in self.decided:
                self.decided[len(shape)] = -1 if len(shape) < 3 else self._decide(shape)
            dim = self.decided[len(shape)]
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"dim={dim} must be an axis of {self.path!r}, of shape {tuple(shape)}")
        first_fits, other_fits = shape[0] in self.widths, any(size in self.widths for size in shape[1:])
        if dim % len(shape) == 0 and other_fits and not first_fits:
            raise ValueError(f"dim={dim} must be the axis of the units of {self.path!r}, not of items: {tuple(shape)}")
        return dim

    def _decide(self, shape: Sequence[int]) -> int:
        """Return 1 or -1, or raise ValueError unless the widths name one axis and the types of layers agree."""
        first_width = next((width for width in self.widths if width in (shape[1], shape[-1])), None)
        by_width = [axis for axis in (1, -1) if shape[axis] == first_width]  # both axes if their sizes are equal
        by_type = [axis for axis in (1, -1) if shape[axis] in self.widths_by_type[axis]]
        if len(shape) > 3 and by_type == [1]:  # (B, C, H, W), whose W may equal a likelier width by chance
            return 1
        # The types agree if they name the same axis or none. If they name both, the order of the widths must be right.
        types_agree = by_type in ([], by_width) or (by_type == [1, -1] and self.in_order)
        if len(by_width) == 1 and types_agree:
            return by_width[0]
        widths = " or ".join(map(str, self.widths)) or "an unknown number of"
        raise ValueError(
            f"dim='auto' needs one of axes 1 and -1 of {self.path!r} to have the width of the layers in or before it, "
            f"and the other not: its shape is {tuple(shape)}, and they have {widths} units; give dim="
        )


def unit_axis(site: Site, dim: Dim = "auto", tap: Literal["output", "input"] = "output") -> UnitAxis:
    """Return the axis of the units of a site's output or input."""
    if dim == "auto":
        dim = _axis_by_type(site)
    likeliest, near, in_order = layers_of(site, tap)
    return UnitAxis(site.path, [width for _, width in likeliest], dim, near, in_order)


def num_units(module: nn.Module, tap: Literal["output", "input"] = "output") -> int | None:
    """Return the width of a layer's output or input, or None if neither its type nor its bias defines one."""
    if isinstance(module, _NORMS):
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
    """Return ``likeliest, near, in_order``: layers whose width the units of a site may have.

    ``near`` is the site's own layer if it has a width, else the layers in it, else those declared before and behind it
    in the innermost module around it that has any. ``likeliest`` are these layers, the best guess first; of
    layers around the site only those before it, if there are any. ``in_order``: whether the first guess can be trusted,
    as it is the site's own layer, or there are layers before and behind the site, probably called in this order.
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
        position = list(children).index(name) if name in children else len(children)  # a function is no child: last
        siblings = list(children.values())
        before, behind = layers_in(siblings[:position], "output")[::-1], layers_in(siblings[position + 1 :], "input")
        near = [*before, *behind, *layers_in(siblings[position + 1 :], "output")]
        if near:
            return before or near, near, bool(before and behind)
    return [], [], False


def layers_in(modules: Iterable[Any], tap: Literal["output", "input"] = "output") -> Layers:
    """Return the layers in some modules, except inserted operators, with their widths."""
    layers: list[tuple[nn.Module, int]] = []
    for module in modules:
        while isinstance(module, Inserted):
            module = module.layer
        if module is not None:
            width = num_units(module, tap)
            layers += [] if width is None else [(module, width)]
            layers += layers_in(module.children(), tap)
    return layers


def _axis_by_type(site: Site) -> Dim:
    """Return the axis that the layer's type defines, or the type of the layer before an activation in a Sequential."""
    layer: Any = site.module
    is_activation = site.function is None and type(layer).__module__.startswith(_ACTIVATIONS)
    if is_activation and isinstance(site.parent, nn.Sequential):
        before = list(site.parent)[: list(site.parent._modules).index(site.name)]
        elementwise = (*_ACTIVATIONS, "torch.nn.modules.dropout")  # like nn.Identity, they tell nothing about the axis
        others = [one for one in before if not type(one).__module__.startswith(elementwise)]
        layer = next((one for one in reversed(others) if not isinstance(one, (nn.Identity, type(None)))), layer)
    while isinstance(layer, Inserted):
        layer = layer.layer
    if isinstance(layer, _CHANNELS_FIRST):
        return 1
    normalizes_last = isinstance(layer, _NORMS) and len(layer.normalized_shape) == 1
    return -1 if normalizes_last or isinstance(layer, LAST_AXIS) else "auto"


class Observation:
    """Whether taps record tensors and the first batch prints lines and warnings; an audit disables it meanwhile."""

    enabled = True


def announce(
    path: str, kind: str, shape: Sequence[int], dim: int | None, verbose: bool, sets_of_operator: str = ""
) -> None:
    """Warn of an unsuitable width of a layer, and print its line; ``kind`` is its class, or the tap that records it."""
    if not Observation.enabled:
        return
    units = None if dim is None else shape[dim]
    if units == 1 and not sets_of_operator:
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
        items = sets_of_operator or f"{math.prod(shape) // max(units or 1, 1)} items"
        what = "elementwise" if units is None else f"axis {dim} has {units} unit{'s' * (units != 1)}, {items}"
        print_line(f"{path}: {kind}, shape {tuple(shape)}, {what}")


def print_line(text: str) -> None:
    """Print a line, on rank 0 and outside of compiled code only."""
    is_rank_zero = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if is_rank_zero and not torch.compiler.is_compiling():
        print(text)


class FirstCall:
    """Forward pre-hook that sets the axis of a module; prints at the first call with each number of axes."""

    def __init__(self, path: str, axis: UnitAxis | None, verbose: bool) -> None:
        self.path = path
        self.axis = axis  # None for a module that treats each unit by itself
        self.verbose = verbose
        self.seen: set[int] = set()  # numbers of axes

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        """Set the axis; at a first call also prepare an operator for the shape, and print."""
        if not args or not isinstance(args[0], Tensor):
            return
        shape = args[0].shape
        dim = None if self.axis is None else self.axis(shape)
        if dim is not None and module.dim != dim:
            module.dim = dim
        if len(shape) not in self.seen:
            sets = module.prepare_sets(shape) if hasattr(module, "prepare_sets") else ""
            announce(self.path, type(module).__name__, shape, dim, self.verbose, sets)
            self.seen.add(len(shape))
