r"""EM over points that come in blocks: statistics of a block, and the M-step of their sum.

One iteration over a data set of any size, on any number of processes:

    statistics = no_statistics(mixture, center)
    for x in blocks:                                    # (B, n, D) each
        statistics = collect(x, mixture, statistics)
    # over processes: add up statistics.moments, and statistics.log_likelihood
    mixture = maximize(statistics, mixture.covariance_type)

:math:`p(x) = \sum_k \pi_k N(x | \mu_k, \Sigma_k)` enters only through sums over points, so blocks and processes may be
added in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.cloud import Cloud, about, widest
from em_lightning.mixture.covariance import COVARIANCES
from em_lightning.mixture.general import softmin_moments
from em_lightning.mixture.moments import LARGEST_IN_DOUBLE, accumulate, largest_term
from em_lightning.mixture.prior import MixturePrior, posterior_moments
from em_lightning.mixture.state import Mixture, check_points, structure_of
from em_lightning.mixture.step import enter, leave


class Statistics(NamedTuple):
    r"""What EM needs to know of points under a mixture, in double precision.

    moments: (B, K, F), :math:`\sum_n w_n r_{nk} \phi(x_n - c)`; the first is the mass of component k.
    log_likelihood: (B,), :math:`\sum_n w_n \log p(x_n)`.
    center: (B, D), :math:`c`, anywhere near the middle of the points. Sums of one center can be added.
    origins: (B, K, D), what moments of a component are about instead, where components are so narrow and so far from
        the center that double precision would lose digits: 1e5 of their widths or more. ``None`` for nowhere.

    :math:`\phi` is :math:`[1, x_i, x_i x_j (i \le j)]` for full and tied covariances, :math:`[1, x_i, x_i^2]` for
    diagonal and :math:`[1, x_i, |x|^2]` for spherical ones.
    """

    moments: Tensor
    log_likelihood: Tensor
    center: Tensor
    origins: Tensor | None = None


def no_statistics(mixture: Mixture, center: Tensor) -> Statistics:
    """Return the statistics of no points under a mixture, about a center (B, D)."""
    wide = widest(center)
    sets, components, features = mixture.means.shape
    size = structure_of(mixture).num_moments(features)
    moments = torch.zeros(sets, components, size, dtype=wide, device=center.device)
    return Statistics(moments, moments.new_zeros(sets), center.to(wide), _origins(mixture, center.to(wide)))


def _origins(mixture: Mixture, center: Tensor) -> Tensor | None:
    """Return the means (B, K, D) of mixtures that would be lost about their center, which others have; or ``None``."""
    if center.dtype != torch.float64:
        return None
    structure, state = structure_of(mixture), enter(_frame(center.unsqueeze(1), center, None), mixture)
    lost = largest_term(structure.natural(state), state.means.abs().amax(1), structure) > LARGEST_IN_DOUBLE
    return torch.where(lost[:, None, None], mixture.means.to(center), center.unsqueeze(1)) if lost.any() else None


@torch.no_grad()
def collect(
    x: Tensor, mixture: Mixture, statistics: Statistics, mask: Tensor | None = None, weights: Tensor | None = None
) -> Statistics:
    """Return statistics with those of more points added, under the responsibilities of a mixture.

    Products are taken in float32 where that is accurate, sums in double. Memory beyond the points is some MiB: a block
    may be the whole data set.

    Args:
        x: points (B, n, D), finite where they count.
        mixture: B mixtures, best in double precision.
        statistics: what earlier blocks came to, or :func:`no_statistics`.
        mask: (B, n), false where a row is padding.
        weights: (B, n), how often each point counts.

    Example:
        >>> x = torch.tensor([[[-1.0], [-0.9], [1.0], [1.1]]])
        >>> mixture = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 2, 1))
        >>> statistics = no_statistics(mixture, x.mean(1))
        >>> for block in x.split(2, dim=1):
        ...     statistics = collect(block, mixture, statistics)
        >>> torch.allclose(statistics.log_likelihood, mixture.log_prob(x).double().sum(1))
        True
        >>> maximize(statistics, "diag").means.shape
        torch.Size([1, 2, 1])
    """
    check_points(mixture, x)
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, statistics.center.unsqueeze(1).to(x.dtype))
        weights = mask.to(x.dtype) if weights is None else torch.where(mask, weights, 0.0).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        # Float32 does not hold clusters about a center far from them, even where it holds their points.
        x = x if statistics.origins is None else x.to(widest(x))
        cloud = _frame(x, statistics.center, weights)
        structure, state = structure_of(mixture), enter(cloud, mixture)
        if statistics.origins is None:
            moments, likelihood = accumulate(cloud, structure.natural(state), structure, likelihood=True)
        else:
            origins = statistics.origins - statistics.center.unsqueeze(1)
            moments, likelihood = softmin_moments(cloud, state, structure, origins.any(2).any(1), origins)
    assert likelihood is not None
    return statistics._replace(
        moments=statistics.moments + moments, log_likelihood=statistics.log_likelihood + likelihood
    )


@torch.no_grad()
def maximize(
    statistics: Statistics,
    covariance: str,
    floor: float = 1e-6,
    prior: MixturePrior | None = None,
    variance: Tensor | None = None,
) -> Mixture:
    """Return the mixtures, in double precision, that the M-step makes of statistics.

    Args:
        statistics: of all points.
        covariance: a key of ``COVARIANCES``.
        floor: added to every variance, in squared units of the points.
        prior: of the parameters: the result is then the maximum a posteriori.
        variance: (B, D), of all points, about their mean; for a prior whose mean or covariance is not given, in which
            case ``statistics.center`` has to be the mean.
    """
    moments, structure = statistics.moments, COVARIANCES[covariance]
    features = statistics.center.shape[1]
    cloud = _frame(statistics.center.unsqueeze(1), statistics.center, None)
    origins = None if statistics.origins is None else statistics.origins - statistics.center.unsqueeze(1)
    if prior is not None:
        if variance is not None:
            cloud = cloud._replace(variance=variance.to(moments.dtype))
        elif prior.covariance is None:
            raise ValueError("variance=None, and the prior's covariance is a share of it; give variance=(B, D)")
        counts = prior.beside(cloud, structure, moments.shape[1])
        counts = counts if origins is None else counts.about(origins, structure)
        moments = posterior_moments(moments, structure, features, counts)
    least = torch.full_like(statistics.center[:, 0], floor)
    state = structure.maximize(moments, least)
    return leave(cloud, state if origins is None else state._replace(means=state.means + origins), structure)


def _frame(x: Tensor, center: Tensor, weights: Tensor | None) -> Cloud:
    """Return points (B, n, D) about a center that need not be their mean."""
    points, shift = about(x, center)
    none = torch.zeros_like(center)
    return Cloud(points, weights, none[:, 0], center, none, shift)
