"""The M-step: from sufficient statistics, and the pseudo-counts of a prior, to parameters."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from em_lightning.mixture.background import UniformBackground
from em_lightning.mixture.e_step import SufficientStatistics
from em_lightning.mixture.parameters import Parameters


class PseudoCounts(NamedTuple):
    """A prior as points that every component has beside its own, in the coordinates of the points.

    weight: (B, K), ``alpha - 1``, added to the mass of each component; the sizes B and K may be 1 here and below.
    mean: (B, K), ``kappa``, points at the prior mean.
    covariance: (B, K), ``s``, points that are scattered about the component's mean as the prior covariance says.
    location: (B, 1, D), the prior mean.
    scatter: (B, K, S), the expectation of ``s(x - mu)`` under the prior covariance.
    """

    weight: Tensor
    mean: Tensor
    covariance: Tensor
    location: Tensor
    scatter: Tensor


class Estimator(Protocol):
    """What the M-step needs of a family: a covariance type, or von Mises-Fisher."""

    def second_degree(self, x: Tensor) -> Tensor:
        """Return the features of second degree (B, S, N) of points (B, D, N)."""

    def sharing(self, num_components: int) -> int:
        """Return how many components share a covariance."""

    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return means and covariances for weighted means, scatters (B, K, S) about them and masses (B, K)."""


def m_step(
    statistics: SufficientStatistics,
    family: Estimator,
    floor: Tensor,
    before: Tensor,
    prior: PseudoCounts | None = None,
    background: UniformBackground | None = None,
) -> Parameters:
    r"""Return the parameters of largest expected log-likelihood, or posterior density where there is a prior.

    .. math::
        \pi_k \propto N_k + \alpha - 1, \quad
        \mu_k = \frac{\sum_n r_{nk} u_{nk} x_n + \kappa m_0}{\sum_n r_{nk} u_{nk} + \kappa}, \quad
        \Sigma_k = \frac{\sum_n r_{nk} u_{nk} (x_n - \mu_k)(x_n - \mu_k)^\top + \kappa (\mu_k - m_0)(\mu_k - m_0)^\top
        + s S_0}{N_k + s} + \epsilon I

    with the mass :math:`N_k = \sum_n r_{nk}` and IRLS weights :math:`u_{nk}`, 1 for Gaussian components.

    Args:
        statistics: of all points.
        family: the covariance type, or von Mises-Fisher.
        floor: :math:`\epsilon` (B,).
        before: the covariances that the E-step saw, from which an iterative estimate starts.
        prior: pseudo-counts.
        background: a constant component, whose weight the M-step may estimate.
    """
    mass, zeroth, first, second, _, background_mass, _ = statistics
    # The guard of scikit-learn against empty components, so that results agree step for step. Points far from a
    # component have small IRLS weights, so it is relative to these.
    empty = 10.0 * torch.finfo(mass.dtype).eps
    guard = empty * torch.where(zeroth > 0, zeroth / torch.where(mass > 0, mass, 1.0), 1.0).detach()
    inside, mass = mass.sum(-1), mass + empty
    scatter_mass = mass
    if prior is not None:
        zeroth = zeroth + prior.mean
        first = first + prior.mean.unsqueeze(-1) * prior.location
        second = second + prior.mean.unsqueeze(-1) * family.second_degree(prior.location.mT).mT
    means = first / (zeroth + guard).unsqueeze(-1)
    scatter = second - zeroth.unsqueeze(-1) * family.second_degree(means.mT).mT
    if prior is not None:
        strength = prior.covariance / family.sharing(mass.shape[1])
        scatter, scatter_mass = scatter + strength.unsqueeze(-1) * prior.scatter, scatter_mass + strength
        added = prior.weight.expand_as(mass)
        mass, inside, background_mass = mass + added, inside + added.sum(-1), background_mass + added.mean(-1)
    means, covariances = family.estimate(means, scatter, scatter_mass, floor, before)
    log_weights = mass.log() - mass.sum(-1, keepdim=True).log()
    if background is not None:
        log_weights = background.maximize(log_weights, inside, background_mass)
    return Parameters(log_weights, means, covariances)
