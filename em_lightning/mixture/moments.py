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

from em_lightning.mixture.cloud import Cloud, Ready, centred
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


def get_ready(cloud: Cloud, structure: Structure) -> Ready:
    """Return what passes over the points of clouds share; features only where they take little memory."""
    points = cloud.points.detach()
    size = structure.num_moments(points.shape[1]) * points[:, 0].numel() * points.element_size()
    low, high = points.aminmax(dim=2)
    if cloud.shift is not None:
        low, high = low - cloud.shift.detach(), high - cloud.shift.detach()
    extent = torch.maximum(-low, high).to(points.dtype)
    return Ready(extent, structure.features(cloud.part().detach(), points.dtype) if size <= _KEPT else None)


def accumulate(
    cloud: Cloud, theta: Tensor, structure: Structure, precision: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the moments under the responsibilities of ``theta`` (B, K, F), and the log-likelihood.

    The moments are ``sum_n w_n r_nk phi(x_n)``, (B, K, F) in the type of ``theta``; the log-likelihood is
    ``sum_n w_n log sum_k exp(theta_k . phi(x_n))``, (B,), and has no gradient.

    Args:
        cloud: the point sets.
        theta: (B, K, F), natural parameters.
        structure: whose features phi are.
        precision: of the products; chosen for each cloud unless given.
    """
    plan = _Plan.of(cloud, theta, structure, precision)
    return _Moments.apply(cloud.points, cloud.shift, cloud.weights, theta, plan)


def log_density(cloud: Cloud, theta: Tensor, structure: Structure, precision: torch.dtype | None = None) -> Tensor:
    """Return ``log sum_k exp(theta_k . phi(x_n))`` (B, N) of the points of clouds."""
    return _LogDensity.apply(cloud.points, cloud.shift, theta, _Plan.of(cloud, theta, structure, precision))


@torch.no_grad()
def largest_term(theta: Tensor, extent: Tensor, structure: Structure) -> Tensor:
    """Return a bound (B,) of the terms of ``theta . phi(x)`` for points within the extent (B, D)."""
    return torch.bmm(theta.abs(), structure.features(extent.unsqueeze(-1), theta.dtype)).amax((1, 2))


def lost_digits(before: Tensor, after: Tensor, cloud: Cloud, structure: Structure) -> bool:
    """Return whether an M-step made components so thin that float32 moments do not determine them.

    The E-step before it saw components for which float32 was enough. A loop that comes here in small steps has
    changed to float64 on its way.

    Args:
        before: natural parameters (B, K, F) of the E-step.
        after: natural parameters that the M-step led to.
        cloud: the point sets.
        structure: the covariance structure.
    """
    if cloud.points.dtype == before.dtype:
        return False
    extent = (get_ready(cloud, structure) if cloud.ready is None else cloud.ready).extent
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
    def of(cls, cloud: Cloud, theta: Tensor, structure: Structure, precision: torch.dtype | None) -> _Plan:
        ready = get_ready(cloud, structure) if cloud.ready is None else cloud.ready
        runs = [(0, len(theta), precision or torch.promote_types(cloud.points.dtype, torch.float32))]
        if precision is None and runs[0][2] != theta.dtype:
            thin = ~(largest_term(theta, ready.extent, structure) <= _LARGEST_TERM)
            runs = [
                (first, last, theta.dtype if is_thin else runs[0][2]) for first, last, is_thin in _runs(thin.tolist())
            ]
        return cls(structure, ready.features, list(_blocks(cloud.points, theta, runs)))

    def features_of(self, points: Tensor, shift: Tensor | None, block: _Block) -> Tensor:
        """Return the features of a block of points in the block's precision."""
        if self.features is not None and self.features.dtype == block.precision:
            return self.features[block.clouds, :, block.rows]
        return self.structure.features(centred(points, shift, block.clouds, block.rows), block.precision)


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
    def forward(
        ctx: Any, points: Tensor, shift: Tensor | None, weights: Tensor | None, theta: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(points, shift, weights, theta)
        ctx.plan = plan
        moments, space, narrow = torch.zeros_like(theta), _Space(theta.device), theta.to(points.dtype)
        likelihood = theta.new_zeros(len(theta))
        for block in plan.blocks:
            clouds, rows, precision = block
            features = plan.features_of(points, shift, block)
            natural = narrow[clouds] if narrow.dtype == precision else theta[clouds].to(precision)
            joint = space.product("joint", natural, features, points.dtype)
            weight = None if weights is None else weights[clouds, None, rows]
            responsibilities, largest, total = space.softmax_(joint, weight)
            density = total.log_().add_(largest)
            density = density if weight is None else density.mul_(weight)
            likelihood[clouds] += density.sum((1, 2), dtype=likelihood.dtype)
            moments[clouds] += torch.bmm(space.cast("product", responsibilities, precision), features.mT)
        ctx.mark_non_differentiable(likelihood)
        return moments, likelihood

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        points, shift, weights, theta = ctx.saved_tensors
        plan, dtype, space = ctx.plan, points.dtype, _Space(theta.device)
        need_points, need_shift, need_weights, need_theta = ctx.needs_input_grad[:4]
        grad_points = torch.zeros_like(points) if need_points else None
        grad_shift = torch.zeros_like(shift) if need_shift else None
        grad_weights = torch.zeros_like(weights) if need_weights else None
        grad_theta = torch.zeros_like(theta) if need_theta else None
        for block in plan.blocks:
            clouds, rows, precision = block
            features = plan.features_of(points, shift, block)
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
            if need_points or need_shift:
                if weights is not None:
                    responsibilities.mul_(weights[clouds, None, rows])
                back = torch.bmm(natural.mT, slope)
                back.baddbmm_(outer.mT, space.cast("product", responsibilities, precision))
                _pull_back(plan, points, shift, block, back, grad_points, grad_shift)
        return grad_points, grad_shift, grad_weights, grad_theta, None


class _LogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, shift: Tensor | None, theta: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(points, shift, theta)
        ctx.plan = plan
        density, space = points.new_empty(points.shape[0], points.shape[2]), _Space(theta.device)
        for block in plan.blocks:
            clouds, rows, precision = block
            natural = theta[clouds].to(precision)
            joint = space.product("joint", natural, plan.features_of(points, shift, block), points.dtype)
            _, largest, total = space.softmax_(joint)
            density[clouds, rows] = total.log_().add_(largest).squeeze(1)
        return density

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        points, shift, theta = ctx.saved_tensors
        plan, dtype, space = ctx.plan, points.dtype, _Space(theta.device)
        grad_points = torch.zeros_like(points) if ctx.needs_input_grad[0] else None
        grad_shift = torch.zeros_like(shift) if ctx.needs_input_grad[1] else None
        grad_theta = torch.zeros_like(theta) if ctx.needs_input_grad[2] else None
        for block in plan.blocks:
            clouds, rows, precision = block
            features = plan.features_of(points, shift, block)
            natural = theta[clouds].to(precision)
            # The gradient of logsumexp is the responsibility: backpropagation is the E-step.
            joint = space.product("joint", natural, features, dtype)
            slope, _, _ = space.softmax_(joint, grad[clouds, None, rows])
            slope = space.cast("slope", slope, precision)
            if grad_theta is not None:
                grad_theta[clouds] += torch.bmm(slope, features.mT)
            if grad_points is not None or grad_shift is not None:
                _pull_back(plan, points, shift, block, torch.bmm(natural.mT, slope), grad_points, grad_shift)
        return grad_points, grad_shift, grad_theta, None


def _pull_back(
    plan: _Plan,
    points: Tensor,
    shift: Tensor | None,
    block: _Block,
    back: Tensor,
    grad_points: Tensor | None,
    grad_shift: Tensor | None,
) -> None:
    """Add the gradient that a gradient (b, F, n) of features stands for to those of points and shift."""
    grad = plan.structure.pull_back(centred(points, shift, block.clouds, block.rows), back)
    if grad_points is not None:
        grad_points[block.clouds, :, block.rows] = grad.to(points.dtype)
    if grad_shift is not None:
        grad_shift[block.clouds] -= grad.sum(2)
