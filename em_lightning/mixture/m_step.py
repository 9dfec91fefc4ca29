"""The M-step, which computes parameters from sufficient statistics and the pseudo-counts of a prior."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.backends import native
from em_lightning.mixture.background import UniformBackground
from em_lightning.mixture.covariance import COVARIANCES, Covariance
from em_lightning.mixture.e_step import SufficientStatistics
from em_lightning.mixture.points import Parameters


class PseudoCounts(NamedTuple):
    """A prior as pseudo-counts of each component, in frame coordinates.

    weight_count: (B, K), ``alpha - 1``, added to the mass; the sizes B and K may be 1, here and below.
    mean_count: (B, K), ``kappa``, points at the prior mean.
    covariance_count: (B, K), ``s``, points with the prior covariance about the mean of the component.
    mean: (B, 1, D), the prior mean ``m_0``.
    scatter: (B, K, S), the expectation of ``second_degree(x - mu)`` of the family under the prior covariance ``S_0``.
    """

    weight_count: Tensor
    mean_count: Tensor
    covariance_count: Tensor
    mean: Tensor
    scatter: Tensor


def m_step(
    statistics: SufficientStatistics,
    family: Covariance,
    floor: Tensor,
    before: Tensor,
    prior: PseudoCounts | None = None,
    background: UniformBackground | None = None,
) -> Parameters:
    r"""Return the parameters that maximize the expected log-likelihood, plus the log-density of a given prior.

    .. math::
        \pi_k \propto N_k + \alpha - 1, \quad
        \mu_k = \frac{\sum_n r_{nk} u_{nk} x_n + \kappa m_0}{\sum_n r_{nk} u_{nk} + \kappa}, \quad
        \Sigma_k = \frac{\sum_n r_{nk} u_{nk} (x_n - \mu_k)(x_n - \mu_k)^\top + \kappa (\mu_k - m_0)(\mu_k - m_0)^\top
        + s S_0}{N_k + s} + \epsilon I

    with the mass :math:`N_k = \sum_n r_{nk}` and IRLS weights :math:`u_{nk}`, 1 for Gaussian components. Here
    :math:`r_{nk}` includes the weight of point n. The counts of the prior are :math:`\alpha - 1, \kappa` and :math:`s`,
    its mean is :math:`m_0` and its covariance :math:`S_0`. The floor :math:`\epsilon` is (B,). An iterative estimate
    starts from the covariances ``before`` the step.
    """
    mass, zeroth, first, second, _log_likelihood, background_mass, _num_points = statistics
    gaussian = zeroth is mass  # e_step returns the same tensor for both
    plain = gaussian and prior is None and background is None and family.native_m_step
    if plain and native.serves_components("m_step.cpp", mass, mass.numel() >= native.FEWEST_COMPONENTS):
        return Parameters(*native.m_step(mass, first, second, before, floor, family.native_kind))
    eps = 10.0 * torch.finfo(mass.dtype).eps  # added to the mass as in scikit-learn, so that each step agrees
    zeroth_eps: float | Tensor = eps
    if not gaussian:  # times the mean IRLS weight, because the zeroth sum contains these weights
        zeroth_eps = eps * torch.where(zeroth > 0, zeroth / torch.where(mass > 0, mass, 1.0), 1.0).detach()
    mass_of_components, mass = mass.sum(-1), mass + eps
    scatter_mass = mass
    if prior is not None:
        zeroth = zeroth + prior.mean_count
        first = first + prior.mean_count.unsqueeze(-1) * prior.mean
        second = second + prior.mean_count.unsqueeze(-1) * family.second_degree(prior.mean.mT).mT
    means = first / (zeroth + zeroth_eps).unsqueeze(-1)
    scatter = second - zeroth.unsqueeze(-1) * family.second_degree(means.mT).mT
    if prior is not None:
        strength = prior.covariance_count / family.sharing(mass.shape[1])
        scatter, scatter_mass = scatter + strength.unsqueeze(-1) * prior.scatter, scatter_mass + strength
        added = prior.weight_count.expand_as(mass)  # the background gets the same count as a component
        mass, background_mass = mass + added, background_mass + added.mean(-1)
        mass_of_components = mass_of_components + added.sum(-1)
    means, covariances = family.estimate(means, scatter, scatter_mass, floor, before)
    log_weights = (mass / mass.sum(-1, keepdim=True)).log()
    if background is not None:
        log_weights = background.update_weights(log_weights, mass_of_components, background_mass)
    return Parameters(log_weights, means, covariances)


native.register_gradient(
    native.m_step,
    native.m_step_gradient,
    # The zeroth sums are a view of the mass, so that m_step does not call native.m_step again. It does not read the
    # last three statistics, which any tensor can replace.
    lambda mass, first, second, before, floor, kind: m_step(
        SufficientStatistics(mass, mass.view_as(mass), first, second, *[floor] * 3), COVARIANCES[kind], floor, before
    ),
)
