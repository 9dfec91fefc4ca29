"""The two passes over points that EM consists of, as functions that keep nothing of the size (N, K).

Both form ``log pi_k + log N(x_n | mu_k, Sigma_k) = theta_k . phi(x_n)`` block by block and form it again in the
backward pass, so memory does not grow with the number of iterations, and a block's responsibilities stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from em_lightning.mixture.cloud import centred

# Numbers a block: its responsibilities and its features stay in the second-level caches of two cores.
_BLOCK = 2**19
# On other devices a block has to fill the device; work spaces stay below 64 MiB.
_DEVICE_BLOCK = 2**21


class Features(Protocol):
    """What a pass asks of a structure."""

    def num_moments(self, num_features: int) -> int:
        """Return F, the number of features."""

    def features(self, points: Tensor, dtype: torch.dtype) -> Tensor:
        """Return phi (B, F, N) of points (B, D, N)."""

    def fill(self, points: Tensor, out: Tensor) -> Tensor:
        """Write phi of points (B, D, N) of the same type into ``out`` (B, F, N)."""

    def pull_back(self, points: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of points (B, D, N) that a gradient (B, F, N) of their features stands for."""


class Plan(NamedTuple):
    """How a pass goes.

    structure: whose features the points are taken to.
    features: (B, F, N), where they are at hand.
    precision: of the products.
    chosen: (C,), the clouds that are passed over; ``None`` for all.
    likelihood: whether the log-likelihood is wanted beside the moments.
    """

    structure: Features
    features: Tensor | None
    precision: torch.dtype
    chosen: Tensor | None = None
    likelihood: bool = False

    def pick(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        """Return the chosen clouds' part of tensors."""
        if self.chosen is None:
            return tensors
        return tuple(tensor if tensor is None else tensor[self.chosen] for tensor in tensors)

    def put(self, part: Tensor | None, whole: Tensor | None) -> Tensor | None:
        """Return the gradient of a whole tensor for that of the chosen clouds' part."""
        if part is None or whole is None or self.chosen is None:
            return part
        return torch.zeros_like(whole).index_copy_(0, self.chosen, part)

    def features_of(self, points: Tensor, shift: Tensor | None, block: _Block, space: _Space) -> Tensor:
        """Return the features of a block of the chosen points in the precision of the pass."""
        if self.features is not None and self.features.dtype == self.precision and self.chosen is None:
            return self.features[block.clouds, :, block.rows]
        part = centred(points, shift, block.clouds, block.rows).to(self.precision)
        shape = (part.shape[0], self.structure.num_moments(part.shape[1]), part.shape[2])
        return self.structure.fill(part, space.take("features", self.precision, shape))


class _Block(NamedTuple):
    clouds: slice
    rows: slice


def _blocks(points: Tensor, theta: Tensor) -> Iterator[_Block]:
    sets, items, size = points.shape[0], points.shape[2], max(theta.shape[1:])
    numbers = _BLOCK if points.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(min(items, numbers // size), 1)
    clouds = max(numbers // (size * rows), 1)
    for first in range(0, sets, clouds):
        for row in range(0, items, rows):
            yield _Block(slice(first, min(first + clouds, sets)), slice(row, min(row + rows, items)))


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

    def softmax_(self, joint: Tensor, scale: Tensor | None = None) -> Tensor:
        """Turn logits (C, K, n) into ``scale * softmax`` in place."""
        shape = (joint.shape[0], 1, joint.shape[2])
        largest = torch.amax(joint, 1, keepdim=True, out=self.take("largest", joint.dtype, shape))
        # Numbers below the normal range cost a hundred times the others; a share this small counts for nothing.
        joint.sub_(largest).clamp_(min=0.7 * math.log(torch.finfo(joint.dtype).tiny)).exp_()
        total = torch.sum(joint, 1, keepdim=True, out=self.take("total", joint.dtype, shape))
        share = torch.reciprocal(total, out=self.take("share", joint.dtype, shape))
        self.largest, self.total = largest, total
        return joint.mul_(share if scale is None else share.mul_(scale))

    def log_total(self) -> Tensor:
        """Return the logsumexp (C, 1, n) of the last logits."""
        return self.total.log_().add_(self.largest)


class Moments(torch.autograd.Function):
    """From points (B, D, N), shift, weights (B, N) and theta (B, K, F) to moments (C, K, F) and log-likelihood (C,)."""

    @staticmethod
    def forward(
        ctx: Any, points: Tensor, shift: Tensor | None, weights: Tensor | None, theta: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """Return the sums over points; the log-likelihood has no gradient."""
        ctx.save_for_backward(points, shift, weights, theta)
        ctx.plan = plan
        points, shift, weights, theta = plan.pick(points, shift, weights, theta)
        moments, space, natural = torch.zeros_like(theta), _Space(theta.device), theta.to(plan.precision)
        likelihood = theta.new_zeros(len(theta))
        for block in _blocks(points, theta):
            clouds, rows = block
            features = plan.features_of(points, shift, block, space)
            joint = space.product("joint", natural[clouds], features, points.dtype)
            weight = None if weights is None else weights[clouds, None, rows]
            responsibilities = space.softmax_(joint, weight)
            if plan.likelihood:
                density = space.log_total()
                density = density if weight is None else density.mul_(weight)
                likelihood[clouds] += density.sum((1, 2), dtype=likelihood.dtype)
            # The longer side first: half the time for a handful of components.
            part = torch.bmm(features, space.cast("product", responsibilities, plan.precision).mT)
            moments[clouds] += part.mT
        ctx.mark_non_differentiable(likelihood)
        return moments, likelihood

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of points, shift, weights and theta."""
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors  # once: a checkpoint counts
        points, shift, weights, theta = plan.pick(*saved)
        dtype, space = points.dtype, _Space(theta.device)
        slopes = _Slopes(plan, ctx.needs_input_grad, points, shift, theta)
        grad_weights = torch.zeros_like(weights) if ctx.needs_input_grad[2] else None
        naturals, outers = theta.to(plan.precision), grad.to(plan.precision)
        for block in _blocks(points, theta):
            clouds, rows = block
            natural, outer = naturals[clouds], outers[clouds]
            features = plan.features_of(points, shift, block, space)
            responsibilities = space.softmax_(space.product("joint", natural, features, dtype))
            reach = space.product("reach", outer, features, dtype).mul_(responsibilities)
            total = reach.sum(1, keepdim=True)
            if grad_weights is not None:
                grad_weights[clouds, rows] = total.squeeze(1)
            # d r / d joint: r_k (delta_kj - r_j)
            slope = reach.addcmul_(responsibilities, total, value=-1)
            if weights is not None:
                slope.mul_(weights[clouds, None, rows])
                responsibilities.mul_(weights[clouds, None, rows])
            slope = space.cast("slope", slope, plan.precision)
            slopes.add_theta(block, slope, features)
            if slopes.of_points is not None or slopes.of_shift is not None:
                back = torch.bmm(natural.mT, slope)
                back.baddbmm_(outer.mT, space.cast("product", responsibilities, plan.precision))
                slopes.add_points(block, back)
        grads = (slopes.of_points, slopes.of_shift, grad_weights, slopes.of_theta)
        return *(plan.put(grad, whole) for grad, whole in zip(grads, saved, strict=True)), None


class LogDensity(torch.autograd.Function):
    """From points (B, D, N), shift, weights (ignored) and theta (B, K, F) to ``log p`` (C, N), in a tuple."""

    @staticmethod
    def forward(
        ctx: Any, points: Tensor, shift: Tensor | None, weights: Tensor | None, theta: Tensor, plan: Plan
    ) -> tuple[Tensor]:
        """Return the logsumexp over components of each point."""
        ctx.save_for_backward(points, shift, theta)
        ctx.plan = plan
        points, shift, theta = plan.pick(points, shift, theta)
        density, space = points.new_empty(len(theta), points.shape[2]), _Space(theta.device)
        natural = theta.to(plan.precision)
        for block in _blocks(points, theta):
            features = plan.features_of(points, shift, block, space)
            joint = space.product("joint", natural[block.clouds], features, points.dtype)
            space.softmax_(joint)
            density[block.clouds, block.rows] = space.log_total().squeeze(1)
        return (density,)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of points, shift and theta."""
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors
        points, shift, theta = plan.pick(*saved)
        space, slopes = _Space(theta.device), _Slopes(plan, ctx.needs_input_grad, points, shift, theta)
        naturals = theta.to(plan.precision)
        for block in _blocks(points, theta):
            clouds, rows = block
            features = plan.features_of(points, shift, block, space)
            # The gradient of logsumexp is the responsibility: backpropagation is the E-step.
            joint = space.product("joint", naturals[clouds], features, points.dtype)
            slope = space.cast("slope", space.softmax_(joint, grad[clouds, None, rows]), plan.precision)
            slopes.add_theta(block, slope, features)
            if slopes.of_points is not None or slopes.of_shift is not None:
                slopes.add_points(block, torch.bmm(naturals[clouds].mT, slope))
        grads = (slopes.of_points, slopes.of_shift, slopes.of_theta)
        points, shift, theta = (plan.put(grad, whole) for grad, whole in zip(grads, saved, strict=True))
        return points, shift, None, theta, None


class _Slopes:
    """The gradients of points, shift and theta that the blocks of a backward pass add up to, where they are wanted."""

    def __init__(self, plan: Plan, wanted: Sequence[bool], points: Tensor, shift: Tensor | None, theta: Tensor) -> None:
        self.structure, self.points, self.shift = plan.structure, points, shift
        self.of_points = torch.zeros_like(points) if wanted[0] else None
        self.of_shift = torch.zeros_like(shift) if wanted[1] and shift is not None else None
        self.of_theta = torch.zeros_like(theta) if wanted[3] else None

    def add_theta(self, block: _Block, slope: Tensor, features: Tensor) -> None:
        """Add what a slope (b, K, n) of the logits is for theta."""
        if self.of_theta is not None:
            self.of_theta[block.clouds] += torch.bmm(slope, features.mT)

    def add_points(self, block: _Block, back: Tensor) -> None:
        """Add what a gradient (b, F, n) of the features is for points and shift."""
        part = centred(self.points, self.shift, block.clouds, block.rows)
        grad = self.structure.pull_back(part, back)
        if self.of_points is not None:
            self.of_points[block.clouds, :, block.rows] = grad.to(part.dtype)
        if self.of_shift is not None:
            self.of_shift[block.clouds] -= grad.sum(2)
