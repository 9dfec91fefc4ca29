"""Sums over the ranks of a process group, activations as items x units, and moments of the units of a global batch."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "Moments",
    "accumulation_dtype",
    "batch_mean",
    "batch_moments",
    "flatten_units",
    "global_sum",
    "is_distributed",
]


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


class Moments(NamedTuple):
    """Moments of D units over the global batch.

    Attributes:
        size: number of items, or sum of weights, in the global batch: a scalar.
        mean: mean of each unit (D,).
        variance: unbiased variance of each unit (D,); 0 if ``size`` is at most 1.
        deviations: this rank's items minus the mean (N, D).
        weights: this rank's weights (N,), or ``None`` for equal weights.
    """

    size: Tensor
    mean: Tensor
    variance: Tensor
    deviations: Tensor
    weights: Tensor | None

    def std(self) -> Tensor:
        """Return the square root of the variance (D,), with gradient 0 for constant units."""
        return self.variance.clamp_min(torch.finfo(self.variance.dtype).tiny).sqrt()

    def covariance(self) -> Tensor:
        """Return the unbiased covariance, shape (D, D)."""
        return self._sum_of_products(self.deviations) / _degrees_of_freedom(self.size)

    def redundancy(self, eps: float = 1e-8) -> Tensor:
        r"""Return the sum of squared correlations of different units: a scalar.

        The correlations are :math:`\mathrm{Cov}_{ij} / ((\sigma_i + \epsilon)(\sigma_j + \epsilon))`.
        """
        std = self.std() + eps
        standardized = self.deviations * (1 / (std * _degrees_of_freedom(self.size).sqrt()))
        diagonal = self.variance / std.square()  # of the matrix of correlations: below 1 because of eps
        num_items, num_units = standardized.shape
        if self.weights is not None or num_items >= num_units or is_distributed():
            return (self._sum_of_products(standardized) - torch.diag(diagonal)).square().sum()
        # For standardized items Z (N, D), Z Z^T is smaller than Z^T Z and has the same Frobenius norm.
        with torch.autocast(standardized.device.type, enabled=False):
            similarity = standardized @ standardized.T
        return similarity.square().sum() - diagonal.square().sum()

    def _sum_of_products(self, items: Tensor) -> Tensor:
        with torch.autocast(items.device.type, enabled=False):
            weighted = items if self.weights is None else items * self.weights[:, None]
            return global_sum(weighted.T @ items)


def _degrees_of_freedom(size: Tensor) -> Tensor:
    # For a size of at most 1, division by infinity makes the variance and its gradient 0.
    return torch.where(size > 1, size - 1, torch.inf)


def batch_moments(values: Tensor, dim: int = -1, mask: Tensor | None = None, weights: Tensor | None = None) -> Moments:
    r"""Return differentiable moments of the global batch; size, mean and variance are equal on all ranks.

    Two passes: the mean :math:`m = \sum_n w_n x_n / \sum_n w_n`, then the variance
    :math:`\sum_n w_n (x_n - m)^2 / (\sum_n w_n - 1)`, because :math:`E[x^2] - m^2` cancels if the mean is large. The
    mean is in float64 on devices that have it, so constant float32 units have variance 0. See also flatten_units.

    Warns:
        UserWarning: the batch of a single process has fewer than two items, where masked ones count too.
    """
    items, weights = flatten_units(values, dim, mask, weights)
    if len(items) < 2 and not is_distributed() and not torch.compiler.is_compiling():
        warnings.warn(
            f"a batch of {len(items)} item(s) has variance 0 without gradient: terms such as -log(variance + eps) "
            f"are far from those of other batches; drop such batches (drop_last=True)",
            stacklevel=3,
        )
    dtype = accumulation_dtype(items)
    counts = items.new_ones(1).expand(len(items)) if weights is None else weights
    weighted = items if weights is None else items * weights[:, None]
    size = global_sum(counts.sum(dtype=dtype))
    mean = (global_sum(weighted.sum(0, dtype=dtype)) / size.clamp_min(torch.finfo(dtype).tiny)).to(items.dtype)
    size = size.to(items.dtype)
    deviations = items - mean
    squares = deviations.square() if weights is None else deviations.square() * weights[:, None]
    variance = global_sum(squares.sum(0)) / _degrees_of_freedom(size)
    return Moments(size, mean, variance, deviations, weights)


def batch_mean(items: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the weighted mean (...) of items (N, ...) over the global batch; 0 if it has no items."""
    weights = items.new_ones(len(items)) if weights is None else weights
    total = global_sum((items.movedim(0, -1) * weights).sum(-1))
    return total / global_sum(weights.sum()).clamp_min(torch.finfo(weights.dtype).tiny)
