"""The operator inserted behind layers: gated EM over the items of each set, for any order of the axes."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from em_lightning.operators import EMRefinement
from em_lightning.surgery.axes import LAST_AXIS
from em_lightning.surgery.edit import Inserted
from em_lightning.surgery.hooks import Undo, wrap
from em_lightning.surgery.select import Site

# Arguments of a forward that mark padding. In attention_mask 1 marks items, in the others True or -inf marks padding.
_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask", "attention_mask")
_BLOCKED = -1e4  # scores of this or less have no weight after the softmax; many models mask with it
_LEFT_PADDED = "convolutions padded on the left only"
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
_PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum")


class SetRefinement(EMRefinement):
    """Adds to each item its posterior mean under the mixture of its set, see :class:`EMRefinement`.

    Axis ``dim`` of a tensor has the features, axis ``set_dim`` the items of a set. All other axes number the sets; they
    are independent. With ``causal`` each of the N items has a mixture of its own, fitted to this item and those before
    it: N times the cost of one fit. Padding takes no part in a fit: it is read from the arguments
    ``src_key_padding_mask``, ``tgt_key_padding_mask``, ``key_padding_mask``, ``padding_mask`` (true at padding) or
    ``attention_mask`` (1 at items, or additive) of the layer and the modules around it, whose axes are found by size.

    Args:
        num_components, num_features, dim, **operator: arguments of :class:`EMRefinement`.
        set_dim: the axis along which a set has its items; "auto": all but features and batch; (N, D) are N sets.
        causal: whether an item depends only on itself and the items before it.
        batch_dim: the axis of the batch for ``set_dim="auto"``, None if unknown; if ``dim`` is axis 1, it is 0.

    Raises:
        ValueError: ``set_dim`` is out of range, equals ``dim`` or is ambiguous, or ``causal`` has several item axes.
    """

    def __init__(
        self,
        num_components: int,
        num_features: int,
        *,
        dim: int = -1,
        set_dim: int | Literal["auto"] = "auto",
        causal: bool = False,
        batch_dim: int | None = 0,
        **operator: Any,
    ) -> None:
        super().__init__(num_components, num_features, dim=dim, **operator)
        if not isinstance(causal, bool):  # any text would be true
            raise ValueError(f"causal={causal!r} must be True or False")
        if set_dim != "auto" and not isinstance(set_dim, int):
            raise ValueError(f"set_dim={set_dim!r} must be an int or 'auto'")
        self.set_dim = set_dim
        self.causal = causal
        self.batch_dim = batch_dim
        self.padding: list[tuple[str, Tensor]] = []  # (argument, mask) of modules that run now, innermost first
        self.width_is_given = False  # otherwise it was read from the layers, and the first batch may correct it
        self.inspection = "due"  # by modules around; "open" until one of them that calls attention decides; then "done"
        self.may_warn = False  # whether the last call fitted one mixture to a sequence, without a warning so far

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined items, of the shape and dtype of ``x``."""
        if self.inspection == "due":
            self.inspection = "open"
        sets, items, dim = self._axes(x.shape)
        if x.numel() == 0:
            return x + x * sum(p.sum() for p in self.parameters())  # a gradient of zero for every parameter
        order = (*sets, *items, dim)
        moved = x.permute(order)
        num_items, features = math.prod(x.shape[axis] for axis in items), x.shape[dim]
        self.may_warn = not self.causal and x.ndim == 3 and num_items > 1
        points = moved.reshape(-1, num_items, features)
        keep = self._kept(x, [*sets, *items], points.shape[:2])
        CausalityWatch.paused = True  # the Cholesky factors of covariances are lower triangular too
        try:
            if self.causal:
                visible = torch.ones(num_items, num_items, dtype=torch.bool, device=x.device).tril()
                mask = (visible if keep is None else visible & keep.unsqueeze(1)).expand(len(points), -1, -1)
                prefixes = points.unsqueeze(1).expand(-1, num_items, -1, -1).reshape(-1, num_items, features)
                refined = self.reconstruct(prefixes, mask.reshape(-1, num_items), points.reshape(-1, 1, features))
            else:
                refined = self.reconstruct(points, keep)
        finally:
            CausalityWatch.paused = False
        return x + self.gate.to(x.dtype) * refined.reshape(moved.shape).movedim(tuple(range(x.ndim)), order)

    def prepare_sets(self, shape: Sequence[int]) -> str:
        """Take items of the width in ``shape`` unless it was given; return the number of sets and items as text.

        ValueError if parameters depend on another width.
        """
        sets, items, dim = self._axes(shape)
        current, width = self.operator.num_features, shape[dim]
        if width != current and not self.width_is_given:
            if list(self.operator.parameters()):
                raise ValueError(f"num_features={current} must be the output's width: give num_features={width}")
            self.operator = self._make_operator(self.operator.num_components, width).train(self.training)
        hint = "" if items else ": each row is a set of its own, set_dim=0 fits one mixture to the rows of the batch"
        num_sets, num_items = (math.prod(shape[axis] for axis in axes) for axes in (sets, items))
        return f"{num_sets} sets of {num_items} item{'' if num_items == 1 else 's'}{hint}"

    def _axes(self, shape: Sequence[int]) -> tuple[list[int], list[int], int]:
        """Return the axes of sets, of items and of features."""
        ndim = len(shape)
        dim = self.dim % ndim
        if self.set_dim != "auto":
            if not -ndim <= self.set_dim < ndim or self.set_dim % ndim == dim:
                raise ValueError(f"set_dim={self.set_dim} must be an axis of {tuple(shape)} other than dim={self.dim}")
            items = [self.set_dim % ndim]
        elif ndim < 3:
            items = []
        else:
            batch = 0 if dim == 1 else self.batch_dim  # dim == 1: feature maps (B, D, ...)
            if batch is None:
                raise ValueError(
                    f"set_dim='auto' cannot tell the batch from the items in {tuple(shape)}, as the model has "
                    f"attention or recurrent layers with batch_first=False: give set_dim=, the axis of the items"
                )
            items = [axis for axis in range(ndim) if axis not in (dim, batch)]
        if self.causal and len(items) > 1:
            raise ValueError(f"causal=True needs one axis of items, but {tuple(shape)} has {items}: give set_dim=")
        return [axis for axis in range(ndim) if axis != dim and axis not in items], items, dim

    def _kept(self, x: Tensor, axes: list[int], shape: torch.Size) -> Tensor | None:
        """Return the mask (S, N) of items that are no padding, by the innermost mask; the first axis is the batch."""
        for name, mask in self.padding:
            fits = [axis for axis in axes[1:] if mask.shape == (x.shape[axes[0]], x.shape[axis])]
            if len(fits) == 1:
                sizes = [x.shape[axis] if axis in (axes[0], *fits) else 1 for axis in axes]
                keep = _at_items(name, mask).reshape(sizes)
                return keep.expand([x.shape[axis] for axis in axes]).reshape(shape)
            if fits and not torch.compiler.is_compiling() and not _at_items(name, mask).all():
                warnings.warn(
                    f"{name} {tuple(mask.shape)} fits axes {fits} of the output {tuple(x.shape)} of a layer with an "
                    f"operator: padding takes part in the fit; insert the operator where one axis fits",
                    stacklevel=2,
                )
        return None


def _at_items(name: str, mask: Tensor) -> Tensor:
    """Return the bool mask that is true at items, from a mask given as argument ``name``."""
    if name != "attention_mask":
        return mask == 0
    additive = mask.is_floating_point() and ~(mask > 0).any()
    return (mask > 0) | (additive & (mask > _BLOCKED))


def batch_dim_of(site: Site) -> int | None:
    """Return the batch axis of three-dimensional outputs, by the closest attention or RNN; None if it is unknown."""
    module, layers = _closest(site, (nn.MultiheadAttention, nn.RNNBase))
    if all(layer.batch_first for layer in layers):
        return 0
    # With batch_first=False, layers of PyTorch (LAST_AXIS) have the batch on axis 1; a user's module may transpose it.
    return 1 if isinstance(module, LAST_AXIS) and not any(layer.batch_first for layer in layers) else None


def _closest(site: Site, kinds: Any) -> tuple[nn.Module, list[Any]]:
    """Return the innermost module at or around a site that contains layers of some kinds, and these layers."""
    for module in (site.module, *reversed(site.ancestors)):
        layers = [inner for inner in module.modules() if isinstance(inner, kinds)]
        if layers:
            return module, layers
    return site.module, []


def observe_forwards(site: Site, new: nn.Module, operator: SetRefinement) -> list[Undo]:
    """Give the operator, which is in ``new``, the masks of this and the modules around; check if it must be causal.

    Attention that masks later positions raises ValueError. Recurrent layers of one direction, convolutions padded on
    the left and sums over earlier positions are signs, but no proof, that it must be: they give a warning.
    """
    _, recurrent = _closest(site, (nn.RNNBase, nn.RNNCellBase))
    one_direction = bool(recurrent) and not any(getattr(layer, "bidirectional", False) for layer in recurrent)
    undos, layer = [], site.module
    while isinstance(layer, Inserted):  # takes the arguments of its layer, as ``new`` does
        layer = layer.layer
    for module in (*site.ancestors, new):
        names = list(inspect.signature((layer if module is new else module).forward).parameters)
        may_fuse = any(isinstance(inner, nn.MultiheadAttention) for inner in module.modules())
        observe = functools.partial(_observe, operator, site.path, names, may_fuse, one_direction)
        undos.append(wrap(module, "forward", observe))
    return undos


def _observe(
    operator: SetRefinement,
    path: str,
    names: list[str],
    may_fuse: bool,
    one_direction: bool,
    proceed: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run and inspect the forward, with parameters ``names``, of a module around the operator behind layer ``path``."""
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    outer_padding = operator.padding
    masks = [(name, arguments[name]) for name in _PADDING if isinstance(arguments.get(name), Tensor)]
    operator.padding = [*masks, *outer_padding]
    watch = CausalityWatch()
    # A TorchFunctionMode would turn fused kernels of attention off: where they may run, inspect only the arguments.
    only_arguments = may_fuse and not operator.training and not torch.is_grad_enabled()
    try:
        if operator.inspection != "due" or operator.causal or torch.compiler.is_compiling():
            return proceed(*args, **kwargs)
        if only_arguments:
            watch.inspect("attention", (), arguments)
            output = proceed(*args, **kwargs)
        else:
            with watch:
                output = torch.compiler.disable(proceed)(*args, **kwargs)  # compiled code warns about a mode
    finally:
        operator.padding = outer_padding
    if operator.inspection != "open":  # not called, or an inner module has decided
        return output
    if watch.causal:
        operator.inspection = "due"  # the next forward raises, too
        raise ValueError(
            f"the attention around {path!r} masks later positions, but causal=False fits one mixture to all, "
            f"so that earlier positions would see later ones: set causal=True"
        )
    if watch.attention:
        operator.inspection = "due" if only_arguments else "done"  # a mask that is made inside is no argument
    elif operator.may_warn and (one_direction or watch.one_sided):
        operator.may_warn = False
        source = "recurrent layers of one direction" if one_direction else watch.one_sided
        warnings.warn(
            f"the operator behind {path!r} fits one mixture to all positions of a sequence, so that earlier positions "
            f"see later ones, unlike in the {source} around it: set causal=True unless this is meant",
            stacklevel=2,
        )
    return output


class CausalityWatch(TorchFunctionMode):
    """Counts the calls of attention in its context and those that mask all later positions.

    ``one_sided`` names other operations in which positions depend on earlier ones only, if there are any.
    """

    paused = False  # while an operator runs

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0
        self.causal = 0
        self.one_sided = ""
        self._padding: dict[tuple[int, ...], int] = {}  # of convolutions padded on both sides, by the output's shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not CausalityWatch.paused:
            self.inspect(getattr(func, "__name__", ""), args, kwargs or {}, output)
        return output

    def inspect(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        """Inspect calls of attention, padding, convolutions, slices that remove their padding, sums over positions."""
        if "attention" in name or name == "softmax":
            tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            # In scaled_dot_product_attention, only is_causal is a bool among the arguments by position.
            masked = bool(kwargs.get("is_causal")) or ("scaled" in name and any(one is True for one in args))
            masked = masked or any(_blocks_later(one) for one in tensors)
            self.causal += masked
            self.attention += masked or "attention" in name or any(_is_square(one) for one in tensors)
        elif name == "pad":
            pad = kwargs.get("pad", args[1] if len(args) > 1 else ())
            on_the_left = any(left > 0 and right == 0 for left, right in zip(pad[::2], pad[1::2], strict=True))
            if on_the_left and len(args) > 0 and args[0].ndim == 3:
                self.one_sided = _LEFT_PADDED
        elif name == "conv1d":
            padding = kwargs.get("padding", args[4] if len(args) > 4 else 0)  # input, weight, bias, stride, padding
            if isinstance(padding, (int, tuple)):
                self._padding[tuple(output.shape)] = padding if isinstance(padding, int) else padding[0]
        elif name == "__getitem__" and tuple(args[0].shape) in self._padding:
            size, padding = args[0].shape[-1], self._padding[tuple(args[0].shape)]
            last = args[1][-1] if isinstance(args[1], tuple) and args[1] else None  # :-padding in x[..., :-padding]
            if padding > 0 and isinstance(last, slice) and last.indices(size)[:2] == (0, size - padding):
                self.one_sided = _LEFT_PADDED
        elif (name in _CUMULATIVE and args[0].ndim > 2) or (name in _PRODUCTS and any(map(_is_lower, args))):
            self.one_sided = "sums over earlier positions"


def _is_lower(factor: Any) -> bool:
    """Return whether a factor is a square matrix that is zero above its diagonal only."""
    is_square = isinstance(factor, Tensor) and _is_square(factor)
    return is_square and not factor.triu(1).any() and bool(factor.tril(-1).any())


def _is_square(scores: Tensor) -> bool:
    return scores.ndim >= 2 and scores.shape[-1] == scores.shape[-2] > 1


def _blocks_later(scores: Tensor) -> bool:
    """Return whether scores or a mask (..., N, N) exclude all positions after a row's own; inspect the first matrix."""
    if not _is_square(scores):
        return False
    first = scores.detach().reshape(-1, *scores.shape[-2:])[0]
    later = torch.ones_like(first, dtype=torch.bool).triu(1)
    own = first.diagonal()
    if first.dtype == torch.bool:
        # True excludes in nn.MultiheadAttention, and includes in scaled_dot_product_attention.
        return bool((first[later].all() and not own.all()) or (own.any() and not first[later].any()))
    return bool((first[later] <= _BLOCKED).all() and (first[~later] > _BLOCKED).any())
