"""The E-step of Gaussian mixtures in Triton: the operators of ``native.py`` on CUDA devices, for float32 points.

Whitened points ``y = W_k (z_n - mu_k)`` are computed for one component and a tile of points at a time, in float32, and
sums over chunks of points are added in float64. Results do not depend on the order in which programs run.

Indices: set b, component k, points n of a tile, features d, padded to D in the kernels; bk and bn are flat. Arguments:
W (``inverse``), L = W^-1 (``scale``), joint log-density at the mean (``peak``), frame ``z = (x - center) / unit``.
``slope`` a_nk: the derivative of the loss with respect to ``w_n r_nk`` through the sums, a ``polynomial`` of y:
constant + linear^T y + y^T square y. With ``HARD``, r_nk is 1 for the component of the highest joint density, otherwise
0, the means are in the user's units, and ``W = 1 / unit``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Points per tile, whose products (D, D, n) must fit in registers, and per partial sum, which is in float32.
_TILE, _CHUNK = 32, 1024


@triton.jit
def read_points(x, n, d, b, features):
    """Return points (D, n) of set b; what lies outside the set is zero."""
    x_ptr, set_stride, feature_stride, item_stride, items = x
    rows, columns = d.to(tl.int64)[:, None] * feature_stride, n.to(tl.int64)[None, :] * item_stride
    valid = (d < features)[:, None] & (n < items)[None, :]
    return tl.load(x_ptr + b * set_stride + rows + columns, mask=valid, other=0.0)


@triton.jit
def _whitened(x, n, d, mixture, b, k, D: tl.constexpr, FULL: tl.constexpr, HARD: tl.constexpr = False):
    """Return y (D, n) and W of component k of set b; unused rows of y are zero."""
    origin, unit, means, inverse, features, components = mixture
    valid, points, inverse_unit = d < features, read_points(x, n, d, b, features), 1.0 / tl.load(unit + b)
    row = (b * components + k) * features + d
    mean = tl.load(means + row, mask=valid, other=0.0)[:, None]
    z = (points - tl.load(origin + b * features + d, mask=valid, other=0.0)[:, None]) * inverse_unit
    difference = tl.where(valid[:, None], (points if HARD else z) - mean, 0.0)
    if FULL and not HARD:
        both = valid[:, None] & valid[None, :]
        W = tl.load(inverse + row[:, None] * features + d[None, :], mask=both, other=0.0)
        return _product(W, difference), W
    else:
        W = tl.where(valid, inverse_unit, 0.0) if HARD else tl.load(inverse + row, mask=valid, other=0.0)
        return W[:, None] * difference, W


@triton.jit
def _product(matrix, vectors):
    """Return the product of (D, D) and (D, n) in float32; ``tl.dot`` may round to TF32."""
    return tl.sum(matrix[:, :, None] * vectors[None, :, :], 1)


@triton.jit
def _slope(y, polynomial, bk, d, features, FULL: tl.constexpr):
    """Return the slope a_nk (n,) and its derivative with respect to y (D, n)."""
    constant, linear, square = polynomial
    valid = d < features
    first = tl.load(linear + bk * features + d, mask=valid, other=0.0)[:, None]
    row = bk * features + d
    if FULL:
        both = valid[:, None] & valid[None, :]
        second = _product(tl.load(square + row[:, None] * features + d[None, :], mask=both, other=0.0), y)
    else:
        second = tl.load(square + row, mask=valid, other=0.0)[:, None] * y
    return tl.load(constant + bk) + tl.sum(y * (first + second), 0), first + 2.0 * second


@triton.jit
def _write_log_density(
    x, mixture, peak, polynomial, log_density, mean_slope,
    D: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, SLOPES: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Write ``log p(z_n)`` or, with ``HARD``, the k of ``r_nk = 1``; for the gradient also ``sum_k r_nk a_nk``."""
    items, features, components = x[4], mixture[4], mixture[5]  # the last of each, see _whitened
    tiles = tl.cdiv(items, TILE)
    b, d = (tl.program_id(0) // tiles).to(tl.int64), tl.arange(0, D)
    n = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    largest = tl.full((TILE,), -3.4e38, tl.float32)  # the lowest number, because -inf - -inf is NaN
    total, slopes = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    hardest = slopes
    for k in range(components):
        y, _ = _whitened(x, n, d, mixture, b, k, D, FULL, HARD)
        bk = b * components + k
        joint = tl.load(peak + bk) - 0.5 * tl.sum(y * y, 0)
        above = tl.maximum(largest, joint)
        shrunk, weight = tl.exp(largest - above), tl.exp(joint - above)
        total = total * shrunk + weight
        if SLOPES:
            a, _ = _slope(y, polynomial, bk, d, features, FULL)
            slopes = slopes * shrunk + weight * a
        hardest, largest = tl.where(joint > largest, k, hardest), above
    tl.store(log_density + b * items + n, hardest if HARD else largest + tl.log(total), mask=n < items)
    if SLOPES:
        tl.store(mean_slope + b * items + n, slopes / total, mask=n < items)


@triton.jit
def _derivative(y, n, b, k, bk, items, peak, weights, per_point, a, SLOPES: tl.constexpr, HARD: tl.constexpr):
    """Return ``w_n r_nk`` (n,), and the weights of sums: with SLOPES dloss / dlog p(z_n, k), otherwise the same."""
    log_density, mean_slope, grad_density = per_point
    valid, bn = n < items, b * items + n
    joint = tl.load(peak + bk).to(tl.float32) - 0.5 * tl.sum(y * y, 0)
    density = tl.load(log_density + bn, mask=valid, other=0.0)
    # With HARD, points of negative joint log-density do not count.
    r = tl.where((density == k) & (joint >= 0.0), 1.0, 0.0) if HARD else tl.exp(joint - density)
    r = tl.where(valid, r, 0.0)
    if weights is not None:
        r = r * tl.load(weights + bn, mask=valid, other=0.0)
    if SLOPES:
        mean = tl.load(mean_slope + bn, mask=valid, other=0.0)
        of_density = tl.load(grad_density + bn, mask=valid, other=0.0)
        return r, r * (a - mean + of_density)
    else:
        return r, r


@triton.jit
def _write_sums(
    x, mixture, peak, polynomial, weights, per_point, sums,
    D: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr, SLOPES: tl.constexpr,
    HARD: tl.constexpr,
):  # fmt: skip
    """Write the sums of ``[1, y, s(y)]`` over a chunk of points, weighted by the second result of ``_derivative``."""
    items, features, components = x[4], mixture[4], mixture[5]  # the last of each, see _whitened
    slot = tl.program_id(0).to(tl.int64)  # grids have one dimension, as the others end at 65,535 programs
    chunks = tl.maximum(tl.cdiv(items, CHUNK), 1)
    bk, chunk = slot // chunks, (slot % chunks).to(tl.int32)
    b, k, d = bk // components, bk % components, tl.arange(0, D)
    sum0, sum1 = 0.0, tl.zeros((D,), tl.float32)
    if FULL:
        sum2 = tl.zeros((D, D), tl.float32)
    else:
        sum2 = tl.zeros((D,), tl.float32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, items), TILE):
        n = start + tl.arange(0, TILE)
        y, _ = _whitened(x, n, d, mixture, b, k, D, FULL, HARD)
        a = 0.0
        if SLOPES:
            a, _ = _slope(y, polynomial, bk, d, features, FULL)
        _, c = _derivative(y, n, b, k, bk, items, peak, weights, per_point, a, SLOPES, HARD)
        cy = y * c[None, :]
        sum0, sum1 = sum0 + tl.sum(c, 0), sum1 + tl.sum(cy, 1)
        if FULL:
            sum2 += tl.sum(cy[:, None, :] * y[None, :, :], 2)
        else:
            sum2 += tl.sum(cy * y, 1)
    valid = d < features
    sums += slot * (1 + features + (features * features if FULL else features))
    tl.store(sums, sum0)
    tl.store(sums + 1 + d, sum1, mask=valid)
    row = sums + 1 + features + d * (features if FULL else 1)
    if FULL:
        tl.store(row[:, None] + d[None, :], sum2, mask=valid[:, None] & valid[None, :])
    else:
        tl.store(row, sum2, mask=valid)


@triton.jit
def _write_point_gradient(
    x, mixture, peak, polynomial, weights, per_point, grad_z,
    D: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Write the gradient with respect to the coordinates z (B, D, N)."""
    items, features, components = x[4], mixture[4], mixture[5]  # the last of each, see _whitened
    tiles = tl.cdiv(items, TILE)
    b, d = (tl.program_id(0) // tiles).to(tl.int64), tl.arange(0, D)
    n = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    gradient = tl.zeros((D, TILE), tl.float32)
    for k in range(components):
        bk = b * components + k
        y, W = _whitened(x, n, d, mixture, b, k, D, FULL)
        a, slope_y = _slope(y, polynomial, bk, d, features, FULL)
        r, c = _derivative(y, n, b, k, bk, items, peak, weights, per_point, a, SLOPES, False)
        grad_y = r[None, :] * slope_y - c[None, :] * y
        if FULL:
            gradient += _product(tl.trans(W), grad_y)
        else:
            gradient += W[:, None] * grad_y
    mask = (d < features)[:, None] & (n < items)[None, :]
    tl.store(grad_z + (b * features + d[:, None]) * items + n[None, :], gradient, mask=mask)


class Launch:
    """Converts the arguments of :func:`.native.e_step` for the kernels and launches them, with or without ``HARD``."""

    def __init__(self, *arguments: Any, hard: bool = False) -> None:
        x, weights, means, inverse, peak, scale, center, unit, kind = arguments
        self.full, self.kind = kind == "full", kind
        self.sets, self.features, self.items = x.shape
        self.components = means.shape[1]
        if kind == "spherical":
            inverse, scale = (part.expand_as(means) for part in (inverse, scale))
        self.means, self.inverse, self.scale, self.unit = means, inverse, scale, unit
        mixture = [means, unit, means, inverse]
        if not hard:
            mixture[0] = origin = center.float()
            # The center is rounded to the dtype of the points; shift the means by the difference.
            mixture[2] = means + ((center - origin) / unit.unsqueeze(-1)).unsqueeze(1)
        self.mixture = (*(part.float().contiguous() for part in mixture), self.features, self.components)
        self.peak = peak.float().contiguous()
        self.x = (x, *x.stride(), self.items)
        self.weights = None if weights is None else weights.float().contiguous()
        self.sizes = {"D": triton.next_power_of_2(self.features), "TILE": _TILE, "FULL": self.full}
        self.polynomial: tuple[Tensor, ...] = (self.peak, self.peak, self.peak)  # not read without slopes
        self.slopes, self.hard = False, hard

    def set_polynomial(self, grads: Tensor | None) -> None:
        """Store the coefficients of the slope, for the gradient (B, K, F) with respect to the sums of phi(z)."""
        self.slopes = True
        if grads is None:
            self.polynomial = tuple(map(torch.zeros_like, (self.peak, *self.mixture[2:4])))  # as peak, means, inverse
            return
        constant, linear, square = grads.split([1, self.features, grads.shape[-1] - 1 - self.features], -1)
        constant = constant.squeeze(-1)
        if self.full:
            i, j = torch.triu_indices(self.features, self.features, device=grads.device)
            upper = grads.new_zeros(*self.peak.shape, self.features, self.features)
            upper[..., i, j] = square
            matrix = 0.5 * (upper + upper.mT)
            of_mean = (matrix @ self.means.unsqueeze(-1)).squeeze(-1)
            first = ((linear + 2.0 * of_mean).unsqueeze(-2) @ self.scale).squeeze(-2)
            second = self.scale.mT @ matrix @ self.scale
        else:
            of_mean = square * self.means
            first, second = (linear + 2.0 * of_mean) * self.scale, square * self.scale.square()
        constant = constant + ((linear + of_mean) * self.means).sum(-1)
        self.polynomial = tuple(part.float().contiguous() for part in (constant, first, second))

    def log_density(self) -> tuple[Tensor, Tensor]:
        """Return the log-densities and the mean slopes (B, N); without slopes, the log-densities twice."""
        log_density = self.peak.new_empty(self.sets, self.items)
        mean_slope = torch.empty_like(log_density) if self.slopes else log_density
        programs = self.sets * triton.cdiv(self.items, _TILE)
        self._run(_write_log_density, programs, log_density, mean_slope, HARD=self.hard)
        return log_density, mean_slope

    def sums(self, *per_point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sums of [1, y, s(y)] in float64, s(y) being y y^T or y^2, and views of the sums of each."""
        chunks, features = max(triton.cdiv(self.items, _CHUNK), 1), self.features
        square = (features, features) if self.full else (features,)
        parts = self.peak.new_empty(*self.peak.shape, chunks, 1 + features + math.prod(square))
        programs = self.peak.numel() * chunks
        self._run(_write_sums, programs, self.weights, per_point, parts, CHUNK=_CHUNK, HARD=self.hard)
        sums = parts.sum(2, dtype=self.unit.dtype)
        return sums, sums[..., 0], sums[..., 1 : 1 + features], sums[..., 1 + features :].unflatten(-1, square)

    def grad_z(self, *per_point: Tensor) -> Tensor:
        """Return the gradient with respect to the coordinates z (B, D, N)."""
        gradient = self.peak.new_empty(self.sets, self.features, self.items)
        programs = self.sets * triton.cdiv(self.items, _TILE)
        self._run(_write_point_gradient, programs, self.weights, per_point, gradient)
        return gradient

    def _run(self, kernel: Any, programs: int, *others: Any, **constants: Any) -> None:
        if programs:
            common = self.x, self.mixture, self.peak, self.polynomial
            kernel[(programs,)](*common, *others, SLOPES=self.slopes, **self.sizes, **constants)


def e_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See :func:`.native.e_step`."""
    *problem, with_log_likelihood = arguments
    launch = Launch(*problem)
    means, scale = launch.means, launch.scale
    density, _ = launch.log_density()
    _, zeroth, first, second = launch.sums(density, density, density)  # without slopes, only the first is read
    # Back to z = mu + L y.
    mass = zeroth.unsqueeze(-1)
    if launch.full:
        shift = (scale @ first.unsqueeze(-1)).squeeze(-1)
        cross = means.unsqueeze(-1) * shift.unsqueeze(-2)
        square = scale @ second @ scale.mT + cross + cross.mT
        square = square + mass.unsqueeze(-1) * means.unsqueeze(-1) * means.unsqueeze(-2)
        i, j = torch.triu_indices(launch.features, launch.features, device=means.device)
        square = square[..., i, j]
    else:
        shift = scale * first
        square = scale.square() * second + 2.0 * means * shift + mass * means.square()
        square = square.sum(-1, keepdim=True) if launch.kind == "spherical" else square
    log_likelihood = means.new_zeros(launch.sets)
    if with_log_likelihood:
        weights, density = problem[1], density.to(means.dtype)
        log_likelihood = (density if weights is None else density * weights).sum(-1)
    return torch.cat([mass, mass * means + shift, square], -1), log_likelihood


def log_density(*arguments: Any) -> Tensor:
    """See :func:`.native.log_density`."""
    launch = Launch(*arguments)
    return launch.log_density()[0].to(launch.means.dtype)


def e_step_gradient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.native.e_step_gradient`."""
    *problem, grad_sums, grad_density = arguments
    launch = Launch(*problem)
    launch.set_polynomial(grad_sums)
    log_density, mean_slope = launch.log_density()
    grad_density = grad_density.expand(-1, launch.items)
    per_point = log_density, mean_slope, grad_density.float().contiguous()
    _, zeroth, first, second = launch.sums(*per_point)
    if launch.full:
        of_means = (first.unsqueeze(-2) @ launch.inverse).squeeze(-2)
        of_inverse = -(second @ launch.scale.mT).tril().flatten(-2)
    else:
        of_means, of_inverse = first * launch.inverse, -second * launch.scale
        of_inverse = of_inverse.sum(-1, keepdim=True) if launch.kind == "spherical" else of_inverse
    of_x = launch.grad_z(*per_point) / launch.unit[:, None, None].float()
    of_weights = mean_slope.to(launch.means.dtype) + grad_density * log_density
    return torch.cat([zeroth.unsqueeze(-1), of_means, of_inverse], -1), of_x, of_weights
