"""Initialization of EM: farthest points, k-means++, random points, and the mixture around centers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from em_lightning.competition.entropic import cumulative_sum
from em_lightning.mixture.backends import map_blocks, native, sum_blocks
from em_lightning.mixture.covariance import COVARIANCES, Covariance
from em_lightning.mixture.e_step import SufficientStatistics
from em_lightning.mixture.m_step import m_step
from em_lightning.mixture.points import Parameters, Points, features_first

# The core of a cell: points whose squared distance from the center is at most this fraction of its mean. Without
# cores, fits to samples of random mixtures lose 0.04 to 0.09 nats per point after 5 iterations; with fractions from 0.3
# to 0.6, the log-likelihood differs from that with 0.4 by -0.07 to 0.03.
_CORE = 0.4
# Compute distances from differences, because expanded squares cancel.
_EXACT = "donot_use_mm_for_euclid_dist"
# Numbers per block on a CPU and on other devices. Both are larger than in the E-step, as distances have fewer
# temporaries, and other devices are faster with few launches.
_BLOCK_SIZES = 2**19, 2**27


@torch.no_grad()
def farthest_points(x: Tensor, num_components: int, weights: Tensor | None = None) -> Tensor:
    """Choose centers (B, K, D) among points (B, N, D) one by one, each the point farthest from the centers so far.

    The first is the point farthest from the mean. Points of zero weight (B, N) are not chosen, but must be finite.
    Nothing is random, and the order of the points decides only exact ties. Sets of fewer than K points repeat a point.

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985.
    """
    points, weights = _weighted_points(x, weights)
    mean = (points * weights.unsqueeze(1)).sum(-1) / weights.sum(-1, keepdim=True).clamp(min=1.0)
    no_center = torch.where(weights > 0, torch.inf, -1.0)  # negative, so that points of zero weight are never chosen
    first = _lower_distances(no_center, points, mean.unsqueeze(-1)).argmax(-1)
    if kernels := native.triton_start(points, COVARIANCES["diag"]):
        return _pick(points, kernels.choose_centers(points, no_center, first, num_components)).mT
    centers, distances = [_pick(points, first)], no_center
    for _ in range(num_components - 1):
        lowered = _lower_distances(distances, points, centers[-1])
        distances = lowered.squeeze(1)
        centers.append(_pick(points, lowered.argmax(-1)))
    return torch.cat(centers, 2).mT


@torch.no_grad()
def kmeans_plus_plus(
    x: Tensor, num_components: int, weights: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw centers (B, K, D) in proportion to weight times squared distance from the nearest earlier center.

    Each draw is greedy: it keeps the best of ``2 + floor(ln K)`` candidates by the sum of squared distances.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007.
    """
    points, weights = _weighted_points(x, weights)
    weights = weights + (weights.sum(-1, keepdim=True) == 0)  # sets without points draw from all rows
    size = num_components, x.shape[0], 2 + int(math.log(num_components))  # the last is the number of candidates
    uniform = torch.rand(size, generator=generator, dtype=torch.float64, device=x.device) * (1.0 - 1e-15)  # see below
    potential, distances = weights, torch.full_like(weights, torch.inf)
    centers: list[Tensor] = []
    for numbers in uniform:
        total = cumulative_sum(potential.double(), -1)
        thresholds = numbers * total[:, -1:]  # below the total even after rounding, as numbers are at most 1 - 1e-15
        rows = torch.searchsorted(total, thresholds, right=True).clamp(max=x.shape[1] - 1)
        if not centers and (kernels := native.triton_start(points, COVARIANCES["diag"])):
            rows = kernels.choose_centers(points, distances, rows[:, :1], num_components, weights, uniform)
            return _pick(points, rows).mT
        candidates = _pick(points, rows if centers else rows[:, :1])
        lowered = _lower_distances(distances, points, candidates)
        best = (lowered * weights.unsqueeze(1)).sum(-1).argmin(1, keepdim=True)
        distances = _pick(lowered.mT, best).squeeze(-1)
        potential = distances.clamp(min=torch.finfo(x.dtype).tiny) * weights  # if all distances are 0, as the weights
        centers.append(_pick(candidates, best))
    return torch.cat(centers, 2).mT


@torch.no_grad()
def random_points(
    x: Tensor, num_components: int, weights: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw centers (B, K, D) among the points in proportion to their weights, without replacement while possible."""
    points, weights = _weighted_points(x, weights)
    # Gumbel top-k: the points with the largest log(w) + noise are a draw without replacement.
    uniform = torch.rand(weights.shape, generator=generator, device=weights.device, dtype=weights.dtype)
    gumbel = -(-uniform.clamp(min=1e-30).log()).log()  # avoids log(0)
    keys = torch.where(weights > 0, weights.log() + gumbel, -torch.inf)
    order = keys.topk(min(num_components, weights.shape[1])).indices
    # A set with fewer points than components repeats them in turn.
    rank = torch.arange(num_components, device=order.device) % (weights > 0).sum(-1, keepdim=True).clamp(min=1)
    return _pick(points, order.gather(1, rank)).mT.contiguous()


# Functions (points, number of centers, weights, generator) -> centers (B, K, D).
CENTERS: dict[str, Callable[..., Tensor]] = {
    "farthest": lambda x, count, weights=None, generator=None: farthest_points(x, count, weights),
    "kmeans++": kmeans_plus_plus,
    "random": random_points,
}


def parameters_around(points: Points, centers: Tensor, covariance: Covariance, floor: Tensor) -> Parameters:
    """Return a mixture around centers (B, K, D) in the user's units, differentiable in the points.

    A cell holds the points nearest to a center; its core those whose squared distance is at most ``_CORE`` times the
    mean one, because points of other clusters at the rim slow down EM. Each component has the weight of its cell. If
    the core has more than 2 D points, the component has the mean and covariance of the core, which is scaled to the
    trace of the cell's covariance; otherwise it has those of the cell. A cell of at most D points gets a spherical
    covariance instead of a singular one: the mean squared distance of all points from their centers, per feature. A
    shared covariance is that of all cells. Covariances have the form of the EM loop, see ``covariance.from_public``.
    """
    num_components, num_features = centers.shape[1:]
    unrestricted, is_shared = covariance.unrestricted, covariance.sharing(num_components) > 1
    kernels = None if is_shared else native.triton_start(points.x, unrestricted, points.weights)
    if kernels:
        log_weights, means, found = kernels.parameters_of_cells(points, centers, floor, _CORE, unrestricted.native_kind)
        return Parameters(log_weights, means, covariance.from_public(found))
    centers = points.frame.enter(centers.to(floor.dtype).mT).mT
    cell, distances = _nearest_centers(points, centers)
    weights = torch.ones_like(distances) if points.weights is None else points.weights
    total, cell_mass = (
        torch.zeros_like(centers[..., 0]).scatter_add(1, cell, part.detach()) for part in (distances * weights, weights)
    )
    in_core = distances <= (_CORE * total / cell_mass.clamp(min=1.0)).gather(1, cell)
    weights = torch.stack([weights, weights * in_core], 1)
    fitted = fit_cells(points, cell, weights, num_components, unrestricted, floor)
    (mass, core_mass), (log_weights, _), (means, core_means), pair = (part.unflatten(0, (2, -1)) for part in fitted)
    has_core = core_mass > 2 * num_features  # fewer points give a nearly singular covariance
    covariances, core_covariances = pair
    if not is_shared:  # else fit_cells gave the covariance of all cells together
        trace, core_trace = (unrestricted.diagonal(part, num_features).sum(-1) for part in pair)
        of_cores = unrestricted.scaled(core_covariances, trace / core_trace)  # unscaled, they are too narrow
        second_moment = trace + (means - _with_gradient(points, centers, cell, distances)).square().sum(-1)
        variance = (mass * second_moment).sum(-1) / (num_features * points.mass.clamp(min=1.0))  # of all cells together
        variance = torch.maximum(variance, floor).unsqueeze(-1).expand(-1, num_features)
        pooled = unrestricted.expand(variance, num_components)
        covariances = _choose(mass > num_features, _choose(has_core, of_cores, covariances), pooled)
    means = _choose(mass > 0, _choose(has_core, core_means, means), centers)
    return Parameters(log_weights, means, covariance.from_public(covariances))


def fit_cells(
    points: Points, cell: Tensor, weights: Tensor, num_components: int, family: Covariance, floor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return masses (C * B, K) and the M-step of cells (B, N), for each of C weights of points (B, C, N)."""
    count = weights.shape[1]

    def moments_of_block(sets: slice, block: Tensor, cell: Tensor, weights: Tensor) -> tuple[Tensor]:
        zeros = weights.new_zeros(*weights.shape[:2], num_components, cell.shape[1])
        responsibilities = zeros.scatter(2, cell[:, None, None].expand(-1, count, -1, -1), weights.unsqueeze(2))
        return (responsibilities.flatten(1, 2) @ family.features(points.coordinates(block, sets)).mT,)

    size_of_phi = family.features(points.mean.unsqueeze(2)).shape[1]  # F
    numbers_per_point = max(count * num_components, size_of_phi)
    (moments,) = sum_blocks(moments_of_block, (points.x, cell, weights), (), numbers_per_point, _BLOCK_SIZES)
    mass, first, second = torch.cat(moments.chunk(count, 1)).tensor_split([1, 1 + points.num_features], -1)
    mass, zeros = mass.squeeze(-1), torch.zeros_like(points.mass)
    unused = {"log_likelihood": zeros, "background_mass": zeros, "num_points": zeros}  # by the M-step below
    statistics = SufficientStatistics(mass, zeroth=mass, first=first, second=second, **unused)  # IRLS weights are 1
    before = family.expand(points.variance.repeat(count, 1), num_components)  # only its shape is read
    return mass, *m_step(statistics, family, floor.repeat(count), before)


def _with_gradient(points: Points, centers: Tensor, cell: Tensor, distances: Tensor) -> Tensor:
    """Return the centers, with the gradients of the points that coincide with them: those chosen as centers."""
    if not points.x.requires_grad and forward_ad.unpack_dual(points.x).tangent is None:
        return centers
    chosen = (distances == 0).to(centers.dtype)
    count = torch.zeros_like(centers[..., 0]).scatter_add(1, cell, chosen).clamp(min=1.0)
    coordinates = (points.coordinates() * chosen.unsqueeze(1)).mT
    total = torch.zeros_like(centers).scatter_add(1, cell.unsqueeze(-1).expand_as(coordinates), coordinates)
    return centers + (total - total.detach()) / count.unsqueeze(-1)


@torch.no_grad()
def _nearest_centers(points: Points, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest center of each point and the squared distance from it, both (B, N)."""

    def nearest_of_block(sets: slice, block: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        distance, cell = torch.cdist(centers, points.coordinates(block, sets).mT, compute_mode=_EXACT).min(1)
        return cell, distance.square()

    x = points.x.detach()  # without the tangents of forward-mode derivatives
    cell, distances = map_blocks(nearest_of_block, (x,), (centers,), max(centers.shape[1:]), _BLOCK_SIZES)
    return cell, distances


def _choose(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return one tensor (B, K, ...) where a condition (B, K) holds, and the other elsewhere."""
    return torch.where(condition.reshape(*condition.shape, *[1] * (one.ndim - 2)), one, other)


def _weighted_points(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return points (B, D, N) and their weights (B, N), of which the largest is 1."""
    if weights is None:
        weights = torch.ones_like(x[..., 0])
    else:  # divide before the conversion, because weights may be below the smallest number of x.dtype
        largest = weights.amax(-1, keepdim=True)
        weights = (weights / torch.where(largest > 0, largest, 1.0)).to(x.dtype)
    return features_first(x), weights


def _lower_distances(distances: Tensor, points: Tensor, centers: Tensor) -> Tensor:
    """Return minima (B, C, N) of distances (B, N) and squared distances of points (B, D, N) from centers (B, D, C)."""

    def lower_block(sets: slice, distances: Tensor, block: Tensor, centers: Tensor) -> tuple[Tensor]:
        squared = (block.unsqueeze(2) - centers.unsqueeze(-1)).square().sum(1)
        return (torch.minimum(distances.unsqueeze(1), squared),)

    return map_blocks(lower_block, (distances, points), (centers,), points.shape[1] * centers.shape[2], _BLOCK_SIZES)[0]


def _pick(points: Tensor, index: Tensor) -> Tensor:
    """Return some points (B, D, C) of each set, by their rows (B, C)."""
    return points.gather(2, index.unsqueeze(1).expand(-1, points.shape[1], -1))
