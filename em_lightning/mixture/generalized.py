r"""Mixtures under any kernel, and a generalized M-step that needs nothing of it but its energy.

The expected energy of a component, :math:`Q_k(\mu) = \sum_n w_n r_{nk} \, d(x_n, \mu)`, has the slope
:math:`\sum_n w_n r_{nk} \, g_n`, :math:`g_n = \partial d(x_n, \mu) / \partial \mu`. A kernel of a difference pulls
along it, :math:`g_n = u_n (\mu - x_n)`, and its M-step reweights: :math:`\mu = \sum r u x / \sum r u`. Here
:math:`u_n = |g_n| / |\mu - x_n|`, feature by feature, is read off the slopes, and off the curvature of a point at the
center, so the same step

.. math:: \mu \leftarrow \mu - t \, \frac{\sum_n w_n r_{nk} \, g_n}{\sum_n w_n r_{nk} \, u_n}

is the weighted mean for a Gaussian, the reweighted one for a robust kernel and a scaled gradient step for any other.
:math:`t` is halved from 1 on until the expected energy falls (Armijo), and is 0 where it does not.
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

# Numbers (B, K, n, D) of a block of points.
_BLOCK = 2**22
_HALVINGS = 30
# The share of the decrease that the slope promises, of which a step has to keep its word.
_ARMIJO = 1e-4
# A point this near to a center, as a share of the box, tells by its curvature alone how strongly it is pulled.
_NEAR = 1e-9
# The least share of the points that tell, and the least pull, that a step is made of: gradients have their squares.
_TELLING = 1e-30
# The most that one step may change a squared scale, as a ratio.
_RATIO = 16.0


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
    counts: (B, N), weights with mean 1 over the points that count.
    low: (B, 1, D), the lower corner of the box that centers stay in.
    high: (B, 1, D), the upper one.
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
    joined, counted = join_weights(mask, weights, x.dtype)
    if joined is None or counted is None:
        return PointSets(x, torch.ones_like(x[..., 0]), x.amin(1, keepdim=True), x.amax(1, keepdim=True))
    counted = counted.unsqueeze(-1)
    some = counted.any(1, keepdim=True)
    low = torch.where(counted, x, torch.inf).amin(1, keepdim=True)
    high = torch.where(counted, x, -torch.inf).amax(1, keepdim=True)
    low, high = torch.where(some, low, 0.0), torch.where(some, high, 0.0)
    return PointSets(torch.where(counted, x, 0.0), joined, low, high)


def energies_of(kernel: Kernel, x: Tensor, centers: Tensor, scales: Tensor | None) -> Tensor:
    """Return ``d(x / s_k, mu_k / s_k) + D log s_k`` (B, N, K); without scales, which are 1, in one call."""
    if scales is None:
        return kernel(x, centers)
    own = scales[..., None, None]
    energies = kernel(x.unsqueeze(1) / own, centers.unsqueeze(2) / own).squeeze(-1).mT
    return energies + x.shape[-1] * scales.log().unsqueeze(1)


def generalized_step(
    kernel: Kernel, points: PointSets, mixture: Parameters, *, estimate_scale: bool, floor: float, num_steps: int
) -> Parameters:
    """Return the mixtures after an iteration of generalized EM: no iteration lowers the objective.

    Args:
        kernel: the energy.
        points: the point sets.
        mixture: centers as means and scales as covariances.
        estimate_scale: whether scales are fitted.
        floor: the least square of a scale.
        num_steps: steps of centers, and of scales, on the expected energy.
    """
    scales = mixture.covariances if estimate_scale else None
    joint = mixture.log_weights.unsqueeze(1) - energies_of(kernel, points.x, mixture.means, scales)
    log_shares = joint.log_softmax(-1)
    mass = _sum(log_shares.exp() * points.counts.unsqueeze(-1))
    guarded = mass + 10.0 * torch.finfo(mass.dtype).eps
    log_weights = guarded.log() - guarded.sum(-1, keepdim=True).log()
    shares = _within_components(log_shares, points.counts)
    centers, scales = mixture.means, mixture.covariances
    for _ in range(num_steps):
        centers = _move(kernel, points, shares, centers, scales if estimate_scale else None)
        if estimate_scale:
            scales = _resize(kernel, points, shares, centers, scales, floor)
    return Parameters(log_weights, centers, scales)


def _within_components(log_shares: Tensor, counts: Tensor) -> Tensor:
    """Return the shares (B, N, K) that points have in each component, which add up to 1 over points that count.

    Taken from logarithms, so that a component that is nobody's first choice still has its points, and gradients.
    """
    largest = (log_shares + counts.unsqueeze(-1).log()).detach().amax(1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    # Points of no weight may be beyond the largest of those that have one.
    beyond = 0.5 * math.log(torch.finfo(log_shares.dtype).max)
    parts = (log_shares - largest).clamp(max=beyond).exp() * counts.unsqueeze(-1)
    total = parts.sum(1, keepdim=True)
    return parts / torch.where(total > 0, total, 1.0)


def _move(kernel: Kernel, points: PointSets, shares: Tensor, centers: Tensor, scales: Tensor | None) -> Tensor:
    """Return centers (B, K, D) of no larger expected energy."""
    near = _NEAR * (points.high - points.low).detach()
    rows = _BLOCK // max(centers.numel(), 1) or 1
    parts = [
        _pulls(kernel, x, share, centers, scales, near)
        for x, share in zip(points.x.split(rows, 1), shares.split(rows, 1), strict=True)
    ]
    slope, pull, told = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    # Points that do not tell their pull are taken to have that of the others; where none does, all lie at the center,
    # which goes where they go.
    known = (told > _TELLING) & (pull > _TELLING)
    drift = (shares.mT @ points.x.to(shares.dtype)).to(centers.dtype) - centers
    step = -slope * told / torch.where(known, pull, 1.0)
    step = torch.where(known, step.to(centers.dtype), drift - drift.detach())

    def place(t: Tensor) -> Tensor:
        return (centers + t.unsqueeze(-1) * step).clamp(points.low, points.high)

    def decrease(place: Tensor) -> Tensor:
        return (slope * (place - centers)).sum(-1)

    return _search(lambda place: _sum(shares * energies_of(kernel, points.x, place, scales)), centers, place, decrease)


def _pulls(
    kernel: Kernel, x: Tensor, shares: Tensor, centers: Tensor, scales: Tensor | None, near: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums (B, K, D) over points: slopes, pulls, and the shares of the points that tell their pull."""
    own = torch.ones_like(centers[..., 0]) if scales is None else scales
    own = own[..., None, None]

    def energy(each: Tensor) -> Tensor:
        return kernel((x.unsqueeze(1) / own).unsqueeze(-2), (each / own).unsqueeze(-2))

    each = centers.unsqueeze(2).expand(-1, -1, x.shape[1], -1)  # a center of its own for each point
    # In double: the slope of a quotient is a quotient of squares, which float32 does not hold where points are small.
    wide = accumulation_dtype(x)
    slopes = _slope(energy, each).to(wide)
    apart = (each - x.unsqueeze(1)).abs().to(wide)
    beside = apart <= near.unsqueeze(1)
    pulls = slopes.abs() / torch.where(beside, 1.0, apart)
    if beside.any():
        pulls = torch.where(beside, _curvature(energy, each).to(wide), pulls)
    share = shares.mT.unsqueeze(-1).to(wide)
    told = ~beside | (pulls > 0)
    return (share * slopes).sum(2), (share * pulls).sum(2), (share * told).sum(2)


def _resize(kernel: Kernel, points: PointSets, shares: Tensor, centers: Tensor, scales: Tensor, floor: float) -> Tensor:
    r"""Return scales (B, K) of no larger expected energy: a Gaussian's M-step, reweighted as that of the centers is."""
    features = points.x.shape[-1]

    def expected(log_scales: Tensor) -> Tensor:
        return _sum(shares * energies_of(kernel, points.x, centers, log_scales.exp()))

    log_scales = scales.log()
    slope = _slope(expected, log_scales)
    ratio = (1.0 - slope / features).clamp(1.0 / _RATIO, _RATIO)
    step = (0.5 * ratio.log()).to(scales.dtype)

    def place(t: Tensor) -> Tensor:
        return (log_scales + t * step).clamp(min=0.5 * torch.as_tensor(floor, dtype=scales.dtype).log().item())

    def decrease(place: Tensor) -> Tensor:
        return slope * (place - log_scales)

    return _search(expected, log_scales, place, decrease).exp()


def _search(
    expected: Callable[[Tensor], Tensor],
    before: Tensor,
    place: Callable[[Tensor], Tensor],
    decrease: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return parameters of components at the first step, halved from 1 on, whose expected energy (B, K) falls enough.

    The length of a step is a constant of the gradient, as it is but where a step is just as good as another.
    """
    with torch.no_grad():
        least = expected(before)
        t = torch.ones_like(least, dtype=before.dtype)
        for _ in range(_HALVINGS):
            there = place(t)
            good = expected(there) <= least + _ARMIJO * decrease(there)
            if good.all():
                break
            t = torch.where(good, t, 0.5 * t)
        taken = good.reshape(*good.shape, *[1] * (before.ndim - 2))
    return torch.where(taken, place(t), before)


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient of the sum of a function, itself differentiable where gradients are recorded."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        at = at if keep and at.requires_grad else at.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(at).sum(), at, create_graph=keep)
    return slope


def _curvature(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the second derivative, a constant: what a smooth energy pulls by at its center, and zero at a corner."""
    with torch.enable_grad():
        at = at.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(at).sum(), at, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros_like(at)
        (found,) = torch.autograd.grad(slope.sum(), at, allow_unused=True)
    return torch.zeros_like(at) if found is None else found.nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)


def _sum(shares: Tensor) -> Tensor:
    """Return the sum over points of (B, N, K)."""
    return shares.sum(1, dtype=accumulation_dtype(shares))
