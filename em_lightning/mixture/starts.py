"""Where EM starts: centers of point sets, and a mixture around them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from em_lightning.mixture.cloud import Cloud, centred
from em_lightning.mixture.covariance import Structure
from em_lightning.mixture.factors import State, choose

# The share of a cell's mean squared distance that bounds its core.
_CORE = 0.4
# Numbers of a temporary: several of these and a few numbers a point are all the memory that a start takes.
_BLOCK = 2**18
# How distances are taken: not as differences of squares.
_EXACT = "donot_use_mm_for_euclid_dist"


def farthest_points(cloud: Cloud, num_components: int) -> Tensor:
    """Choose centers (B, K, D) one by one, each the point farthest from those before it.

    The first is the point farthest from the mean. Nothing is random, and the order of the points plays no part
    except between exact ties. Sets with fewer distinct points than components repeat a point.

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985.
    """
    nearest = torch.full_like(cloud.points[:, 0], torch.inf)
    center = torch.zeros_like(cloud.points[:, :, 0])
    chosen = []
    valid = None if cloud.weights is None else cloud.weights > 0
    for step in range(num_components):
        # The distance to the mean chooses the first point and is then forgotten: the mean is no center.
        _approach(cloud, center, nearest.fill_(torch.inf) if step <= 1 else nearest)
        score = nearest if valid is None else torch.where(valid, nearest, -1.0)
        center = _pick(cloud, score.argmax(-1, keepdim=True)).squeeze(-1)
        chosen.append(center)
    return torch.stack(chosen, 1)


def kmeans_plus_plus(cloud: Cloud, num_components: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw centers (B, K, D) with probability proportional to the squared distance from those before them.

    Each draw is greedy: of ``2 + floor(ln K)`` candidates the one that lowers the total distance most is kept.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007.
    """
    candidates = 2 + int(math.log(num_components))
    nearest = torch.full_like(cloud.points[:, 0], torch.inf)
    weights = torch.ones_like(nearest) if cloud.weights is None else cloud.weights
    # A set without any valid point draws from all its (centred, hence equal) rows: the result is finite.
    weights = torch.where(cloud.mass.unsqueeze(-1) > 0, weights, 1.0)
    center = _pick(cloud, torch.multinomial(weights, 1, generator=generator)).squeeze(-1)
    chosen = [center]
    blocks = _blocks(cloud, max(candidates, cloud.points.shape[1]))
    for _ in range(num_components - 1):
        _approach(cloud, center, nearest)
        potential = nearest * weights
        # Where every point is a center already, any point is as good.
        potential = torch.where(potential.sum(-1, keepdim=True) > 0, potential, weights)
        points = _pick(cloud, torch.multinomial(potential, candidates, replacement=True, generator=generator))
        totals = torch.zeros_like(points[:, 0])
        for rows in blocks:
            part = cloud.part(rows=rows)
            distances = torch.stack([_distance(part, point) for point in points.unbind(-1)], 1)
            distances = torch.minimum(distances, nearest[:, None, rows])
            totals = totals + torch.bmm(distances, weights[:, rows].unsqueeze(-1)).squeeze(-1)
        best = totals.argmin(-1)
        center = points[torch.arange(len(best), device=best.device), :, best]
        chosen.append(center)
    return torch.stack(chosen, 1)


def random_points(cloud: Cloud, num_components: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw centers (B, K, D) among the points, without replacement while there are enough."""
    weights = torch.ones_like(cloud.points[:, 0]) if cloud.weights is None else (cloud.weights > 0).to(cloud.points)
    noise = torch.rand(weights.shape, generator=generator, device=weights.device, dtype=weights.dtype)
    order = torch.where(weights > 0, noise, noise - 2.0).topk(min(num_components, noise.shape[1])).indices
    valid = (weights > 0).sum(-1, keepdim=True).clamp(min=1)
    rank = torch.arange(num_components, device=order.device) % valid
    rows = order.gather(1, rank)
    return _pick(cloud, rows).mT.contiguous()


def draw_centers(name: str, cloud: Cloud, num_components: int, generator: torch.Generator | None = None) -> Tensor:
    """Return centers (B, K, D) by the start of that name: ``"farthest"``, ``"kmeans++"`` or ``"random"``."""
    if name == "farthest":
        return farthest_points(cloud, num_components)
    draw = {"kmeans++": kmeans_plus_plus, "random": random_points}[name]
    return draw(cloud, num_components, generator)


def lloyd(cloud: Cloud, centers: Tensor, num_steps: int) -> Tensor:
    """Return centers (B, K, D) after steps that move each to the mean of the points nearest to it.

    The sum of squared distances never rises. A center without points stays where it is.

    Source: Lloyd, Least Squares Quantization in PCM, 1982.
    """
    for _ in range(num_steps):
        mass, total = torch.zeros_like(centers[..., :1]), torch.zeros_like(centers)
        for rows in _blocks(cloud, max(centers.shape[1:])):
            points = cloud.part(rows=rows).mT
            nearest = torch.cdist(centers, points, compute_mode=_EXACT).argmin(1, keepdim=True)
            members = centers.new_zeros(*centers.shape[:2], points.shape[1]).scatter_(1, nearest, 1.0)
            if cloud.weights is not None:
                members = members * cloud.weights[:, None, rows]
            mass = mass + members.sum(-1, keepdim=True)
            total = total + torch.bmm(members, points)
        centers = torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), centers)
    return centers


def from_centers(cloud: Cloud, centers: Tensor, structure: Structure, floor: Tensor) -> State:
    """Return the mixture whose components are the points nearest to each center (B, K, D).

    Weights are those of the cells. Means and the shape of covariances are those of a cell's core, the points nearer
    to the center than ``_CORE`` of the cell's mean squared distance, and the size of covariances is that of the cell:
    at its rim a cell holds points of its neighbours, and EM takes many iterations to give them back. A core or a cell
    of too few points leaves the matter to the cell, or to the variance that all cells share.
    """
    components, features = centers.shape[1:]
    wide, centers = floor.dtype, centers.to(floor.dtype)
    blocks = _blocks(cloud, max(components, structure.num_moments(features)))
    inertia = torch.zeros_like(centers[..., 0])
    # Two passes: the second one needs of the first which cell a point lies in, and how far from its center.
    nearest = torch.empty_like(cloud.points[:, 0], dtype=torch.int32)
    squares = torch.empty_like(nearest, dtype=wide)
    whole = core = centers.new_zeros(*centers.shape[:2], structure.num_moments(features))
    for rows in blocks:
        points = cloud.part(rows=rows)
        distance, cell = torch.cdist(centers, points.mT.to(wide), compute_mode=_EXACT).min(1)
        distance = distance.square()
        members = _members(cloud, cell, rows, inertia)
        inertia = inertia + torch.bmm(members, distance.unsqueeze(-1)).squeeze(-1)
        whole = whole + torch.bmm(members, structure.features(points, wide).mT)
        nearest[:, rows], squares[:, rows] = cell, distance.detach()
    mass = whole[..., 0]
    reach = _CORE * inertia / mass.clamp(min=1.0)
    for rows in blocks:
        cell = nearest[:, rows].long()
        members = _members(cloud, cell, rows, inertia) * (squares[:, rows] <= reach.gather(1, cell)).unsqueeze(1)
        core = core + torch.bmm(members, structure.features(cloud.part(rows=rows), wide).mT)
    enough = core[..., 0] > 2 * features

    cells, cores = structure.maximize(whole, floor), structure.maximize(core, floor)
    within = inertia.sum(-1, keepdim=True) / (features * cloud.mass.unsqueeze(-1).clamp(min=1.0)) + floor.unsqueeze(-1)
    shared = structure.expand(within.expand(-1, features), components, features)
    means = torch.where(enough.unsqueeze(-1), cores.means, cells.means)
    means = torch.where((mass > 0).unsqueeze(-1), means, centers)
    if shared.scale.shape[1] != components:
        return State(cells.log_weights, means, cells.factors)  # one covariance for all: no cell is too small for it

    scaled = cores.factors.times(_size(cells.factors.scale) / _size(cores.factors.scale))
    factors = choose(mass > features, choose(enough, scaled, cells.factors), shared)
    return State(cells.log_weights, means, factors)


def _size(scale: Tensor) -> Tensor:
    """Return the root of each covariance's trace, in the shape of its factor with ones."""
    return scale.square().sum(tuple(range(2, scale.ndim)), keepdim=True).sqrt()


def _blocks(cloud: Cloud, numbers: int) -> list[slice]:
    """Return slices of rows that are worked on together, for temporaries of so many numbers a point."""
    sets, _, items = cloud.points.shape
    rows = _BLOCK // max(sets * numbers, 1) or 1
    return [slice(row, row + rows) for row in range(0, items, rows)]


def _members(cloud: Cloud, cell: Tensor, rows: slice, like: Tensor) -> Tensor:
    """Return the weight (B, K, n) of each of some points in the cell (B, n) that it lies in, and zeros elsewhere."""
    members = torch.zeros(*like.shape, cell.shape[1], dtype=like.dtype, device=like.device)
    weights = torch.ones_like(cell, dtype=like.dtype) if cloud.weights is None else cloud.weights[:, rows].to(like)
    return members.scatter(1, cell.unsqueeze(1), weights.unsqueeze(1))


def _approach(cloud: Cloud, center: Tensor, nearest: Tensor) -> None:
    """Lower squared distances (B, N) in place to those of points from a center (B, D) of each set."""
    for rows in _blocks(cloud, cloud.points.shape[1]):
        own = nearest[:, rows]
        own.copy_(torch.minimum(own, _distance(cloud.part(rows=rows), center)))


def _distance(points: Tensor, center: Tensor) -> Tensor:
    """Return the squared distance (B, n) of points (B, D, n) from a center (B, D) of each set."""
    return (points - center.unsqueeze(-1)).square().sum(1)


def _pick(cloud: Cloud, index: Tensor) -> Tensor:
    """Return some points (B, D, C) of each set, by their rows (B, C)."""
    picked = cloud.points.gather(2, index.unsqueeze(1).expand(-1, cloud.points.shape[1], -1))
    return centred(picked, cloud.shift)
