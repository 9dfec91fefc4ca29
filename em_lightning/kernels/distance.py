"""Squared Euclidean distances that keep every digit in the memory of their result."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_FEW = 2**20  # differences: 4 MiB in float32, about what a cache holds


def pairwise(x: Tensor, centers: Tensor) -> Tensor:
    """Return the differences x - centers (..., N, K, D) of x (..., N, D) and centers (..., K, D)."""
    return x.unsqueeze(-2) - centers.unsqueeze(-3)


def few_differences(x: Tensor, centers: Tensor) -> bool:
    """Return whether the differences x - centers are so few that keeping them costs little."""
    leading = torch.broadcast_shapes(x.shape[:-2], centers.shape[:-2])
    return math.prod(leading) * x.shape[-2] * centers.shape[-2] * x.shape[-1] <= _FEW


def squared_distance(x: Tensor, centers: Tensor) -> Tensor:
    """Return squared Euclidean distances (..., N, K) of x (..., N, D) and centers (..., K, D).

    Values and gradients are sums of differences, not an expanded square, so none is lost to cancellation however far
    from zero the items lie. Where the differences would be many, they are not kept: memory is that of the result,
    forward and backward, at a fraction of the time. Derivatives of every order exist, also at distance 0; forward-mode
    ones (``torch.func.jvp``, ``hessian``) only where the differences are few, and a NotImplementedError elsewhere.

    Example:
        >>> squared_distance(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        tensor([[25.]])
    """
    # A compiler fuses the differences away. PyTorch's backward of cdist adds atomically on CUDA, which deterministic
    # algorithms forbid.
    if torch.compiler.is_compiling() or (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return pairwise(x, centers).square().sum(-1)
    if x.shape[-1] == 1 or few_differences(x, centers):
        return pairwise(x, centers).square().sum(-1)
    leading = torch.broadcast_shapes(x.shape[:-2], centers.shape[:-2])
    x, centers = (value.expand(*leading, *value.shape[-2:]).contiguous() for value in (x, centers))
    return _SquaredDistance.apply(x, centers)


def _distance(x: Tensor, centers: Tensor) -> Tensor:
    return torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist")


class _SquaredDistance(torch.autograd.Function):
    """The squared distances; cdist itself has no second derivative, and an infinite slope of its root at 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, centers: Tensor) -> Tensor:
        return _distance(x, centers).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, centers = ctx.saved_tensors
        return 2 * _WeightedDifference.apply(grads[0], x, centers), 2 * _WeightedDifference.apply(
            grads[0].mT, centers, x
        )


class _WeightedDifference(torch.autograd.Function):
    """The sum over k of w_nk (x_n - c_k), (..., N, D), from differences but without keeping them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, x: Tensor, centers: Tensor) -> Tensor:
        distance = _distance(x, centers)
        # The derivative of a distance is the difference over it.
        return torch.ops.aten._cdist_backward((weights * distance).contiguous(), x, centers, 2.0, distance)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, x, centers = ctx.saved_tensors
        (grad,) = grads
        by_weights = (grad * x).sum(-1, keepdim=True) - grad @ centers.mT
        return by_weights, grad * weights.sum(-1, keepdim=True), -(weights.mT @ grad)
