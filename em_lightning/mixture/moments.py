"""The two passes over points that EM consists of, as functions that keep nothing of the size (N, K).

Both form ``log pi_k + log N(x_n | mu_k, Sigma_k) = theta_k . phi(x_n)`` block by block and form it again in the
backward pass, so memory does not grow with the number of iterations, and a block's responsibilities stay in cache.

Products are taken in float32 while that is accurate and in float64, at about twice the cost, where it is not: the
terms of ``theta . phi`` of a component that is thin beside its cloud are large and cancel. How large is known before
the pass, since ``sum_f |theta_f phi_f(x)|`` is at most ``|theta| . phi(e)`` with ``e`` the largest coordinates of the
cloud, and the choice is made for each cloud.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.covariance import Structure

# Numbers a block: its responsibilities and its features fit into the second-level cache of a core.
_BLOCK = 2**18
# On other devices a block has to fill the device; work spaces stay below 64 MiB.
_DEVICE_BLOCK = 2**21
# Float32 is accurate while no term of a log-density can exceed this: its rounding is then about 1e-3 at the very worst,
# and far less in a mean over points (docs/results/operator.md).
_LARGEST_TERM = 1e4
# Features of that many bytes are kept between iterations.
_KEPT = 2**25


class Ready(NamedTuple):
    """What passes over the same points have in common: largest coordinates (B, D) and features (B, F, N) if small."""

    extent: Tensor
    features: Tensor | None


def get_ready(points: Tensor, structure: Structure) -> Ready:
    """Return what passes over points (B, D, N) share; features only where they take little memory."""
    points = points.detach()
    size = structure.num_moments(points.shape[1]) * points[:, 0].numel() * points.element_size()
    low, high = points.aminmax(dim=2)
    return Ready(torch.maximum(-low, high), structure.features(points, points.dtype) if size <= _KEPT else None)


def accumulate(
    points: Tensor,
    weights: Tensor | None,
    theta: Tensor,
    structure: Structure,
    precision: torch.dtype | None = None,
    ready: Ready | None = None,
) -> Tensor:
    r"""Return the moments ``sum_n w_n r_nk phi(x_n)`` under the responsibilities of ``theta``.

    Args:
        points: (B, D, N), centred.
        weights: (B, N).
        theta: (B, K, F), whose type the moments (B, K, F) have.
        structure: whose features phi are.
        precision: of the products; chosen for each cloud unless given.
        ready: what passes over the same points share.
    """
    ready = get_ready(points, structure) if ready is None else ready
    return _Moments.apply(points, weights, theta, _Plan.of(points, theta, structure, precision, ready))


def log_density(points: Tensor, theta: Tensor, structure: Structure, precision: torch.dtype | None = None) -> Tensor:
    """Return ``log sum_k exp(theta_k . phi(x_n))`` (B, N) of centred points (B, D, N)."""
    plan = _Plan.of(points, theta, structure, precision, get_ready(points, structure))
    return _LogDensity.apply(points, theta, plan)


@torch.no_grad()
def largest_term(theta: Tensor, extent: Tensor, structure: Structure) -> Tensor:
    """Return a bound (B,) of the terms of ``theta . phi(x)`` for points within the extent (B, D)."""
    return torch.bmm(theta.abs(), structure.features(extent.unsqueeze(-1), theta.dtype)).amax((1, 2))


def lost_digits(before: Tensor, after: Tensor, points: Tensor, structure: Structure, ready: Ready | None) -> bool:
    """Return whether an M-step made components so thin that float32 moments do not determine them.

    The E-step before it saw components for which float32 was enough. A loop that comes here in small steps has
    changed to float64 on its way.

    Args:
        before: natural parameters (B, K, F) of the E-step.
        after: natural parameters that the M-step led to.
        points: (B, D, N).
        structure: the covariance structure.
        ready: what passes over the points share.
    """
    if points.dtype == before.dtype:
        return False
    extent = (get_ready(points, structure) if ready is None else ready).extent
    narrow = largest_term(before, extent, structure) <= _LARGEST_TERM
    # Written so that NaN counts as thin.
    return bool((narrow & ~(largest_term(after, extent, structure) <= 10.0 * _LARGEST_TERM)).any())


class _Block(NamedTuple):
    clouds: slice
    rows: slice
    precision: torch.dtype


class _Plan(NamedTuple):
    structure: Structure
    features: Tensor | None
    blocks: list[_Block]

    @classmethod
    def of(
        cls, points: Tensor, theta: Tensor, structure: Structure, precision: torch.dtype | None, ready: Ready
    ) -> _Plan:
        runs = [(0, points.shape[0], precision or torch.promote_types(points.dtype, torch.float32))]
        if precision is None and runs[0][2] != theta.dtype:
            thin = ~(largest_term(theta, ready.extent, structure) <= _LARGEST_TERM)
            runs = [
                (first, last, theta.dtype if is_thin else runs[0][2]) for first, last, is_thin in _runs(thin.tolist())
            ]
        return cls(structure, ready.features, list(_blocks(points, theta, runs)))

    def features_of(self, points: Tensor, block: _Block) -> Tensor:
        """Return the features of a block of points in the block's precision."""
        if self.features is not None and self.features.dtype == block.precision:
            return self.features[block.clouds, :, block.rows]
        return self.structure.features(points[block.clouds, :, block.rows], block.precision)


def _runs(flags: list[bool]) -> Iterator[tuple[int, int, bool]]:
    first = 0
    for last in range(1, len(flags) + 1):
        if last == len(flags) or flags[last] != flags[first]:
            yield first, last, flags[first]
            first = last


def _blocks(points: Tensor, theta: Tensor, runs: list[tuple[int, int, torch.dtype]]) -> Iterator[_Block]:
    items, size = points.shape[2], max(theta.shape[1:])
    numbers = _BLOCK if points.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(min(items, numbers // size), 1)
    clouds = max(numbers // (size * rows), 1)
    for begin, end, precision in runs:
        for first in range(begin, end, clouds):
            for row in range(0, items, rows):
                yield _Block(slice(first, min(first + clouds, end)), slice(row, min(row + rows, items)), precision)


class _Space:
    """Work spaces that blocks of one pass share, by name and type."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return uninitialized memory of a shape, the same at each call of a name."""
        size = shape[0] * shape[1] * shape[2]
        flat = self.flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            flat = self.flat[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a batched product in the type of the points."""
        shape = (left.shape[0], left.shape[1], right.shape[2])
        out = torch.bmm(left, right, out=self.take("product" if left.dtype != dtype else name, left.dtype, shape))
        return self.cast(name, out, dtype)

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor in another type."""
        return tensor if tensor.dtype == dtype else self.take(name, dtype, tuple(tensor.shape)).copy_(tensor)

    def softmax_(self, joint: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Turn logits (C, K, n) into ``scale * softmax`` in place; return also the maximum and the sum (C, 1, n)."""
        shape = (joint.shape[0], 1, joint.shape[2])
        largest = torch.amax(joint, 1, keepdim=True, out=self.take("largest", joint.dtype, shape))
        # Numbers below the normal range cost a hundred times the others; a share this small counts for nothing.
        joint.sub_(largest).clamp_(min=0.7 * math.log(torch.finfo(joint.dtype).tiny)).exp_()
        total = torch.sum(joint, 1, keepdim=True, out=self.take("total", joint.dtype, shape))
        share = torch.reciprocal(total, out=self.take("share", joint.dtype, shape))
        joint.mul_(share if scale is None else share.mul_(scale))
        return joint, largest, total


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, weights: Tensor | None, theta: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(points, weights, theta)
        ctx.plan = plan
        moments, space, narrow = torch.zeros_like(theta), _Space(theta.device), theta.to(points.dtype)
        for block in plan.blocks:
            clouds, rows, precision = block
            features = plan.features_of(points, block)
            natural = narrow[clouds] if narrow.dtype == precision else theta[clouds].to(precision)
            joint = space.product("joint", natural, features, points.dtype)
            weight = None if weights is None else weights[clouds, None, rows]
            responsibilities, _, _ = space.softmax_(joint, weight)
            moments[clouds] += torch.bmm(space.cast("product", responsibilities, precision), features.mT)
        return moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        points, weights, theta = ctx.saved_tensors
        plan, dtype, space = ctx.plan, points.dtype, _Space(theta.device)
        need_points, need_weights, need_theta = ctx.needs_input_grad[:3]
        grad_points = torch.zeros_like(points) if need_points else None
        grad_weights = torch.zeros_like(weights) if need_weights else None
        grad_theta = torch.zeros_like(theta) if need_theta else None
        for block in plan.blocks:
            clouds, rows, precision = block
            features = plan.features_of(points, block)
            natural, outer = theta[clouds].to(precision), grad[clouds].to(precision)
            responsibilities, _, _ = space.softmax_(space.product("joint", natural, features, dtype))
            reach = space.product("reach", outer, features, dtype).mul_(responsibilities)
            total = reach.sum(1, keepdim=True)
            if grad_weights is not None:
                grad_weights[clouds, rows] = total.squeeze(1)
            # d r / d joint: r_k (delta_kj - r_j)
            slope = reach.addcmul_(responsibilities, total, value=-1)
            if weights is not None:
                slope.mul_(weights[clouds, None, rows])
            slope = space.cast("slope", slope, precision)
            if grad_theta is not None:
                grad_theta[clouds] += torch.bmm(slope, features.mT)
            if grad_points is not None:
                if weights is not None:
                    responsibilities.mul_(weights[clouds, None, rows])
                back = torch.bmm(natural.mT, slope)
                back.baddbmm_(outer.mT, space.cast("product", responsibilities, precision))
                grad_points[clouds, :, rows] = plan.structure.pull_back(points[clouds, :, rows], back).to(dtype)
        return grad_points, grad_weights, grad_theta, None


class _LogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, theta: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(points, theta)
        ctx.plan = plan
        density, space = torch.empty_like(points[:, 0]), _Space(theta.device)
        for block in plan.blocks:
            clouds, rows, precision = block
            natural = theta[clouds].to(precision)
            joint = space.product("joint", natural, plan.features_of(points, block), points.dtype)
            _, largest, total = space.softmax_(joint)
            density[clouds, rows] = total.log_().add_(largest).squeeze(1)
        return density

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        points, theta = ctx.saved_tensors
        plan, dtype, space = ctx.plan, points.dtype, _Space(theta.device)
        grad_points = torch.zeros_like(points) if ctx.needs_input_grad[0] else None
        grad_theta = torch.zeros_like(theta) if ctx.needs_input_grad[1] else None
        for block in plan.blocks:
            clouds, rows, precision = block
            features = plan.features_of(points, block)
            natural = theta[clouds].to(precision)
            # The gradient of logsumexp is the responsibility: backpropagation is the E-step.
            joint = space.product("joint", natural, features, dtype)
            slope, _, _ = space.softmax_(joint, grad[clouds, None, rows])
            slope = space.cast("product", slope, precision)
            if grad_theta is not None:
                grad_theta[clouds] += torch.bmm(slope, features.mT)
            if grad_points is not None:
                back = torch.bmm(natural.mT, slope)
                grad_points[clouds, :, rows] = plan.structure.pull_back(points[clouds, :, rows], back).to(dtype)
        return grad_points, grad_theta, None
