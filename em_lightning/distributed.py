"""Sums over the ranks of a process group that are right forward and backward, and batch moments made of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flatten_units"]


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
        ValueError: ``dim`` is no axis of ``values``, or ``mask`` or ``weights`` have another shape than the items.
        TypeError: ``mask`` is not boolean.

    Example:
        >>> items, weights = flatten_units(torch.zeros(2, 5, 3, 3), dim=1)
        >>> items.shape, weights
        (torch.Size([18, 5]), None)
    """
    if not -values.dim() <= dim < values.dim():
        raise ValueError(f"dim={dim} is no axis of values of shape {tuple(values.shape)}; name the axis of the units")
    values = values.movedim(dim, -1)
    items = values.to(torch.promote_types(values.dtype, torch.float32)).reshape(-1, values.shape[-1])
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
