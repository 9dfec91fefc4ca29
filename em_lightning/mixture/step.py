"""One EM iteration on a batch of point sets, as pure functions of points and parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.covariance import Factors, Moments, Structure
from em_lightning.mixture.state import Mixture, structure_of


class Cloud(NamedTuple):
    """Point sets made ready for EM.

    points: (B, D, N), centred, masked points moved to the centre; features come first so that the points of one
        feature lie side by side in memory.
    weights: (B, N), zero where masked; ``None`` where every point counts once.
    mass: (B,), the sum of the weights.
    center: (B, D), what was subtracted.
    variance: (B, D), of each feature.
    """

    points: Tensor
    weights: Tensor | None
    mass: Tensor
    center: Tensor
    variance: Tensor


class State(NamedTuple):
    """The parameters inside the loop, means relative to the centre of the cloud."""

    log_weights: Tensor
    means: Tensor
    factors: Factors


class Expectation(NamedTuple):
    """What an E-step knows: whitened points (B, K, D, N) and log joint densities (B, K, N)."""

    whitened: Tensor
    log_joint: Tensor

    @property
    def responsibilities(self) -> Tensor:
        """Posterior probabilities of the components (B, K, N)."""
        return self.log_joint.softmax(1)


def prepare(x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Cloud:
    """Centre points (B, N, D) and join mask and weights (B, N) into one weight per point."""
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0.0)
        weights = mask.to(x.dtype) if weights is None else torch.where(mask, weights, 0.0).to(x.dtype)
    if weights is None:
        mass = x.new_full(x.shape[:1], float(x.shape[1]))
        share = 1.0 / max(x.shape[1], 1)
        # Two passes: the second mean removes what rounding left of a large offset.
        center = x.sum(1) * share
        center = center + (x - center.unsqueeze(1)).sum(1) * share
        points = (x - center.unsqueeze(1)).mT
        variance = points.square().sum(-1) * share
    else:
        mass = weights.sum(-1)
        shares = (weights / mass.clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(-1)).unsqueeze(-1)
        center = (shares * x).sum(1)
        center = center + (shares * (x - center.unsqueeze(1))).sum(1)
        points = (x - center.unsqueeze(1)).mT * (shares != 0).mT
        variance = (points.square() * shares.mT).sum(-1)
    return Cloud(points.contiguous(), weights, mass, center, variance)


def effective_floor(cloud: Cloud, floor: float) -> Tensor:
    """Return the floor (B,) of a variance: as asked, but never below what the rounding of the points can show."""
    eps = torch.finfo(cloud.points.dtype).eps
    extent = cloud.variance.detach().sum(-1)
    return (eps * eps * extent).clamp(min=max(floor, eps**4))


def expect(cloud: Cloud, state: State, structure: Structure) -> Expectation:
    """Take the E-step: ``log pi_k + log N(x | mu_k, Sigma_k)``."""
    num_features = cloud.points.shape[1]
    whitened = structure.whiten(state.factors.inverse, state.means, cloud.points)
    constant = structure.log_det(state.factors.inverse, num_features) - 0.5 * num_features * math.log(2.0 * math.pi)
    log_joint = (state.log_weights + constant).unsqueeze(-1) - 0.5 * whitened.square().sum(2)
    return Expectation(whitened, log_joint)


def moments_of(whitened: Tensor, responsibilities: Tensor, weights: Tensor | None, structure: Structure) -> Moments:
    """Return the weighted moments of whitened points (B, K, D, N) under responsibilities (B, K, N)."""
    if weights is not None:
        responsibilities = responsibilities * weights.unsqueeze(1)
    # The same guard against empty components as scikit-learn's, so that results agree step for step.
    mass = responsibilities.sum(-1) + 10.0 * torch.finfo(whitened.dtype).eps
    weighted = whitened * (responsibilities / mass.unsqueeze(-1)).unsqueeze(2)
    return Moments(mass, weighted.sum(-1), structure.second_moment(weighted, whitened))


def maximize(state: State, moments: Moments, structure: Structure, floor: Tensor) -> State:
    """Take the M-step: weights, means and covariances of largest expected log-likelihood."""
    log_weights = moments.mass.log() - moments.mass.sum(-1, keepdim=True).log()
    means = state.means + structure.apply(state.factors.scale, moments.first)
    return State(log_weights, means, structure.update(state.factors, moments, floor))


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
    state = enter(cloud, mixture)
    expectation = expect(cloud, state, structure)
    moments = moments_of(expectation.whitened, expectation.responsibilities, cloud.weights, structure)
    return leave(cloud, maximize(state, moments, structure, effective_floor(cloud, floor)), structure)


def enter(cloud: Cloud, mixture: Mixture) -> State:
    """Return a mixture's parameters as the loop holds them."""
    factors = structure_of(mixture).factorize(mixture.covariances)
    return State(mixture.log_weights, mixture.means - cloud.center.unsqueeze(1), factors)


def leave(cloud: Cloud, state: State, structure: Structure) -> Mixture:
    """Return the mixture that the loop's parameters stand for."""
    return Mixture(
        state.log_weights, state.means + cloud.center.unsqueeze(1), structure.covariances(state.factors.scale)
    )
