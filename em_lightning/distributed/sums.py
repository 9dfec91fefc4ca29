"""Sums over the ranks of a process group that are right forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["batch_mean", "flatten_units", "global_sum", "global_sums", "is_spread", "row_blocks", "units_last"]


_BLOCK = 2**17


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _GlobalSum.apply(gradient, ctx.group), None


def global_sum(values: Tensor, group: Any = None) -> Tensor:
    r"""Sum a tensor over the ranks, elementwise; without a process group, return it as it is.

    Backward sums too. Let :math:`S = \sum_r s_r(\theta)` and let each of the W ranks compute the whole loss
    :math:`L(S)`. Then :math:`s_r` receives :math:`W \, dL/dS`, and as data-parallel training averages over ranks,

    .. math:: \frac{1}{W} \sum_r W \frac{dL}{dS} \frac{ds_r}{d\theta} = \frac{dL}{d\theta}:

    the gradient of one process that saw the whole batch, with no factor of W to be added anywhere.

    Args:
        values: a tensor of the same shape and dtype on every rank; all ranks must make the call.
        group: the process group, the default one where ``None``.

    Example:
        >>> global_sum(torch.ones(2))
        tensor([1., 1.])
    """
    return _GlobalSum.apply(values, group) if is_spread(group) else values


def is_spread(group: Any = None) -> bool:
    """Return whether there are several ranks to sum over."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def global_sums(values: Tensor, scalar: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Sum a vector and a scalar by one message."""
    if not is_spread(group):
        return values, scalar
    sums = global_sum(torch.cat([values, scalar[None]]), group)
    return sums[:-1], sums[-1]


def units_last(values: Tensor, dim: int) -> Tensor:
    """Move the axis of the units to the end.

    Nothing is done where it is there: through a view that changes nothing, autograd would no longer add gradients in
    place, which costs more than to compute them.
    """
    return values if dim in (-1, values.dim() - 1) else values.movedim(dim, -1)


def flatten_units(
    values: Tensor, dim: int = -1, mask: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Lay activations out as items x units, with a weight for each item.

    Args:
        values: activations of any rank from 1, with the units along ``dim``; every other axis counts items, so the
            positions of a feature map are items under ``dim=1``.
        dim: the axis of the units.
        mask: booleans of the shape of ``values`` without ``dim``; items that are False weigh nothing, and their
            values may be anything, NaN too.
        weights: non-negative numbers of the same shape; a weight w counts an item w times.

    Returns:
        Items of shape (N, units), in float32 or better, and weights of shape (N,): ``None`` where all weigh the same.

    Raises:
        ValueError: ``dim`` is no axis of ``values`` or has length 0, or ``mask`` or ``weights`` have another shape than
            the items.
        TypeError: ``mask`` is not boolean.

    Example:
        >>> items, weights = flatten_units(torch.zeros(2, 5, 3, 3), dim=1)
        >>> items.shape, weights
        (torch.Size([18, 5]), None)
    """
    if not -values.dim() <= dim < values.dim():
        raise ValueError(f"dim={dim} is no axis of values of shape {tuple(values.shape)}; name the axis of the units")
    values = units_last(values, dim)
    if values.shape[-1] == 0:
        raise ValueError(f"values have no units along dim={dim}; give at least one")
    items = values.to(torch.promote_types(values.dtype, torch.float32))
    items = items if items.dim() == 2 else items.reshape(-1, values.shape[-1])
    for name, given in (("mask", mask), ("weights", weights)):
        if given is not None and given.shape != values.shape[:-1]:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)} but the items have shape {tuple(values.shape[:-1])}; "
                f"give one entry for each item (values without their units axis, dim={dim})"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; give booleans (mask > 0), or pass numbers as weights")
    if mask is None and weights is None:
        return items, None
    counts = items.new_ones(items.shape[0]) if weights is None else weights.reshape(-1).to(items.dtype)
    if mask is not None:
        counts = torch.where(mask.reshape(-1), counts, 0.0)
    # An item that does not count may hold NaN or infinity, which no factor of zero would remove.
    return torch.where(counts[:, None] > 0, items, 0.0), counts


def batch_mean(items: Tensor, weights: Tensor | None = None, group: Any = None) -> Tensor:
    """Return the mean of items (N, ...) over the global batch, by their weights (N,); 0 where there is no item."""
    if weights is None:
        total, count = items.sum(0), items.new_full((), items.shape[0])
    else:
        total, count = (items.movedim(0, -1) * weights).sum(-1), weights.sum()
    total, count = global_sums(total.reshape(-1), count, group)
    return total.reshape(items.shape[1:]) / torch.where(count > 0, count, 1.0)


def row_blocks(items: Tensor, width: int | None = None) -> Sequence[Tensor]:
    """Split items into rows whose intermediate results stay in a processor's cache; elsewhere, leave them whole.

    Args:
        items: items (N, D).
        width: number of units that count, where it is not that of ``items``.
    """
    if items.device.type != "cpu" or torch.compiler.is_compiling():
        return (items,)
    return items.split(max(1, _BLOCK // (width or items.shape[1])))
