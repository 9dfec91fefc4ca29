"""The E-step of Gaussian mixtures in Triton: the operators of ``native.py`` on CUDA devices, for float32 points.

Whitened points ``y = W_k (z_n - mu_k)`` are computed for one component and a tile of points at a time, in float32, and
sums over chunks of points are added in float64. Results do not depend on the order in which programs run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Points per tile, and per partial sum in float32.
_TILE, _CHUNK = 32, 1024


@triton.jit
def _whitened(x, item, feature, own, at, k, D: tl.constexpr, FULL: tl.constexpr):
    """Return y (D, n) and W of component k of the set ``at``; unused rows of y are zero."""
    x_ptr, set_stride, feature_stride, item_stride, items = x
    origin, inverse_unit, means, inverse, features, components = own
    real = feature < features
    rows, columns = feature.to(tl.int64)[:, None] * feature_stride, item.to(tl.int64)[None, :] * item_stride
    from_ = x_ptr + at * set_stride + rows + columns
    points = tl.load(from_, mask=real[:, None] & (item < items)[None, :], other=0.0)
    z = (points - tl.load(origin + at * features + feature, mask=real, other=0.0)[:, None]) * tl.load(inverse_unit + at)
    place = (at * components + k) * features + feature
    difference = tl.where(real[:, None], z - tl.load(means + place, mask=real, other=0.0)[:, None], 0.0)
    if FULL:
        both = real[:, None] & real[None, :]
        W = tl.load(inverse + place[:, None] * features + feature[None, :], mask=both, other=0.0)
        return _product(W, difference), W
    else:
        W = tl.load(inverse + place, mask=real, other=0.0)
        return W[:, None] * difference, W


@triton.jit
def _product(matrix, vectors):
    """Return the product of (D, D) and (D, n), in float32 on every device."""
    return tl.sum(matrix[:, :, None] * vectors[None, :, :], 1)


@triton.jit
def _slope(y, gradients, place, feature, features, FULL: tl.constexpr):
    """Return the gradient ``a_n`` (n,) with respect to ``w_n r_nk``, through the sums, and da_n/dy (D, n)."""
    constant, linear, square = gradients
    real = feature < features
    first = tl.load(linear + place * features + feature, mask=real, other=0.0)[:, None]
    row = place * features + feature
    if FULL:
        both = real[:, None] & real[None, :]
        second = _product(tl.load(square + row[:, None] * features + feature[None, :], mask=both, other=0.0), y)
    else:
        second = tl.load(square + row, mask=real, other=0.0)[:, None] * y
    return tl.load(constant + place) + tl.sum(y * (first + second), 0), first + 2.0 * second


@triton.jit
def _rows(
    x, own, peak, gradients, density, mean_slope,
    D: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Write ``log p(z_n)`` and, for the gradient, ``sum_k r_nk a_nk``."""
    items, features, components = x[4], own[4], own[5]
    tiles = tl.cdiv(items, TILE)
    at, feature = (tl.program_id(0) // tiles).to(tl.int64), tl.arange(0, D)
    item = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total, slopes = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for k in range(components):
        y, _ = _whitened(x, item, feature, own, at, k, D, FULL)
        place = at * components + k
        joint = tl.load(peak + place) - 0.5 * tl.sum(y * y, 0)
        above = tl.maximum(largest, joint)
        shrunk, weight = tl.exp(largest - above), tl.exp(joint - above)
        total = total * shrunk + weight
        if SLOPES:
            a, _ = _slope(y, gradients, place, feature, features, FULL)
            slopes = slopes * shrunk + weight * a
        largest = above
    tl.store(density + at * items + item, largest + tl.log(total), mask=item < items)
    if SLOPES:
        tl.store(mean_slope + at * items + item, slopes / total, mask=item < items)


@triton.jit
def _derivative(y, item, at, place, items, peak, weights, rows, a, SLOPES: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return ``w_n r_nk`` (n,) and the gradient with respect to joint log-densities (or ``w_n r_nk`` again)."""
    density, mean_slope, outer = rows
    real, row = item < items, at * items + item
    joint = tl.load(peak + place) - 0.5 * tl.sum(y * y, 0)
    r = tl.where(real, tl.exp(joint - tl.load(density + row, mask=real, other=0.0)), 0.0)
    if WEIGHTED:
        r = r * tl.load(weights + row, mask=real, other=0.0)
    if SLOPES:
        mean, of_density = tl.load(mean_slope + row, mask=real, other=0.0), tl.load(outer + row, mask=real, other=0.0)
        return r, r * (a - mean + of_density)
    else:
        return r, r


@triton.jit
def _sums(
    x, own, peak, gradients, weights, rows, zeroth, first, second,
    D: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr, SLOPES: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write the sums of ``[1, y, s(y)]`` over a chunk, weighted by the second result of :func:`_derivative`."""
    items, features, components = x[4], own[4], own[5]
    slot = tl.program_id(0).to(tl.int64)  # the first axis of a grid, as others have at most 65,535 programs
    chunks = tl.maximum(tl.cdiv(items, CHUNK), 1)
    place, chunk = slot // chunks, (slot % chunks).to(tl.int32)
    at, k, feature = place // components, place % components, tl.arange(0, D)
    sum0, sum1 = 0.0, tl.zeros((D,), tl.float32)
    if FULL:
        sum2 = tl.zeros((D, D), tl.float32)
    else:
        sum2 = tl.zeros((D,), tl.float32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, items), TILE):
        item = start + tl.arange(0, TILE)
        y, _ = _whitened(x, item, feature, own, at, k, D, FULL)
        a = 0.0
        if SLOPES:
            a, _ = _slope(y, gradients, place, feature, features, FULL)
        _, c = _derivative(y, item, at, place, items, peak, weights, rows, a, SLOPES, WEIGHTED)
        cy = y * c[None, :]
        sum0, sum1 = sum0 + tl.sum(c, 0), sum1 + tl.sum(cy, 1)
        if FULL:
            sum2 += tl.sum(cy[:, None, :] * y[None, :, :], 2)
        else:
            sum2 += tl.sum(cy * y, 1)
    real = feature < features
    tl.store(zeroth + slot, sum0)
    tl.store(first + slot * features + feature, sum1, mask=real)
    row = slot * features + feature
    if FULL:
        tl.store(second + row[:, None] * features + feature[None, :], sum2, mask=real[:, None] & real[None, :])
    else:
        tl.store(second + row, sum2, mask=real)


@triton.jit
def _points(
    x, own, peak, gradients, weights, rows, grad_z,
    D: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, SLOPES: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write the gradient with respect to the coordinates z (B, D, N)."""
    items, features, components = x[4], own[4], own[5]
    tiles = tl.cdiv(items, TILE)
    at, feature = (tl.program_id(0) // tiles).to(tl.int64), tl.arange(0, D)
    item = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    found = tl.zeros((D, TILE), tl.float32)
    for k in range(components):
        place = at * components + k
        y, W = _whitened(x, item, feature, own, at, k, D, FULL)
        a, inner = _slope(y, gradients, place, feature, features, FULL)
        r, c = _derivative(y, item, at, place, items, peak, weights, rows, a, SLOPES, WEIGHTED)
        pull = r[None, :] * inner - c[None, :] * y
        if FULL:
            found += _product(tl.trans(W), pull)
        else:
            found += W[:, None] * pull
    mask = (feature < features)[:, None] & (item < items)[None, :]
    tl.store(grad_z + (at * features + feature[:, None]) * items + item[None, :], found, mask=mask)


class _Launch:
    """Converts the arguments of :func:`.native.e_step` for the kernels and launches them."""

    def __init__(self, *arguments: Any) -> None:
        x, weights, means, inverse, peak, scale, center, unit, kind = arguments
        self.full, self.kind = kind == "full", kind
        self.sets, self.features, self.items = x.shape
        self.components = means.shape[1]
        if kind == "spherical":
            inverse, scale = (part.expand_as(means) for part in (inverse, scale))
        self.means, self.inverse, self.scale = means, inverse, scale
        origin = center.float()
        # The center is rounded to the dtype of the points; shift the means by the difference.
        shift = ((center - origin) / unit.unsqueeze(-1)).unsqueeze(1)
        own = [origin, 1.0 / unit, means + shift, inverse]
        self.own = (*(part.float().contiguous() for part in own), self.features, self.components)
        self.peak = peak.float().contiguous()
        self.x = (x, *x.stride(), self.items)
        self.weights = None if weights is None else weights.float().contiguous()
        self.weighted = {"WEIGHTED": weights is not None}
        self.sizes = {"D": triton.next_power_of_2(self.features), "TILE": _TILE, "FULL": self.full}
        self.gradients: tuple[Tensor, ...] = (self.peak, self.peak, self.peak)  # not read
        self.slopes = False

    def set_gradients(self, grads: Tensor | None) -> None:
        """Store the gradient of the sums as a function of whitened points."""
        self.slopes = True
        if grads is None:
            self.gradients = tuple(map(torch.zeros_like, (self.peak, *self.own[2:4])))
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
        self.gradients = tuple(part.float().contiguous() for part in (constant, first, second))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the log-densities and the mean slopes ``sum_k r_nk a_nk``, both (B, N)."""
        density = self.peak.new_empty(self.sets, self.items)
        mean_slope = torch.empty_like(density) if self.slopes else density
        self._run(_rows, self.sets * triton.cdiv(self.items, _TILE), density, mean_slope)
        return density, mean_slope

    def sums(self, *rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of 1 (B, K), y (B, K, D), and y y^T (B, K, D, D) or y^2 (B, K, D), in float64."""
        chunks = max(triton.cdiv(self.items, _CHUNK), 1)
        square = (self.features, self.features) if self.full else (self.features,)
        parts = [self.peak.new_empty(*self.peak.shape, chunks, *rest) for rest in ((), (self.features,), square)]
        self._run(_sums, self.peak.numel() * chunks, self.weights, rows, *parts, CHUNK=_CHUNK, **self.weighted)
        return tuple(part.sum(2, dtype=self.means.dtype) for part in parts)

    def grad_z(self, *rows: Tensor) -> Tensor:
        """Return the gradient with respect to the coordinates z (B, D, N)."""
        found = self.peak.new_empty(self.sets, self.features, self.items)
        self._run(_points, self.sets * triton.cdiv(self.items, _TILE), self.weights, rows, found, **self.weighted)
        return found

    def _run(self, kernel: Any, programs: int, *others: Any, **constants: Any) -> None:
        if programs:
            common = self.x, self.own, self.peak, self.gradients
            kernel[(programs,)](*common, *others, SLOPES=self.slopes, **self.sizes, **constants)


def e_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See :func:`.native.e_step`."""
    *problem, with_log_likelihood = arguments
    launch = _Launch(*problem)
    means, scale = launch.means, launch.scale
    density, _ = launch.rows()
    zeroth, first, second = launch.sums(density, density, density)
    # Convert the sums to z = mu + L y.
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
        log_density = density.to(means.dtype)
        log_likelihood = (log_density if problem[1] is None else log_density * problem[1]).sum(-1)
    return torch.cat([mass, mass * means + shift, square], -1), log_likelihood


def log_density(*arguments: Any) -> Tensor:
    """See :func:`.native.log_density`."""
    return _Launch(*arguments).rows()[0].to(arguments[2].dtype)


def e_step_gradient(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.native.e_step_gradient`."""
    *problem, grads, outer = arguments
    launch = _Launch(*problem)
    launch.set_gradients(grads)
    density, mean_slope = launch.rows()
    outer = outer.expand(-1, launch.items)
    rows = density, mean_slope, outer.float().contiguous()
    zeroth, first, second = launch.sums(*rows)
    if launch.full:
        of_means = (first.unsqueeze(-2) @ launch.inverse).squeeze(-2)
        of_inverse = -(second @ launch.scale.mT).tril().flatten(-2)
    else:
        of_means, of_inverse = first * launch.inverse, -second * launch.scale
        of_inverse = of_inverse.sum(-1, keepdim=True) if launch.kind == "spherical" else of_inverse
    of_x = launch.grad_z(*rows) / problem[7][:, None, None].float()
    of_weights = mean_slope.to(launch.means.dtype) + outer * density
    return torch.cat([zeroth.unsqueeze(-1), of_means, of_inverse], -1), of_x, of_weights
