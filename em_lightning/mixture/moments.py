"""Moments and log-densities of points under a mixture, each cloud in the precision that it needs.

Products are taken in float32 while that is accurate and in float64, at about twice the cost, where it is not: the
terms of ``theta . phi`` of a component that is thin beside its cloud are large and cancel. How large is known before
the pass, since ``|theta_f phi_f(x)|`` is at most ``|theta_f| phi_f(e)`` with ``e`` the largest coordinates of the
cloud, and the choice is made for each cloud.
"""

from __future__ import annotations

import torch
from torch import Tensor

from em_lightning.mixture.cloud import Cloud, Ready
from em_lightning.mixture.passes import Features, LogDensity, Moments, Plan

# Float32 is accurate while the terms of a log-density are no larger than this: rounding is then below 1e-3 for the
# worst point, and far less in a mean over points (docs/results/operator.md).
_LARGEST_TERM = 5e3
# A gradient of natural parameters is as large as the third power of a coordinate: beyond, it is none of float32's.
_LARGEST_POINT = 1e12
# One of moments is as large as the fourth power of what components are narrower than. A cloud counts as no smaller, so
# that components which float32 loses so are thin beside it.
_SMALLEST_CLOUD = 1e-8
# And it is divided by the mass of the cloud, which may be none but for a guard.
_LEAST_MASS = 1e-6
# In double precision, which then rounds by some 1e-5; beyond, points are taken about the mean of each component.
LARGEST_IN_DOUBLE = 1e10
# Features of that many bytes are kept between iterations.
_KEPT = 2**25


def get_ready(cloud: Cloud, structure: Features, mass: Tensor | None = None) -> Ready:
    """Return what passes over the points of clouds share; features only where they take little memory.

    Args:
        cloud: the point sets.
        structure: the covariance structure.
        mass: (B,), what moments will be divided by, if they will be.
    """
    points, extent = cloud.points.detach(), _extent(cloud)
    extent = extent if points.dtype == torch.float64 else extent.clamp(min=_SMALLEST_CLOUD)
    never = (extent > _LARGEST_POINT).any(-1)
    never = never if mass is None else never | (mass < _LEAST_MASS)
    limit = torch.where(never, -1.0, _LARGEST_TERM)
    size = structure.num_moments(points.shape[1]) * points[:, 0].numel() * points.element_size()
    return Ready(extent, limit, structure.features(cloud.part().detach(), points.dtype) if size <= _KEPT else None)


def _extent(cloud: Cloud) -> Tensor:
    """Return the largest coordinates (B, D) of clouds."""
    points = cloud.points.detach()
    low, high = points.aminmax(dim=2) if points.shape[2] else (torch.zeros_like(points.sum(2)),) * 2
    if cloud.shift is not None:
        low, high = low - cloud.shift.detach(), high - cloud.shift.detach()
    return torch.maximum(-low, high).to(points.dtype)


def accumulate(
    cloud: Cloud,
    theta: Tensor,
    structure: Features,
    precision: torch.dtype | None = None,
    likelihood: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Return the moments under the responsibilities of ``theta`` (B, K, F), and the log-likelihood.

    The moments are ``sum_n w_n r_nk phi(x_n)``, (B, K, F) in the type of ``theta``; the log-likelihood is
    ``sum_n w_n log sum_k exp(theta_k . phi(x_n))``, (B,), and has no gradient.

    Args:
        cloud: the point sets.
        theta: (B, K, F), natural parameters.
        structure: whose features phi are.
        precision: of the products; chosen for each cloud unless given.
        likelihood: whether the log-likelihood is wanted; ``None`` otherwise.
    """
    moments, found = _by_precision(Moments, cloud, theta, structure, precision, likelihood)
    return moments, found if likelihood else None


def log_density(cloud: Cloud, theta: Tensor, structure: Features, precision: torch.dtype | None = None) -> Tensor:
    """Return ``log sum_k exp(theta_k . phi(x_n))`` (B, N) of the points of clouds."""
    return _by_precision(LogDensity, cloud, theta, structure, precision)[0]


def _by_precision(
    function: type[Moments] | type[LogDensity],
    cloud: Cloud,
    theta: Tensor,
    structure: Features,
    precision: torch.dtype | None,
    likelihood: bool = False,
) -> tuple[Tensor, ...]:
    """Return what a pass over the points gives, in the precision that each cloud needs."""
    ready = get_ready(cloud, structure) if cloud.ready is None else cloud.ready

    def run(theta: Tensor, precision: torch.dtype, chosen: Tensor | None) -> tuple[Tensor, ...]:
        plan = Plan(structure, ready.features, precision, chosen, likelihood)
        return function.apply(cloud.points, cloud.shift, cloud.weights, theta, plan)

    usual = torch.promote_types(cloud.points.dtype, torch.float32)
    if precision is not None or usual == theta.dtype:
        return run(theta, precision or usual, None)
    thin = ~(largest_term(theta, ready.extent, structure) <= ready.limit)
    count = int(thin.sum())
    if count in (0, len(thin)):
        return run(theta, theta.dtype if count else usual, None)
    wide = thin.nonzero().squeeze(1)
    narrow = None if 2 * count <= len(thin) else (~thin).nonzero().squeeze(1)
    # A few thin clouds are passed over twice rather than all the others copied, the first time under no parameters.
    parts = run(theta if narrow is not None else torch.where(thin[:, None, None], 0.0, theta), usual, narrow)
    again = run(theta, theta.dtype, wide)
    if narrow is not None:
        parts = tuple(part.new_zeros(len(thin), *part.shape[1:]).index_copy(0, narrow, part) for part in parts)
    return tuple(part.index_copy(0, wide, other) for part, other in zip(parts, again, strict=True))


@torch.no_grad()
def largest_term(theta: Tensor, extent: Tensor, structure: Features) -> Tensor:
    """Return how large the terms of ``theta . phi(x)`` are together, (B,), for points within the extent (B, D).

    Terms are rounded independently of each other: it is their squares that add up.
    """
    squares = structure.features(extent.unsqueeze(-1), theta.dtype).square()
    return torch.bmm(theta.square(), squares).amax((1, 2)).sqrt()


@torch.no_grad()
def lost_digits(before: Tensor, after: Tensor, cloud: Cloud, structure: Features) -> bool:
    """Return whether an M-step made components so thin that float32 moments do not determine them.

    The E-step before it saw components for which float32 was enough. A loop that comes here in small steps has
    changed to float64 on its way.

    Args:
        before: natural parameters (B, K, F) of the E-step.
        after: natural parameters that the M-step led to.
        cloud: the point sets.
        structure: the covariance structure.
    """
    extent, limit, _ = get_ready(cloud, structure) if cloud.ready is None else cloud.ready
    narrow = largest_term(before, extent, structure) <= limit
    # Written so that NaN counts as thin.
    return bool((narrow & ~(largest_term(after, extent, structure) <= 10.0 * limit)).any())


@torch.no_grad()
def may_lose_all_digits(cloud: Cloud, floor: Tensor) -> bool:
    """Return whether components of variances no smaller than a floor (B,) may be lost in double precision."""
    if cloud.ready is None or torch.compiler.is_compiling():
        return False
    return bool((2.0 * cloud.ready.extent.to(floor).square().sum(-1) > LARGEST_IN_DOUBLE * floor).any())


@torch.no_grad()
def loses_all_digits(cloud: Cloud, theta: Tensor, structure: Features) -> Tensor | None:
    """Return in which clouds (B,) not even double precision holds the terms of ``theta . phi``; ``None`` for in none.

    As of two clusters 1e8 of their widths apart: energies are then differences of squares of 1e16.
    """
    transformed = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(theta)
    if transformed or theta.dtype != torch.float64 or cloud.points.numel() == 0:
        return None
    # A bound that takes no time comes first.
    reach = torch.linalg.vector_norm(cloud.points if cloud.ready is None else cloud.ready.extent, torch.inf)
    if cloud.ready is None and cloud.shift is not None:
        reach = reach + torch.linalg.vector_norm(cloud.shift, torch.inf)
    largest = torch.linalg.vector_norm(theta, torch.inf) * reach.double().square().clamp(min=1.0)
    if float(largest) * theta.shape[-1] <= LARGEST_IN_DOUBLE:
        return None
    extent = _extent(cloud) if cloud.ready is None else cloud.ready.extent
    lost = largest_term(theta, extent, structure) > LARGEST_IN_DOUBLE
    return lost if bool(lost.any()) else None
