"""One EM iteration on a batch of point sets, as pure functions of points and parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.covariance import State, Structure
from em_lightning.mixture.moments import Ready, accumulate, lost_digits
from em_lightning.mixture.state import Mixture, structure_of, widest

# Points up to this many numbers are made ready at once, more of them by chunks.
_WHOLE = 2**22
_CHUNK = 2**16


class Cloud(NamedTuple):
    """Point sets made ready for EM.

    points: (B, D, N), centred, masked points moved to the centre; features come first so that the points of one
        feature lie side by side in memory.
    weights: (B, N), zero where masked; ``None`` where every point counts once.
    mass: (B,), the sum of the weights.
    center: (B, D), what was subtracted.
    variance: (B, D), of each feature.
    ready: what passes over the points share, where there are several.

    What is not of the size of the points is held in double precision, which costs nothing and keeps thin components.
    """

    points: Tensor
    weights: Tensor | None
    mass: Tensor
    center: Tensor
    variance: Tensor
    ready: Ready | None = None


def prepare(x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Cloud:
    """Centre points (B, N, D) and join mask and weights (B, N) into one weight per point."""
    wide = widest(x)
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0.0)
        weights = mask.to(x.dtype) if weights is None else torch.where(mask, weights, 0.0).to(x.dtype)
    if weights is None:
        mass = torch.full_like(x[:, 0, 0], float(x.shape[1]), dtype=wide)
        shares = (mass.reciprocal()[:, None, None]).expand(-1, x.shape[1], 1)
    else:
        mass = weights.sum(-1, dtype=wide)
        shares = (weights / mass.clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(-1)).unsqueeze(-1)
    chunks = _chunks(x)
    center = _sum([(shares[:, rows] * x[:, rows]).sum(1) for rows in chunks])

    def centred(rows: slice) -> Tensor:
        moved = x[:, rows] - center.unsqueeze(1)
        return (moved if weights is None else moved * (weights[:, rows] != 0).unsqueeze(-1)).mT

    if len(chunks) == 1:
        points = centred(chunks[0]).to(x.dtype).contiguous()
    else:
        points = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
        for rows in chunks:
            points[..., rows] = centred(rows)
    variance = _sum([(points[..., rows].square() * shares[:, rows].mT).sum(2) for rows in chunks])
    return Cloud(points, weights, mass, center, variance)


def _chunks(x: Tensor) -> list[slice]:
    """Return slices of rows: one unless the points are so many that a temporary copy of them matters."""
    sets, items, features = x.shape
    rows = items if x.numel() <= _WHOLE else max(_CHUNK // (sets * features), 1)
    return [slice(row, row + rows) for row in range(0, items, rows)]


def _sum(parts: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def effective_floor(cloud: Cloud, floor: float, relative: bool = False) -> Tensor:
    """Return the floor (B,) of a variance: as asked, but never below what the rounding of the points can show.

    A relative floor is a share of the mean variance of the cloud's features.
    """
    eps = torch.finfo(cloud.points.dtype).eps
    variance = cloud.variance.detach()
    least = (eps * eps * variance.sum(-1)).clamp(min=eps**4)
    return torch.maximum(least, floor * variance.mean(-1)) if relative else least.clamp(min=floor)


def iterate_once(cloud: Cloud, state: State, structure: Structure, floor: Tensor) -> State:
    """Return the state after one exact EM iteration."""
    theta = structure.natural(state)

    def step(precision: torch.dtype | None = None) -> State:
        moments = accumulate(cloud.points, cloud.weights, theta, structure, precision, cloud.ready)
        return structure.maximize(moments, floor)

    return with_all_digits(step, cloud, theta, structure)


def with_all_digits(
    step: Callable[[torch.dtype | None], State], cloud: Cloud, theta: Tensor, structure: Structure
) -> State:
    """Return the state after a step in the precision that the pass chooses, or in double where that was not enough."""
    after = step(None)
    with torch.no_grad():
        lost = lost_digits(theta, structure.natural(after), cloud.points, structure, cloud.ready)
    return step(theta.dtype) if lost else after


def em_step(
    x: Tensor, mixture: Mixture, mask: Tensor | None = None, weights: Tensor | None = None, floor: float = 1e-6
) -> Mixture:
    r"""Return the mixtures after one exact EM iteration on point sets.

    ``r_nk = pi_k N(x_n | mu_k, Sigma_k) / p(x_n)``, then weights, means and covariances are the moments of the
    points under ``r``, with ``floor`` added to the variances as scikit-learn's ``reg_covar`` is.

    Args:
        x: points (B, N, D).
        mixture: B mixtures, of any covariance structure, which is kept.
        mask: (B, N), false where a row is padding.
        weights: (B, N), how often each point counts.
        floor: added to every variance, in squared units of the points.

    Example:
        >>> x = torch.tensor([[[-1.0], [-0.9], [1.0], [1.1]]])
        >>> start = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 2))
        >>> em_step(x, start).means.shape
        torch.Size([1, 2, 1])

    Source: Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977.
    """
    structure = structure_of(mixture)
    cloud = prepare(x, mask, weights)
    state = iterate_once(cloud, enter(cloud, mixture), structure, effective_floor(cloud, floor))
    return leave(cloud, state, structure)


def enter(cloud: Cloud, mixture: Mixture) -> State:
    """Return a mixture's parameters as the loop holds them."""
    log_weights, means, covariances = (part.to(cloud.center.dtype) for part in mixture)
    return State(log_weights, means - cloud.center.unsqueeze(1), structure_of(mixture).factorize(covariances))


def leave(cloud: Cloud, state: State, structure: Structure) -> Mixture:
    """Return the mixture that the loop's parameters stand for, in the type of the points."""
    means = state.means + cloud.center.unsqueeze(1)
    parts = (state.log_weights, means, structure.covariances(state.factors.scale))
    return Mixture(*(part.to(cloud.points.dtype) for part in parts))
