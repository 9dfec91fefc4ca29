"""Differences and squared Euclidean or Mahalanobis distances between items and centers, and unit vectors."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from em_lightning.checks import is_exporting


def pairwise(x: Tensor, centers: Tensor) -> Tensor:
    """Return the differences x - centers (..., N, K, D) of x (..., N, D) and centers (..., K, D)."""
    return x.unsqueeze(-2) - centers.unsqueeze(-3)


def unit_vectors(x: Tensor, dim: int = -1) -> Tensor:
    """Return x divided by its norm along ``dim``; 0 for 0. Dividing by the largest entry first avoids overflow."""
    largest = x.detach().abs().amax(dim, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    square = x.square().sum(dim, keepdim=True)
    return x / torch.where(square > 0, square, 1).sqrt()


def squared_distance(x: Tensor, centers: Tensor, factor: Tensor | None = None, max_differences: int = 2**20) -> Tensor:
    r"""Return squared Euclidean distances (..., N, K), or Mahalanobis distances of covariance :math:`L L^\top`.

    .. math:: \lVert L^{-1} (x_n - \mu_k) \rVert^2

    Values and gradients are sums of differences: expanded squares would cancel far from the origin. Derivatives of
    every order exist, also at distance 0. Above ``max_differences``, forward mode raises NotImplementedError, and
    second derivatives have round-off in proportion to the distances from the median center, not to the differences.

    Args:
        x: items (..., N, D).
        centers: centers (..., K, D).
        factor: lower triangular :math:`L` (D, D), the identity by default.
        max_differences: the most differences that are stored, N K D for each leading index; by default 4 MiB in
            float32, chosen for exact derivatives: from 2 MiB on, the alternative takes less than half the time.
    """
    leading = torch.broadcast_shapes(x.shape[:-2], centers.shape[:-2])
    few = is_exporting() or math.prod(leading) * x.shape[-2] * centers.shape[-2] * x.shape[-1] <= max_differences
    if factor is not None and not few:
        # Products with L^-1 add features, which loses digits far from the origin: subtract the median center first.
        origin = centers.detach().median(-2, keepdim=True).values
        x, centers, factor = _whiten(factor, x - origin), _whiten(factor, centers - origin), None
    # Also store them for one feature, which gives few, for compilers, which fuse them, and for deterministic gradients.
    deterministic = x.is_cuda and torch.are_deterministic_algorithms_enabled()  # the backward pass of cdist is not
    if few or x.shape[-1] == 1 or torch.compiler.is_compiling() or deterministic:
        differences = pairwise(x, centers)
        return (differences if factor is None else _whiten(factor, differences)).square().sum(-1)
    x, centers = (value.expand(*leading, *value.shape[-2:]).contiguous() for value in (x, centers))
    return _SquaredDistance.apply(x, centers)


def _whiten(factor: Tensor, rows: Tensor) -> Tensor:
    """Return ``L^-1 v`` for the rows v of a tensor (..., D) and a factor L (D, D)."""
    return torch.linalg.solve_triangular(factor, rows.flatten(0, -2).mT, upper=False).mT.reshape(rows.shape)


# Distances from differences, because expanded squares cancel.
_distance = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


class _SquaredDistance(torch.autograd.Function):
    """The square of ``torch.cdist``, with the second derivatives that cdist lacks and finite gradients at 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, centers: Tensor) -> Tensor:
        return _distance(x, centers).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums of w_nk (x_n - c_k) over k and of w_nk (c_k - x_n) over n; w is twice the incoming gradient."""
        (x, centers), weights = ctx.saved_tensors, 2 * grads[0]
        if torch.is_grad_enabled():
            # Matrix products have derivatives of every order. Subtract the median center to limit their cancellation.
            origin = centers.detach().median(-2, keepdim=True).values
            x, centers = x - origin, centers - origin
            by_x = weights.sum(-1, keepdim=True) * x - weights @ centers
            return by_x, weights.sum(-2).unsqueeze(-1) * centers - weights.mT @ x
        # The derivative of a distance is the difference divided by the distance.
        distance, pullback = torch.func.vjp(_distance, x, centers)  # type: ignore[misc]
        return pullback(weights * distance)
