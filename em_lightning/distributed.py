"""Sums over the ranks of a process group that are right forward and backward, and batch moments made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "Moments",
    "batch_mean",
    "batch_moments",
    "flatten_units",
    "global_sum",
    "is_spread",
    "row_blocks",
    "times",
    "units_last",
]


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


def _global_sums(values: Tensor, scalar: Tensor, group: Any) -> tuple[Tensor, Tensor]:
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
    total, count = _global_sums(total.reshape(-1), count, group)
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


def times(fresh: Tensor, factor: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return ``fresh * factor + offset`` for a tensor that nobody else holds: in its place, unless autograd watches."""
    batched = torch._C._functorch.is_batchedtensor(factor) or torch._C._functorch.is_legacy_batchedtensor(factor)
    if torch.is_grad_enabled() or batched:
        return fresh * factor if offset is None else torch.addcmul(offset, fresh, factor)
    return fresh.mul_(factor) if offset is None else fresh.mul_(factor).add_(offset)


class _Squares(torch.autograd.Function):
    """The sum over items (N, D) of squared deviations from their mean: one pass, which saves no copy of the items.

    The gradient in the mean is left out, as that of such a sum is 0 over all ranks. The mean comes as a number and its
    rounding error, or that of a mean of 1,000 would be a part of each item's gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(items: Tensor, mean: Tensor, error: Tensor) -> Tensor:
        parts = [torch.square(block - mean).sum(0) for block in row_blocks(items)]
        return torch.stack(parts).sum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        items, mean, error = ctx.saved_tensors
        slope = 2 * gradient
        return times(items - mean, slope, -slope * error), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Tensor) -> Tensor:
        items, mean, error = ctx.saved_tensors
        return 2 * ((items - mean - error) * tangent).sum(0)


class _Gram(torch.autograd.Function):
    """The product of a matrix with itself, whose gradient is one product where autograd would take two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(items: Tensor) -> Tensor:
        return items.T @ items

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (items,) = ctx.saved_tensors
        return items @ (gradient + gradient.T)


class _Redundancy(torch.autograd.Function):
    r"""The sum of squares of :math:`C_{ij} = s_i s_j P_{ij}` off the diagonal, P being products over all ranks.

    P and C are symmetric, so :math:`dL/dP = 2 C_{ij} s_i s_j` and :math:`dL/ds_i = 4 \sum_j C_{ij}^2 / s_i`. All ranks
    hold the same C: of the gradient in P, only the factor that comes from outside has to be summed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(items: Tensor, mean: Tensor, error: Tensor, scale: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        scaled = _off_diagonal(items, mean, scale, group)
        flat = scaled.flatten()
        return flat.dot(flat), scaled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.group = inputs[4]
        ctx.save_for_backward(*inputs[:4], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None, Tensor, None]:
        items, mean, error, scale, scaled = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was saved hides how it depends on the items
            scaled = _off_diagonal(items, mean, scale, ctx.group)
        slope = scaled * ((4 * global_sum(gradient, ctx.group) * scale)[:, None] * scale)
        by_item = torch.addmm(-(error @ slope), items - mean, slope)
        return by_item, None, None, 4 * gradient * scaled.square().sum(1) / scale, None


def _off_diagonal(items: Tensor, mean: Tensor, scale: Tensor, group: Any) -> Tensor:
    scaled = global_sum(_Gram.apply(items - mean), group) * scale[:, None] * scale
    scaled.diagonal().zero_()
    return scaled


class Moments(NamedTuple):
    """Moments of the units over the global batch, and the local items that they were made of.

    Attributes:
        size: number of items in the global batch, or the sum of their weights: a scalar.
        mean: mean of each unit (D,).
        variance: unbiased variance of each unit (D,); 0 where there are fewer than two items.
        items: this rank's items (N, D).
        error: what rounding to the dtype of the items took from the mean (D,).
        weights: this rank's weights (N,), ``None`` where all weigh the same.
        group: the process group, the default one where ``None``.
    """

    size: Tensor
    mean: Tensor
    variance: Tensor
    items: Tensor
    error: Tensor
    weights: Tensor | None
    group: Any = None

    @property
    def std(self) -> Tensor:
        """Square root of the variance (D,), with a gradient of zero, not infinity, where a unit is constant."""
        return self.variance.clamp_min(torch.finfo(self.variance.dtype).tiny).sqrt()

    @property
    def centred(self) -> Tensor:
        """This rank's items less the mean (N, D)."""
        return self.items - self.mean

    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D)."""
        return self._products(self.centred)

    def correlation(self, eps: float = 1e-8) -> Tensor:
        r"""Return the correlation (D, D), :math:`\mathrm{Cov}_{ij} / ((\sigma_i + \epsilon)(\sigma_j + \epsilon))`.

        A constant unit correlates with none, itself included.
        """
        return self._products(self.centred / (self.std + eps))

    def _products(self, items: Tensor) -> Tensor:
        with torch.autocast(items.device.type, enabled=False):
            if _fused(self.weights):
                local = _Gram.apply(items)
            else:
                local = items.T @ (items if self.weights is None else items * self.weights[:, None])
        return global_sum(local, self.group) / _freedom(self.size)

    def redundancy(self, eps: float = 1e-8) -> Tensor:
        """Return the sum of squares of the correlation off its diagonal: a scalar."""
        if not _fused(self.weights):
            return self.correlation(eps).triu(1).square().sum() * 2
        with torch.autocast(self.items.device.type, enabled=False):
            scale = 1 / ((self.std + eps) * _freedom(self.size).sqrt())
            return _Redundancy.apply(self.items, self.mean, self.error, scale, self.group)[0]


def _fused(weights: Tensor | None) -> bool:
    return weights is None and not torch.compiler.is_compiling()  # dynamo fuses the plain formulas by itself


def _freedom(count: Tensor) -> Tensor:
    # Fewer than two items have no spread: x / inf is 0 and carries a gradient of 0.
    return torch.where(count > 1, count - 1, torch.inf)


def batch_moments(
    values: Tensor, dim: int = -1, mask: Tensor | None = None, weights: Tensor | None = None, group: Any = None
) -> Moments:
    r"""Return the moments of activations over the global batch, differentiable and the same on every rank.

    Two passes: the mean :math:`m = \sum_n w_n x_n / \sum_n w_n` first, and then
    :math:`\sum_n w_n (x_n - m)^2 / (\sum_n w_n - 1)`, as :math:`E[x^2] - m^2` cancels where the mean is large. The mean
    accumulates in float64 where the device has it, so a constant unit has a variance of exactly 0.

    Args:
        values: activations of any rank, with D units along ``dim``; every other axis counts items.
        dim: the axis of the units.
        mask: booleans of the shape of ``values`` without ``dim``; False items do not count.
        weights: non-negative numbers of the same shape; a weight w counts an item w times.
        group: the process group, the default one where ``None``. Ranks may hold different numbers of items.

    Example:
        >>> moments = batch_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments.mean, moments.variance
        (tensor([2., 0.]), tensor([2., 0.]))
    """
    items, counts = flatten_units(values, dim, mask, weights)
    wide = torch.float32 if items.device.type == "mps" else torch.float64
    weighted = items if counts is None else items * counts[:, None]
    total = torch.stack([block.sum(0, dtype=wide) for block in row_blocks(weighted)]).sum(0)
    count = items.new_full((), items.shape[0], dtype=wide) if counts is None else counts.sum(dtype=wide)
    total, count = _global_sums(total, count, group)
    exact = total / torch.where(count > 0, count, 1.0)
    mean, count = exact.to(items.dtype), count.to(items.dtype)
    error = (exact - mean).detach().to(items.dtype)
    if _fused(counts):
        squares = _Squares.apply(items, mean, error)
    else:
        squares = (items - mean).square()
        squares = (squares if counts is None else squares * counts[:, None]).sum(0)
    variance = global_sum(squares, group) / _freedom(count)
    return Moments(count, mean, variance, items, error, counts, group)
