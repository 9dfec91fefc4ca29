r"""Mixtures under any kernel, and a generalized M-step that needs only the kernel's energy.

The expected energy of a component, :math:`Q_k(\mu) = \sum_n w_n r_{nk} \, d(x_n, \mu)`, has the gradient
:math:`\sum_n w_n r_{nk} \, g_n` with :math:`g_n = \partial d(x_n, \mu) / \partial \mu`. The M-step is

.. math:: \mu \leftarrow \mu - t \, \frac{\sum_n w_n r_{nk} \, g_n}{\sum_n w_n r_{nk} \, u_n}

with the IRLS weights :math:`u_n = |g_n| / |\mu - x_n|` of each feature, or the second derivative for a point at the
center. It is the weighted mean for a Gaussian, the IRLS step for a robust kernel and a scaled gradient step otherwise.
t is halved from 1 until the expected energy falls enough (Armijo), and is 0 if it never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import register_dataclass

from em_lightning.kernels import Kernel
from em_lightning.mixture.parameters import Parameters
from em_lightning.mixture.points import accumulation_dtype, join_weights

# Numbers (B, K, n, D) per block of points.
_BLOCK = 2**22
_HALVINGS = 30
# Armijo constant.
_ARMIJO = 1e-4
# Distance from a center, relative to the bounding box, within which the IRLS weight is the second derivative.
_NEAR = 1e-9
# Smallest IRLS weight and share of points with one; gradients contain their squares.
_SMALLEST_WEIGHT = 1e-30
# Largest ratio by which a step may change a squared scale.
_LARGEST_RATIO = 16.0


@dataclass(frozen=True)
class KernelMixture:
    r"""A batch of mixtures under a kernel, of energies ``d(x / s_k, mu_k / s_k) + D log s_k - log pi_k``.

    Args:
        log_weights: (B, K), normalized over components.
        centers: (B, K, D).
        scales: (B, K), 1 unless they are estimated.
    """

    log_weights: Tensor
    centers: Tensor
    scales: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three tensors."""
        return self.log_weights, self.centers, self.scales


register_dataclass(KernelMixture, serialized_type_name="em_lightning.KernelMixture")


class PointSets(NamedTuple):
    """Point sets ready for generalized EM.

    x: (B, N, D), zero where masked.
    counts: (B, N), weights with mean 1 over the points of positive weight.
    low: (B, 1, D), lower corner of the bounding box of these points.
    high: (B, 1, D), upper corner.
    """

    x: Tensor
    counts: Tensor
    low: Tensor
    high: Tensor

    @property
    def mass(self) -> Tensor:
        """The sum of the weights (B,)."""
        return self.counts.sum(-1)


def point_sets(x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> PointSets:
    """Return points (B, N, D) with mask and weights (B, N) joined."""
    counts, counted = join_weights(mask, weights, x.dtype)
    if counts is None or counted is None:
        return PointSets(x, torch.ones_like(x[..., 0]), x.amin(1, keepdim=True), x.amax(1, keepdim=True))
    counted = counted.unsqueeze(-1)
    low = torch.where(counted, x, torch.inf).amin(1, keepdim=True)
    high = torch.where(counted, x, -torch.inf).amax(1, keepdim=True)
    box = (torch.where(side.isfinite(), side, 0.0) for side in (low, high))
    return PointSets(x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0), counts, *box)


def energies_of(kernel: Kernel, x: Tensor, centers: Tensor, scales: Tensor | None) -> Tensor:
    """Return ``d(x / s_k, mu_k / s_k) + D log s_k`` (B, N, K); ``None`` for scales of 1."""
    if scales is None:
        return kernel(x, centers)
    own = scales[..., None, None]
    energies = kernel(x.unsqueeze(1) / own, centers.unsqueeze(2) / own).squeeze(-1).mT
    return energies + x.shape[-1] * scales.log().unsqueeze(1)


def generalized_step(
    kernel: Kernel, points: PointSets, mixture: Parameters, *, estimate_scale: bool, floor: float, num_steps: int
) -> Parameters:
    """Return the mixtures, centers as means and scales as covariances, after an iteration of generalized EM.

    No iteration lowers the objective. ``floor`` bounds squared scales from below; the M-step takes ``num_steps`` steps.
    """
    centers, scales = mixture.means, mixture.covariances
    joint = mixture.log_weights.unsqueeze(1) - energies_of(
        kernel, points.x, centers, scales if estimate_scale else None
    )
    log_shares = joint.log_softmax(-1)
    mass = _sum(log_shares.exp() * points.counts.unsqueeze(-1))
    guarded = mass + 10.0 * torch.finfo(mass.dtype).eps
    log_weights = guarded.log() - guarded.sum(-1, keepdim=True).log()
    shares = _within_components(log_shares, points.counts)
    for _ in range(num_steps):
        centers = _move(kernel, points, shares, centers, scales if estimate_scale else None)
        if estimate_scale:
            scales = _resize(kernel, points, shares, centers, scales, floor)
    return Parameters(log_weights, centers, scales)


def _within_components(log_shares: Tensor, counts: Tensor) -> Tensor:
    """Return responsibilities times weights (B, N, K), normalized over the points of each component.

    They are computed from logarithms, so that components of tiny responsibilities still have points and gradients.
    """
    largest = (log_shares + counts.unsqueeze(-1).log()).detach().amax(1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    # Points of zero weight may exceed the largest point of positive weight.
    bound = 0.5 * math.log(torch.finfo(log_shares.dtype).max)
    parts = (log_shares - largest).clamp(max=bound).exp() * counts.unsqueeze(-1)
    total = parts.sum(1, keepdim=True)
    return parts / torch.where(total > 0, total, 1.0)


def _move(kernel: Kernel, points: PointSets, shares: Tensor, centers: Tensor, scales: Tensor | None) -> Tensor:
    """Return centers (B, K, D); the expected energy does not increase."""
    near = _NEAR * (points.high - points.low).detach()
    rows = _BLOCK // max(centers.numel(), 1) or 1
    parts = [
        _irls_sums(kernel, x, share, centers, scales, near)
        for x, share in zip(points.x.split(rows, 1), shares.split(rows, 1), strict=True)
    ]
    slope, weight, known = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    # Points without an IRLS weight get the mean weight. If no point has one, all of them coincide with the center,
    # which has the gradient of their mean.
    usable = (known > _SMALLEST_WEIGHT) & (weight > _SMALLEST_WEIGHT)
    drift = (shares.mT @ points.x.to(shares.dtype)).to(centers.dtype) - centers
    step = -slope * known / torch.where(usable, weight, 1.0)
    step = torch.where(usable, step.to(centers.dtype), drift - drift.detach())

    def expected(place: Tensor) -> Tensor:
        return _sum(shares * energies_of(kernel, points.x, place, scales))

    return _search(expected, centers, step, slope, points.low, points.high)


def _irls_sums(
    kernel: Kernel, x: Tensor, shares: Tensor, centers: Tensor, scales: Tensor | None, near: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums (B, K, D) over points: of slopes, of IRLS weights, and of the shares of points that have one."""
    own = torch.ones_like(centers[..., 0]) if scales is None else scales
    own = own[..., None, None]

    def energy(each: Tensor) -> Tensor:
        return kernel((x.unsqueeze(1) / own).unsqueeze(-2), (each / own).unsqueeze(-2))

    each = centers.unsqueeze(2).expand(-1, -1, x.shape[1], -1)  # one center per point, for separate slopes
    wide = accumulation_dtype(x)  # gradients contain 1 / distance^2
    slopes = _slope(energy, each).to(wide)
    distance = (each - x.unsqueeze(1)).abs().to(wide)
    at_center = distance <= near.unsqueeze(1)
    weights = slopes.abs() / torch.where(at_center, 1.0, distance)
    if at_center.any():
        weights = torch.where(at_center, _curvature(energy, each).to(wide), weights)
    share = shares.mT.unsqueeze(-1).to(wide)
    known = ~at_center | (weights > 0)
    return (share * slopes).sum(2), (share * weights).sum(2), (share * known).sum(2)


def _resize(kernel: Kernel, points: PointSets, shares: Tensor, centers: Tensor, scales: Tensor, floor: float) -> Tensor:
    """Return scales (B, K) after the M-step of a Gaussian or its IRLS form; the expected energy does not increase."""

    def expected(log_scales: Tensor) -> Tensor:
        return _sum(shares * energies_of(kernel, points.x, centers, log_scales.squeeze(-1).exp()))

    log_scales = scales.log().unsqueeze(-1)
    slope = _slope(expected, log_scales)
    ratio = (1.0 - slope / points.x.shape[-1]).clamp(1.0 / _LARGEST_RATIO, _LARGEST_RATIO)
    low = torch.full_like(log_scales, 0.5 * math.log(floor))
    return _search(expected, log_scales, (0.5 * ratio.log()).to(scales.dtype), slope, low, None).squeeze(-1).exp()


def _search(
    expected: Callable[[Tensor], Tensor], before: Tensor, step: Tensor, slope: Tensor, low: Tensor, high: Tensor | None
) -> Tensor:
    """Return parameters (B, K, .) after the longest step, halved from 1, that lowers the expected energy (B, K).

    The step length is not differentiated.
    """

    def place(t: Tensor) -> Tensor:
        return (before + t.unsqueeze(-1) * step).clamp(low, high)

    with torch.no_grad():
        least = expected(before)
        t = torch.ones_like(least, dtype=before.dtype)
        for _ in range(_HALVINGS):
            there = place(t)
            lower = expected(there) <= least + _ARMIJO * (slope * (there - before)).sum(-1)
            if lower.all():
                break
            t = torch.where(lower, t, 0.5 * t)
    return torch.where(lower.unsqueeze(-1), place(t), before)


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient of the sum of a function, itself differentiable where gradients are recorded."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        at = at if recorded and at.requires_grad else at.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(at).sum(), at, create_graph=recorded)
    return slope


def _curvature(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the nonnegative second derivative as a constant, zero where the energy has a kink."""
    with torch.enable_grad():
        at = at.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(at).sum(), at, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros_like(at)
        (found,) = torch.autograd.grad(slope.sum(), at, materialize_grads=True)
    return found.nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)


def _sum(values: Tensor) -> Tensor:
    """Return the sum over points of (B, N, K)."""
    return values.sum(1, dtype=accumulation_dtype(values))
