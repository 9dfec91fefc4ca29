"""The two passes over points that EM consists of, as functions that keep nothing of the size (N, K).

Both form ``log pi_k + log N(x_n | mu_k, Sigma_k) = theta_k . phi(x_n)`` block by block and form it again in the
backward pass, so memory does not grow with the number of iterations, and a block's responsibilities stay in cache.
Products are taken in ``precision``: in float32, features of a component thinner than about a thirtieth of the cloud
lose their digits in the square; in float64 they do not, at about twice the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from em_lightning.mixture.covariance import Structure

# Responsibilities a block: two work spaces of that size fit into the second-level cache of a core.
_BLOCK = 2**18


def accumulate(
    points: Tensor, weights: Tensor | None, theta: Tensor, structure: Structure, precision: torch.dtype
) -> Tensor:
    r"""Return the moments ``sum_n w_n r_nk phi(x_n)`` under the responsibilities of ``theta``.

    Shape:
        - points: (B, D, N), centred; weights: (B, N); theta: (B, K, F); output: (B, K, F) in theta's type.
    """
    return _Moments.apply(points, weights, theta, structure, precision)


def log_density(points: Tensor, theta: Tensor, structure: Structure, precision: torch.dtype) -> Tensor:
    """Return ``log sum_k exp(theta_k . phi(x_n))`` (B, N) of centred points (B, D, N)."""
    return _LogDensity.apply(points, theta, structure, precision)


def _blocks(sets: int, items: int, components: int) -> Iterator[tuple[slice, slice]]:
    rows = min(items, max(_BLOCK // components, 1))
    clouds = max(_BLOCK // (components * max(rows, 1)), 1)
    for first in range(0, sets, clouds):
        for row in range(0, items, max(rows, 1)):
            yield slice(first, first + clouds), slice(row, row + rows)


def _joint(points: Tensor, theta: Tensor, structure: Structure, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    features = structure.features(points, precision)
    return features, torch.bmm(theta.to(precision), features).to(points.dtype)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, points: Tensor, weights: Tensor | None, theta: Tensor, structure: Structure, precision: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(points, weights, theta)
        ctx.structure, ctx.precision = structure, precision
        moments = torch.zeros_like(theta)
        for clouds, rows in _blocks(points.shape[0], points.shape[2], theta.shape[1]):
            features, joint = _joint(points[clouds, :, rows], theta[clouds], structure, precision)
            responsibilities = joint.softmax(1)
            if weights is not None:
                responsibilities *= weights[clouds, None, rows]
            moments[clouds] += torch.bmm(responsibilities.to(precision), features.mT).to(theta.dtype)
        return moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        points, weights, theta = ctx.saved_tensors
        need_points, need_weights, need_theta = ctx.needs_input_grad[:3]
        grad_points = torch.zeros_like(points) if need_points else None
        grad_weights = torch.zeros_like(weights) if need_weights else None
        grad_theta = torch.zeros_like(theta) if need_theta else None
        for clouds, rows in _blocks(points.shape[0], points.shape[2], theta.shape[1]):
            x = points[clouds, :, rows]
            features, joint = _joint(x, theta[clouds], ctx.structure, ctx.precision)
            responsibilities = joint.softmax(1)
            reach = torch.bmm(grad[clouds].to(ctx.precision), features).to(x.dtype)
            if grad_weights is not None:
                grad_weights[clouds, rows] = (responsibilities * reach).sum(1)
            weighted = responsibilities
            if weights is not None:
                reach *= weights[clouds, None, rows]
                weighted = responsibilities * weights[clouds, None, rows]
            # d r / d joint: r_k (delta_kj - r_j)
            inner = torch.mul(responsibilities, reach)
            slope = torch.addcmul(inner, responsibilities, inner.sum(1, keepdim=True), value=-1).to(ctx.precision)
            if grad_theta is not None:
                grad_theta[clouds] += torch.bmm(slope, features.mT).to(theta.dtype)
            if grad_points is not None:
                back = torch.bmm(grad[clouds].mT.to(ctx.precision), weighted.to(ctx.precision))
                back = back + torch.bmm(theta[clouds].mT.to(ctx.precision), slope)
                grad_points[clouds, :, rows] = ctx.structure.pull_back(x, back).to(x.dtype)
        return grad_points, grad_weights, grad_theta, None, None


class _LogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, theta: Tensor, structure: Structure, precision: torch.dtype) -> Tensor:
        ctx.save_for_backward(points, theta)
        ctx.structure, ctx.precision = structure, precision
        density = torch.empty_like(points[:, 0])
        for clouds, rows in _blocks(points.shape[0], points.shape[2], theta.shape[1]):
            _, joint = _joint(points[clouds, :, rows], theta[clouds], structure, precision)
            density[clouds, rows] = joint.logsumexp(1)
        return density

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        points, theta = ctx.saved_tensors
        grad_points = torch.zeros_like(points) if ctx.needs_input_grad[0] else None
        grad_theta = torch.zeros_like(theta) if ctx.needs_input_grad[1] else None
        for clouds, rows in _blocks(points.shape[0], points.shape[2], theta.shape[1]):
            x = points[clouds, :, rows]
            features, joint = _joint(x, theta[clouds], ctx.structure, ctx.precision)
            # The gradient of logsumexp is the responsibility: backpropagation is the E-step.
            slope = (joint.softmax(1) * grad[clouds, None, rows]).to(ctx.precision)
            if grad_theta is not None:
                grad_theta[clouds] += torch.bmm(slope, features.mT).to(theta.dtype)
            if grad_points is not None:
                back = torch.bmm(theta[clouds].mT.to(ctx.precision), slope)
                grad_points[clouds, :, rows] = ctx.structure.pull_back(x, back).to(x.dtype)
        return grad_points, grad_theta, None, None
