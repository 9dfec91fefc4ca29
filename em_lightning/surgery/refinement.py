"""The operator inserted behind layers: gated EM over the items of each set, for any order of the axes."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from em_lightning.operators import EMRefinement
from em_lightning.surgery.axes import LAST_AXIS
from em_lightning.surgery.hooks import Undo, wrap
from em_lightning.surgery.select import Site

# Arguments of a forward that mark padding: True or -inf at padding, except in the last, which is 1 at items.
_PADDING = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask", "padding_mask", "attention_mask")
_BLOCKED = -1e4  # scores below this have no weight after the softmax


class SetRefinement(EMRefinement):
    """Adds to each item its posterior mean under the mixture of its set, see :class:`EMRefinement`.

    The axes of a tensor are features (``dim``), items (``set_dim``), and the others, which index sets: no output
    depends on another set. With ``causal`` an item depends on itself and the items before it, whose mixture is fitted
    for each item: N times the cost of one fit. Padding takes no part in a fit: it is read from the arguments
    ``src_key_padding_mask``, ``tgt_key_padding_mask``, ``key_padding_mask``, ``padding_mask`` (true at padding) or
    ``attention_mask`` (1 at items) of the layer and the modules around it.

    Args:
        num_components, num_features, dim, **operator: arguments of :class:`EMRefinement`.
        set_dim: the axis of the items; "auto" takes all axes but the features' and ``batch_dim``, and none of two axes.
        causal: whether items see only those before them.
        batch_dim: the axis of the batch for ``set_dim="auto"``, or None if it is unknown.

    Raises:
        ValueError: ``set_dim`` is out of range or equals ``dim``, or ``set_dim="auto"`` is ambiguous.
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
        if set_dim != "auto" and not isinstance(set_dim, int):
            raise ValueError(f"set_dim={set_dim!r} must be an int or 'auto'")
        self.set_dim = set_dim
        self.causal = causal
        self.batch_dim = batch_dim
        self.padding: list[tuple[str, Tensor]] = []  # of the modules that run now, the innermost first
        self.width_is_given = False  # otherwise it was read from the layers, and the first batch may correct it
        self.called = False  # from the first call on, forwards around the layer are no longer inspected
        self.decided = False  # whether the attention around the layer has been inspected

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined items, of the shape and dtype of ``x``."""
        self.called = True
        sets, items, dim = self._axes(x.shape)
        if x.numel() == 0:
            return x + x * sum(p.sum() for p in self.parameters())  # a gradient of zero for every parameter
        moved = x.permute(*sets, *items, dim)
        num_items, features = math.prod(x.shape[axis] for axis in items), x.shape[dim]
        points = moved.reshape(-1, num_items, features)
        keep = self._kept(points.shape)
        if self.causal:
            visible = torch.ones(num_items, num_items, dtype=torch.bool, device=x.device).tril()
            mask = (visible if keep is None else visible & keep.unsqueeze(1)).expand(len(points), -1, -1)
            prefixes = points.unsqueeze(1).expand(-1, num_items, -1, -1).reshape(-1, num_items, features)
            refined = self.reconstruct(prefixes, mask.reshape(-1, num_items), points.reshape(-1, 1, features))
        else:
            refined = self.reconstruct(points, keep)
        back = [[*sets, *items, dim].index(axis) for axis in range(x.ndim)]
        return x + self.gate * refined.reshape(moved.shape).permute(back)

    def resize(self, num_features: int) -> None:
        """Take items of another width, where no parameter depends on it; raises ValueError otherwise."""
        current = self.operator.num_features
        if num_features == current:
            return
        if list(self.operator.parameters()):
            raise ValueError(f"num_features={current} must be the output's width: give num_features={num_features}")
        self.operator = self._make_operator(self.operator.num_components, num_features).train(self.training)

    def describe_sets(self, shape: Sequence[int]) -> str:
        """Return the number of sets and items as text."""
        sets, items, _ = self._axes(shape)
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
            batch = 0 if dim == 1 else self.batch_dim
            if batch is None:
                raise ValueError(
                    f"set_dim='auto' cannot tell the batch from the items in {tuple(shape)}, as the model has "
                    f"attention or recurrent layers with batch_first=False: give set_dim=, the axis of the items"
                )
            items = [axis for axis in range(ndim) if axis not in (dim, batch)]
        if self.causal and len(items) > 1:
            raise ValueError(f"causal=True needs one axis of items, but {tuple(shape)} has {items}: give set_dim=")
        return [axis for axis in range(ndim) if axis != dim and axis not in items], items, dim

    def _kept(self, shape: torch.Size) -> Tensor | None:
        """Return the mask (S, N) of the items that are no padding, from the innermost module that was given one."""
        for name, mask in self.padding:
            if mask.shape == shape[:2]:
                if name == "attention_mask":
                    return mask > 0
                return ~mask if mask.dtype == torch.bool else mask == 0
        return None


def batch_dim_of(site: Site) -> int | None:
    """Return the batch axis of three-dimensional outputs, by the closest attention or RNN; None if these disagree."""
    for module in (site.module, *reversed(site.ancestors)):
        inner = [one for one in module.modules() if isinstance(one, (nn.MultiheadAttention, nn.RNNBase))]
        if inner:
            if all(one.batch_first for one in inner):
                return 0
            return 1 if isinstance(module, LAST_AXIS) and not any(one.batch_first for one in inner) else None
    return 0


def observe_forwards(site: Site, operator: SetRefinement) -> list[Undo]:
    """Pass padding masks of the modules around a site to its operator; raise if it must be causal and is not."""
    undos = []
    for module in (*site.ancestors, site.module):
        names = list(inspect.signature(module.forward).parameters)
        may_fuse = any(isinstance(one, nn.MultiheadAttention) for one in module.modules())
        undos.append(wrap(module, "forward", functools.partial(_observe, operator, site.path, names, may_fuse)))
    return undos


def _observe(
    operator: SetRefinement,
    path: str,
    names: list[str],
    may_fuse: bool,
    proceed: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    outer_padding = operator.padding
    masks = [(name, given[name]) for name in _PADDING if isinstance(given.get(name), Tensor)]
    operator.padding = [*masks, *outer_padding]
    watch = AttentionWatch()
    try:
        if operator.called or operator.causal or torch.compiler.is_compiling():
            return proceed(*args, **kwargs)
        fused = may_fuse and not operator.training and not torch.is_grad_enabled()
        if fused:  # inspect the arguments only, as a TorchFunctionMode would turn the fused kernels off
            watch.inspect("attention", (), given)
            output = proceed(*args, **kwargs)
        else:
            with watch:
                output = torch.compiler.disable(proceed)(*args, **kwargs)  # compiled code warns about a mode
    finally:
        operator.padding = outer_padding
    if operator.called and not operator.decided and watch.attention:  # of the innermost module that has attention
        operator.decided = not watch.causal and not fused
        operator.called = operator.decided  # if not decided, inspect the next forward as well
        if watch.causal:
            raise ValueError(
                f"the attention around {path!r} masks later positions, but causal=False fits one mixture to all, "
                f"so that earlier positions would see later ones: set causal=True"
            )
    return output


class AttentionWatch(TorchFunctionMode):
    """Counts the calls of attention in its context, and those that mask all later positions."""

    attention = 0
    causal = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and inspect its masks."""
        self.inspect(getattr(func, "__name__", ""), args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def inspect(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a call if its name is one of attention."""
        if "attention" in name or name == "softmax":
            tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            masked = bool(kwargs.get("is_causal")) or ("scaled" in name and any(one is True for one in args))
            masked = masked or any(_blocks_later(one) for one in tensors)
            self.causal += masked
            self.attention += masked or "attention" in name or any(_is_square(one) for one in tensors)


def _is_square(scores: Tensor) -> bool:
    return scores.ndim >= 2 and scores.shape[-1] == scores.shape[-2] > 1


def _blocks_later(scores: Tensor) -> bool:
    """Return whether scores or a mask (..., N, N) exclude all positions after a row's own."""
    if not _is_square(scores):
        return False
    first = scores.detach().reshape(-1, *scores.shape[-2:])[0]
    later = torch.ones_like(first, dtype=torch.bool).triu(1)
    own = first.diagonal()
    if first.dtype == torch.bool:
        # True excludes in nn.MultiheadAttention, and includes in scaled_dot_product_attention.
        return bool((first[later].all() and not own.all()) or (own.any() and not first[later].any()))
    return bool((first[later] <= _BLOCKED).all() and (first[~later] > _BLOCKED).any())
