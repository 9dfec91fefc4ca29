"""Moments of a layer's units over the global batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_lightning.distributed.passes import free_energy_from, free_energy_of, read, total_of
from em_lightning.distributed.sums import flatten_units, global_sum, global_sums

__all__ = ["Moments", "batch_moments"]


class _Redundancy(torch.autograd.Function):
    r"""The sum of squares of :math:`C_{ij} = s_i s_j P_{ij}` off the diagonal, in few passes over the matrix.

    P and C are symmetric, so :math:`dL/dP = 2 C_{ij} s_i s_j` and :math:`dL/ds_i = 4 \sum_j C_{ij}^2 / s_i`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(products: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        scaled = _off_diagonal(products, scale)
        flat = scaled.flatten()
        return flat.dot(flat), scaled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        products, scale, scaled = ctx.saved_tensors
        if torch.is_grad_enabled():  # what was saved hides how it depends on the items
            scaled = _off_diagonal(products, scale)
        slope = scaled * ((2 * gradient * scale)[:, None] * scale)
        return slope, 4 * gradient * scaled.square().sum(1) / scale


def _off_diagonal(products: Tensor, scale: Tensor) -> Tensor:
    scaled = products * (scale[:, None] * scale)
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
        products: sums of products of deviations from the mean (D, D), where they were asked for beforehand.
        free_energy: free energies of this rank's items (N,), where they were asked for.
    """

    size: Tensor
    mean: Tensor
    variance: Tensor
    items: Tensor
    error: Tensor
    weights: Tensor | None
    group: Any = None
    products: Tensor | None = None
    free_energy: Tensor | None = None

    @property
    def std(self) -> Tensor:
        """Square root of the variance (D,), with a gradient of zero, not infinity, where a unit is constant."""
        return self.variance.clamp_min(torch.finfo(self.variance.dtype).tiny).sqrt()

    def _summed_products(self) -> Tensor:
        if self.products is not None:
            return self.products
        with torch.autocast(self.items.device.type, enabled=False):
            return global_sum(_local_products(self.items, self.mean, self.error, self.weights), self.group)

    def covariance(self) -> Tensor:
        """Return the unbiased covariance (D, D)."""
        return self._summed_products() / _freedom(self.size)

    def correlation(self, eps: float = 1e-8) -> Tensor:
        r"""Return the correlation (D, D), :math:`\mathrm{Cov}_{ij} / ((\sigma_i + \epsilon)(\sigma_j + \epsilon))`.

        A constant unit correlates with none, itself included.
        """
        scale = 1 / (self.std + eps)
        return self.covariance() * scale[:, None] * scale

    def redundancy(self, eps: float = 1e-8) -> Tensor:
        """Return the sum of squares of the correlation off its diagonal: a scalar."""
        if torch.compiler.is_compiling():  # dynamo fuses the plain formula by itself
            return self.correlation(eps).triu(1).square().sum() * 2
        scale = 1 / ((self.std + eps) * _freedom(self.size).sqrt())
        return _Redundancy.apply(self._summed_products(), scale)[0]


def _local_products(items: Tensor, mean: Tensor, error: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return read(items, mean, error, None, products=True).products
    centred = items - mean
    return centred.T @ (centred * weights[:, None])


def _freedom(count: Tensor) -> Tensor:
    # Fewer than two items have no spread: x / inf is 0 and carries a gradient of 0.
    return torch.where(count > 1, count - 1, torch.inf)


def batch_moments(
    values: Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    group: Any = None,
    *,
    products: bool = False,
    temperature: float | None = None,
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
        products: take the products for covariance, correlation and redundancy in the same pass as the variance.
        temperature: take free energies at this temperature in the same pass.

    Example:
        >>> moments = batch_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments.mean, moments.variance
        (tensor([2., 0.]), tensor([2., 0.]))
    """
    items, counts = flatten_units(values, dim, mask, weights)
    wide = torch.float32 if items.device.type == "mps" else torch.float64
    total = total_of(items, wide) if counts is None else (items * counts[:, None]).sum(0, dtype=wide)
    count = items.new_full((), items.shape[0], dtype=wide) if counts is None else counts.sum(dtype=wide)
    total, count = global_sums(total, count, group)
    exact = total / torch.where(count > 0, count, 1.0)
    mean, count = exact.to(items.dtype), count.to(items.dtype)
    error = (exact - mean).detach().to(items.dtype)
    with torch.autocast(items.device.type, enabled=False):
        if counts is None:
            reading = read(items, mean, error, temperature, products)
            squares, gram = reading.squares, reading.products
            free_energy = None if temperature is None else free_energy_from(reading, temperature)
        else:
            squares = ((items - mean).square() * counts[:, None]).sum(0)
            gram = _local_products(items, mean, error, counts) if products else items.new_empty(0)
            free_energy = None if temperature is None else free_energy_of(items, temperature)
    variance = global_sum(squares, group) / _freedom(count)
    summed = global_sum(gram, group) if products else None
    return Moments(count, mean, variance, items, error, counts, group, summed, free_energy)
