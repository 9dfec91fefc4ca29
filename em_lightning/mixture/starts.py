"""Where EM starts: centers of point sets, and a mixture around them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from em_lightning.mixture.covariance import Factors, State, Structure
from em_lightning.mixture.step import Cloud


def farthest_points(cloud: Cloud, num_components: int) -> Tensor:
    """Choose centers (B, K, D) one by one, each the point farthest from those before it.

    The first is the point farthest from the mean. Nothing is random, and the order of the points plays no part
    except between exact ties. Sets with fewer distinct points than components repeat a point.

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985.
    """
    nearest = torch.full_like(cloud.points[:, 0], torch.inf)
    center = torch.zeros_like(cloud.center)
    chosen = []
    valid = None if cloud.weights is None else cloud.weights > 0
    for step in range(num_components):
        distance = (cloud.points - center.unsqueeze(-1)).square().sum(1)
        # The distance to the mean chooses the first point and is then forgotten: the mean is no center.
        nearest = distance if step <= 1 else torch.minimum(nearest, distance)
        score = nearest if valid is None else torch.where(valid, nearest, -1.0)
        center = _gather(cloud.points, score.argmax(-1))
        chosen.append(center)
    return torch.stack(chosen, 1)


def kmeans_plus_plus(cloud: Cloud, num_components: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw centers (B, K, D) with probability proportional to the squared distance from those before them.

    Each draw is greedy: of ``2 + floor(ln K)`` candidates the one that lowers the total distance most is kept.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007.
    """
    sets, _, items = cloud.points.shape
    candidates = 2 + int(math.log(num_components))
    weights = torch.ones_like(cloud.points[:, 0]) if cloud.weights is None else cloud.weights
    # A set without any valid point draws from all its (centred, hence equal) rows: the result is finite.
    weights = torch.where(cloud.mass.unsqueeze(-1) > 0, weights, 1.0)
    center = _gather(cloud.points, torch.multinomial(weights, 1, generator=generator).squeeze(-1))
    nearest = (cloud.points - center.unsqueeze(-1)).square().sum(1)
    chosen = [center]
    for _ in range(num_components - 1):
        potential = nearest * weights
        # Where every point is a center already, any point is as good.
        potential = torch.where(potential.sum(-1, keepdim=True) > 0, potential, weights)
        drawn = torch.multinomial(potential, candidates, replacement=True, generator=generator)
        points = cloud.points.gather(2, drawn.unsqueeze(1).expand(-1, cloud.points.shape[1], -1))
        distances = (points.unsqueeze(-1) - cloud.points.unsqueeze(2)).square().sum(1)
        distances = torch.minimum(distances, nearest.unsqueeze(1))
        best = (distances * weights.unsqueeze(1)).sum(-1).argmin(-1)
        nearest = distances[torch.arange(sets, device=best.device), best]
        chosen.append(_gather(points, best))
    return torch.stack(chosen, 1)


def random_points(cloud: Cloud, num_components: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw centers (B, K, D) among the points, without replacement while there are enough."""
    weights = torch.ones_like(cloud.points[:, 0]) if cloud.weights is None else (cloud.weights > 0).to(cloud.points)
    noise = torch.rand(weights.shape, generator=generator, device=weights.device, dtype=weights.dtype)
    order = torch.where(weights > 0, noise, noise - 2.0).argsort(dim=-1, descending=True)
    valid = (weights > 0).sum(-1, keepdim=True).clamp(min=1)
    rank = torch.arange(num_components, device=order.device) % valid
    rows = order.gather(1, rank)
    return cloud.points.gather(2, rows.unsqueeze(1).expand(-1, cloud.points.shape[1], -1)).mT.contiguous()


def from_centers(cloud: Cloud, centers: Tensor, structure: Structure, floor: Tensor) -> State:
    """Return the mixture whose components are the points nearest to each center (B, K, D).

    Weights, means and covariances are those of the cells. A cell of too few points to span the space starts at its
    center with the variance that all cells share, so that no component is caught on a single point.
    """
    components, features = centers.shape[1:]
    distance = (centers.unsqueeze(-1) - cloud.points.unsqueeze(1)).square().sum(2)
    nearest = torch.zeros_like(distance).scatter_(1, distance.argmin(1, keepdim=True), 1.0)
    weights = torch.ones_like(cloud.points[:, 0]) if cloud.weights is None else cloud.weights
    within = (distance.amin(1) * weights).sum(-1, dtype=floor.dtype) / (features * cloud.mass.clamp(min=1.0))
    shared = structure.expand((within + floor).unsqueeze(-1).expand(-1, features), components, features)
    phi = structure.features(cloud.points, floor.dtype)
    moments = torch.bmm((nearest * weights.unsqueeze(1)).to(floor.dtype), phi.mT)
    cells = structure.maximize(moments, floor)
    means = torch.where(moments[..., :1] > 0, cells.means, centers.to(floor.dtype))
    if shared.scale.shape[1] != components:
        return State(cells.log_weights, means, cells.factors)  # one covariance for all: no cell is too small for it
    enough = (moments[..., 0] > features).reshape(*centers.shape[:2], *[1] * (shared.scale.ndim - 2))
    factors = Factors(*(torch.where(enough, new, old) for new, old in zip(cells.factors, shared, strict=True)))
    return State(cells.log_weights, means, factors)


def _gather(points: Tensor, index: Tensor) -> Tensor:
    """Pick one point (B, D) from each set of points (B, D, N)."""
    return points.gather(2, index[:, None, None].expand(-1, points.shape[1], 1)).squeeze(-1)
