"""Initialization of EM: farthest points, k-means++, random points, Lloyd, and the mixture around centers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from em_lightning.mixture.backends import sum_blocks
from em_lightning.mixture.covariance import Covariance
from em_lightning.mixture.e_step import SufficientStatistics
from em_lightning.mixture.m_step import m_step
from em_lightning.mixture.parameters import Parameters
from em_lightning.mixture.points import Points, features_first

# The core of a cell: points nearer to the center than this fraction of the cell's mean squared distance.
_CORE = 0.4
# Numbers per temporary tensor.
_BLOCK_SIZE = 2**18
# GPUs need larger temporaries to use all cores.
_DEVICE_BLOCK_SIZE = 2**27
# Compute distances from differences, because expanded squares cancel.
_EXACT = "donot_use_mm_for_euclid_dist"


@torch.no_grad()
def farthest_points(
    x: Tensor, num_components: int, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Choose centers (B, K, D) among points (B, N, D) one by one, each the point farthest from the centers so far.

    The first is the point farthest from the mean. Nothing is random, and the order of the points matters only between
    exact ties. Sets with fewer distinct points than components repeat a point.

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985.
    """
    points, counts = _laid_out(x, mask, weights)
    center = (points * counts.unsqueeze(1)).sum(-1) / counts.sum(-1, keepdim=True).clamp(min=1e-30)
    farthest = torch.where(counts > 0, torch.inf, -1.0)  # points that do not count are never chosen
    chosen = []
    for step in range(num_components):
        if step <= 1:  # distances from the mean determine the first center only
            nearest = farthest
        nearest = _lower_distances(points, center, nearest)
        center = _pick(points, nearest.argmax(-1, keepdim=True)).squeeze(-1)
        chosen.append(center)
    return torch.stack(chosen, 1)


@torch.no_grad()
def kmeans_plus_plus(
    x: Tensor,
    num_components: int,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw centers (B, K, D) with probability proportional to the squared distance from the nearest earlier center.

    Each draw is greedy: it keeps the best of ``2 + floor(ln K)`` candidates by the sum of squared distances.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007.
    """
    points, counts = _laid_out(x, mask, weights)
    counts = torch.where(counts.sum(-1, keepdim=True) > 0, counts, 1.0)  # sets without points draw from all rows
    candidates = 2 + int(math.log(num_components))
    nearest = torch.full_like(counts, torch.inf)
    center = _pick(points, torch.multinomial(counts, 1, generator=generator)).squeeze(-1)
    chosen = [center]
    for _ in range(num_components - 1):
        nearest = _lower_distances(points, center, nearest)
        potential = nearest * counts
        # All distances are zero: draw in proportion to the weights.
        potential = torch.where(potential.sum(-1, keepdim=True) > 0, potential, counts)
        drawn = _pick(points, torch.multinomial(potential, candidates, replacement=True, generator=generator))
        totals = torch.zeros_like(drawn[:, 0])
        for rows in _row_blocks(points, max(candidates, points.shape[1])):
            part = points[:, :, rows]
            distances = torch.stack([_squared_distance(part, candidate) for candidate in drawn.unbind(-1)], 1)
            distances = torch.minimum(distances, nearest[:, None, rows])
            totals = totals + torch.bmm(distances, counts[:, rows].unsqueeze(-1)).squeeze(-1)
        center = _pick(drawn, totals.argmin(-1, keepdim=True)).squeeze(-1)
        chosen.append(center)
    return torch.stack(chosen, 1)


@torch.no_grad()
def random_points(
    x: Tensor,
    num_components: int,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw centers (B, K, D) among the points in proportion to their weights, without replacement while possible."""
    points, counts = _laid_out(x, mask, weights)
    # Gumbel top-k: the points with the largest log(w) + noise are a draw without replacement.
    noise = torch.rand(counts.shape, generator=generator, device=counts.device, dtype=counts.dtype)
    keys = counts.log() - (-noise.clamp(min=1e-30).log()).log()
    order = torch.where(counts > 0, keys, -torch.inf).topk(min(num_components, counts.shape[1])).indices
    valid = (counts > 0).sum(-1, keepdim=True).clamp(min=1)
    rank = torch.arange(num_components, device=order.device) % valid
    return _pick(points, order.gather(1, rank % order.shape[1])).mT.contiguous()


# Functions (points, number of centers, mask, weights, generator) -> centers (B, K, D).
CENTERS: dict[str, Callable[..., Tensor]] = {
    "farthest": lambda x, count, mask=None, weights=None, generator=None: farthest_points(x, count, mask, weights),
    "kmeans++": kmeans_plus_plus,
    "random": random_points,
}


@torch.no_grad()
def lloyd(
    x: Tensor, centers: Tensor, num_steps: int, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Return centers (B, K, D) after steps of k-means on points (B, N, D).

    The sum of squared distances never rises. A center without points stays where it is.

    Source: Lloyd, Least Squares Quantization in PCM, 1982.
    """
    points, counts = _laid_out(x, mask, weights)
    for _ in range(num_steps):
        mass, total = torch.zeros_like(centers[..., :1]), torch.zeros_like(centers)
        for rows in _row_blocks(points, max(centers.shape[1:])):
            part = points[:, :, rows].mT
            cell = torch.cdist(centers, part, compute_mode=_EXACT).argmin(1)
            members = _members(cell, counts[:, rows], centers.shape[1])
            mass, total = mass + members.sum(-1, keepdim=True), total + members @ part
        centers = torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), centers)
    return centers


def parameters_around(points: Points, centers: Tensor, covariance: Covariance, floor: Tensor) -> Parameters:
    """Return the mixture of the cells (the points nearest to each center), differentiable in the points.

    Weights are those of the cells. Means and correlations are those of a cell's core, the points nearer to the center
    than ``_CORE`` of the cell's mean squared distance: the rim of a cell contains points of other clusters, which slow
    down EM. The trace of a covariance is that of the cell. Small cores use the covariance of their cell, small cells
    the variance shared by all cells. Centers (B, K, D) are in the coordinates of the points.
    """
    features, components = centers.shape[-1], centers.shape[1]
    family = covariance.unrestricted
    cell, squared = _nearest(points, centers)
    counts = torch.ones_like(squared) if points.weights is None else points.weights
    cells = _cell_statistics(points, cell, counts, components)
    inertia = torch.zeros_like(cells.mass).scatter_add(1, cell, squared * counts.detach())
    reach = _CORE * inertia / cells.mass.detach().clamp(min=1.0)
    cores = _cell_statistics(points, cell, counts * (squared <= reach.gather(1, cell)), components)
    unit = family.expand(torch.ones_like(points.mean), components)
    of_cells, of_cores = m_step(cells, family, floor, unit), m_step(cores, family, floor, unit)

    size = family.diagonal(of_cells.covariances, features).sum(-1)
    offset = (of_cells.means - centers).square().sum(-1)
    within = (cells.mass * (size + offset)).sum(-1) / (features * points.mass.clamp(min=1.0))
    within = torch.maximum(within, floor)
    shared = family.scaled(unit, within.unsqueeze(-1).expand_as(cells.mass))
    enough, some = cores.mass > 2 * features, cells.mass > 0
    means = torch.where(enough.unsqueeze(-1), of_cores.means, of_cells.means)
    means = torch.where(some.unsqueeze(-1), means, centers)
    covariances = of_cells.covariances
    if covariance.sharing(components) == 1:  # a tied covariance needs no fallback
        ratio = size / family.diagonal(of_cores.covariances, features).sum(-1)
        covariances = _choose(enough, family.scaled(of_cores.covariances, ratio), covariances)
        covariances = _choose(cells.mass > features, covariances, shared)
    return Parameters(of_cells.log_weights, means, covariance.from_public(covariances))


@torch.no_grad()
def _nearest(points: Points, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest center of each point and the squared distance to it, both (B, N)."""
    found = []
    for rows in _row_blocks(points.x, max(centers.shape[1], points.x.shape[1])):
        z = points.coordinates(points.x.detach()[:, :, rows])  # without the tangents of forward-mode derivatives
        distance, cell = torch.cdist(centers, z.mT, compute_mode=_EXACT).min(1)
        found.append((cell, distance.square()))
    cells, squares = zip(*found, strict=True)
    return torch.cat(cells, 1), torch.cat(squares, 1)


def _cell_statistics(points: Points, cell: Tensor, counts: Tensor, num_components: int) -> SufficientStatistics:
    """Return the statistics of points that belong to one component each."""

    def moments_of_block(sets: slice, block: Tensor, cell: Tensor, counts: Tensor) -> tuple[Tensor]:
        return (_members(cell, counts, num_components) @ points.lift(block, sets).mT,)

    width = max(num_components, points.features(points.mean[:1, :, None]).shape[1])
    (moments,) = sum_blocks(moments_of_block, (points.x, cell, counts), (), width)
    mass, first, second = moments.tensor_split([1, 1 + points.num_features], -1)
    zeros = torch.zeros_like(points.mass)
    return SufficientStatistics(mass[..., 0], mass[..., 0], first, second, zeros, zeros, points.num_points)


def _members(cell: Tensor, counts: Tensor, num_components: int) -> Tensor:
    """Return responsibilities (B, K, n) of points that belong to one component each, times their weights (B, n)."""
    members = counts.new_zeros(cell.shape[0], num_components, cell.shape[1])
    return members.scatter(1, cell.unsqueeze(1), counts.unsqueeze(1))


def _choose(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return one tensor (B, K, ...) where a condition (B, K) holds, and the other elsewhere."""
    return torch.where(condition.reshape(*condition.shape, *[1] * (one.ndim - 2)), one, other)


def _laid_out(x: Tensor, mask: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return points (B, D, N), zero where they do not count, and their weights (B, N)."""
    counts = torch.ones_like(x[..., 0]) if weights is None else weights.to(x.dtype)
    if weights is not None:  # a common factor has no effect, even where it is below the smallest float32
        largest = weights.amax(-1, keepdim=True)
        counts = (weights / torch.where(largest > 0, largest, 1.0)).to(x.dtype)
    if mask is not None:
        x, counts = torch.where(mask.unsqueeze(-1), x, 0.0), torch.where(mask, counts, 0.0)
    return features_first(x), counts


def _row_blocks(rows: Tensor, width: int) -> list[slice]:
    """Return slices of N in (B, ., N), so that temporaries (B, width, n) have at most the block size."""
    sets, items = rows.shape[0], rows.shape[-1]
    block_size = _BLOCK_SIZE if rows.device.type == "cpu" else _DEVICE_BLOCK_SIZE
    size = max(block_size // max(sets * width, 1), 1)
    return [slice(row, row + size) for row in range(0, items, size)]


def _lower_distances(points: Tensor, center: Tensor, nearest: Tensor) -> Tensor:
    """Return squared distances (B, N), lowered to those of points (B, D, N) from a center (B, D) of each set."""
    lowered = [
        torch.minimum(nearest[:, rows], _squared_distance(points[:, :, rows], center))
        for rows in _row_blocks(points, points.shape[1])
    ]
    return lowered[0] if len(lowered) == 1 else torch.cat(lowered, 1)


def _squared_distance(points: Tensor, center: Tensor) -> Tensor:
    """Return the squared distances (B, n) of points (B, D, n) from a center (B, D) of each set."""
    return (points - center.unsqueeze(-1)).square().sum(1)


def _pick(points: Tensor, index: Tensor) -> Tensor:
    """Return some points (B, D, C) of each set, by their rows (B, C)."""
    return points.gather(2, index.unsqueeze(1).expand(-1, points.shape[1], -1))
