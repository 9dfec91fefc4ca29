"""Sums over the ranks of a process group, and the layout of activations as items x units."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _GlobalSum.apply(gradient)


def global_sum(values: Tensor) -> Tensor:
    r"""Sum a tensor elementwise over the ranks; without a process group, return it unchanged.

    The backward pass sums over the ranks as well. Let :math:`S = \sum_r s_r(\theta)` be the sum over the ranks r, and
    let each of the W ranks compute the whole loss :math:`L(S)`. Then :math:`s_r` receives the gradient
    :math:`W \, dL/dS`. The mean over ranks, which data-parallel training takes, is the gradient of the whole batch:

    .. math:: \frac{1}{W} \sum_r W \frac{dL}{dS} \frac{ds_r}{d\theta} = \frac{dL}{d\theta}.

    Must be called on all ranks, with tensors of the same shape and dtype.
    """
    return _GlobalSum.apply(values) if is_distributed() else values


def is_distributed() -> bool:
    """Return whether the default process group has more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def accumulation_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype for sums over items: float64, or float32 on MPS devices, which have no float64."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def flatten_units(
    values: Tensor, dim: int = -1, mask: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Reshape activations to items (N, D), and combine mask and weights into one weight per item (N,).

    Items are in float32 or float64, zero where the weight is 0. Without mask and weights, the second result is None.

    Args:
        values: activations with D units along ``dim``; all other axes are flattened into items.
        dim: axis of the units.
        mask: booleans of the shape of ``values`` without ``dim``. False items have weight 0 and may be NaN.
        weights: non-negative numbers of the same shape; an item of weight w counts w times.

    Raises:
        ValueError: ``dim`` is not an axis of ``values`` or has length 0; ``mask`` or ``weights`` has the wrong shape.
        TypeError: ``mask`` is not boolean.
    """
    if not -values.dim() <= dim < values.dim() or values.shape[dim] == 0:
        raise ValueError(f"values of shape {tuple(values.shape)} must have at least one unit along dim={dim}")
    values = values.movedim(dim, -1)
    shape = tuple(values.shape[:-1])
    for name, value in (("mask", mask), ("weights", weights)):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} of shape {tuple(value.shape)} must have shape {shape}, without dim={dim}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask of dtype {mask.dtype} must be boolean; pass numbers as weights")
    items = values.to(torch.promote_types(values.dtype, torch.float32)).reshape(-1, values.shape[-1])
    if mask is None and weights is None:
        return items, None
    weights = items.new_ones(items.shape[0]) if weights is None else weights.reshape(-1).to(items.dtype)
    if mask is not None:
        weights = torch.where(mask.reshape(-1), weights, 0.0)
    # NaN and infinity times a weight of 0 would be NaN.
    return torch.where(weights[:, None] > 0, items, 0.0), weights
