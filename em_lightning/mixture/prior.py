"""Priors of a mixture's parameters, as pseudo-counts that the M-step adds to the moments of the points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from em_lightning.kernels.base import positive_number
from em_lightning.mixture.cloud import Cloud, prepare
from em_lightning.mixture.covariance import Structure
from em_lightning.mixture.factors import State
from em_lightning.mixture.state import Mixture, structure_of
from em_lightning.mixture.step import enter


class PseudoCounts(NamedTuple):
    """A prior beside one batch of clouds: pseudo-counts, and the features of what they were counted at.

    weight: ``alpha - 1``, points that every component has for nothing.
    mean: ``kappa``, points at the prior mean, which tell of the mean.
    covariance: ``s``, points about the component's own mean, which tell of the covariance.
    place: (B, 1, F), features of the prior mean.
    spread: (B, 1, F - 1 - D), features of the second degree of the prior covariance.
    """

    weight: Tensor | float
    mean: Tensor | float
    covariance: Tensor | float
    place: Tensor
    spread: Tensor

    def about(self, means: Tensor, structure: Structure) -> PseudoCounts:
        """Return the same in frames about the means (B, K, D) of components."""
        place = self.place[..., 1 : 1 + means.shape[-1]] - means
        return self._replace(place=structure.features(place.mT, means.dtype).mT)


class MixturePrior(nn.Module):
    r"""Dirichlet prior of the weights and normal-inverse-Wishart prior of means and covariances.

    .. math::
        \log p = \sum_k (\alpha - 1) \log \pi_k - \frac12 \sum_k \left[ s \log |\Sigma_k|
        + s \operatorname{tr}(S_0 \Sigma_k^{-1}) + \kappa (\mu_k - m_0)^\top \Sigma_k^{-1} (\mu_k - m_0) \right]

    up to a constant: :math:`\kappa` points at :math:`m_0` and :math:`s` points of covariance :math:`S_0`, so that with
    :math:`N_k` points of a component the M-step is

    .. math::
        \pi_k \propto N_k + \alpha - 1, \quad \mu_k = \frac{N_k \bar x_k + \kappa m_0}{N_k + \kappa}, \quad
        \Sigma_k = \frac{N_k V_k + \kappa (\mu_k - m_0)(\mu_k - m_0)^\top + s S_0}{N_k + s}

    with :math:`V_k` the mean square of the points about :math:`\mu_k`. In the usual letters it is the inverse Wishart
    distribution of :math:`s - D - 2` degrees of freedom and scale :math:`s S_0`. Diagonal covariances have the same
    feature by feature (normal-inverse-gamma), spherical ones its trace, and a tied covariance has the terms in
    :math:`s` once.

    Args:
        weight_concentration: :math:`\alpha \ge 1`; 1 is flat.
        mean_strength: :math:`\kappa \ge 0`, in points.
        mean: :math:`m_0` (D,), in units of the points; the mean of each cloud by default.
        covariance_strength: :math:`s \ge 0`, in points.
        covariance: :math:`S_0`, diagonal: a number, the share of the variance that the cloud has in each feature, or
            variances (D,) in squared units of the points; by default the share :math:`K^{-2/D}`.
        learnable: learn the pseudo-counts :math:`\alpha - 1, \kappa, s` that are not zero and, where s is not, the
            size of :math:`S_0`, each as its value here times the exponential of a parameter (1,) that starts at zero.

    Raises:
        ValueError: a pseudo-count is negative, none is positive, or the prior covariance is not positive.

    Example:
        >>> prior = MixturePrior(weight_concentration=2.0, mean_strength=0.0, covariance_strength=0.0)
        >>> one = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1, 2, 1), torch.ones(1, 2))
        >>> prior.log_prob(one, torch.zeros(1, 3, 1))  # log 0.5 + log 0.5
        tensor([-1.3863])

    Source: Fraley and Raftery, Bayesian Regularization for Normal Mixture Estimation and Model-Based Clustering, 2007.
    """

    def __init__(
        self,
        *,
        weight_concentration: float = 1.0,
        mean_strength: float = 0.01,
        mean: Tensor | Sequence[float] | None = None,
        covariance_strength: float = 1.0,
        covariance: Tensor | Sequence[float] | float | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if not 1.0 <= weight_concentration < math.inf:
            raise ValueError(
                f"weight_concentration={weight_concentration} must be at least 1, which is flat: "
                f"below it the largest density has an empty component"
            )
        counts = {"weight": weight_concentration - 1.0, "mean": mean_strength, "covariance": covariance_strength}
        for name in ("mean", "covariance"):
            if not 0.0 <= counts[name] < math.inf:
                raise ValueError(f"{name}_strength={counts[name]} counts points: it must be at least 0 and finite")
        if not any(counts.values()):
            raise ValueError(
                "this prior is flat: give weight_concentration above 1, or mean_strength or covariance_strength above "
                "0, or no prior"
            )
        self._counts = counts
        for name, count in counts.items():
            if learnable and count > 0:
                self.register_parameter(f"log_{name}", nn.Parameter(torch.zeros(1)))
        self.log_spread = nn.Parameter(torch.zeros(1)) if learnable and counts["covariance"] > 0 else None
        self.share = positive_number("covariance", covariance) if isinstance(covariance, (int, float)) else None
        # Numbers, not buffers: exact in every dtype, on every device.
        self.mean = None if mean is None else _numbers(mean)
        self.covariance = None if covariance is None or self.share is not None else _numbers(covariance)
        if self.covariance is not None and not all(value > 0 for value in self.covariance):
            raise ValueError(f"covariance={list(self.covariance)} holds variances: each must be positive")

    def count(self, name: str, dtype: torch.dtype | None = None) -> Tensor | float:
        """Return the pseudo-count of ``"weight"``, ``"mean"`` or ``"covariance"``: a tensor (1,) where learned."""
        log_ratio: Tensor | None = self._parameters.get(f"log_{name}")
        value = self._counts[name]
        return value if log_ratio is None else value * log_ratio.to(dtype or log_ratio.dtype).exp()

    def beside(self, cloud: Cloud, structure: Structure, num_components: int) -> PseudoCounts:
        """Return the pseudo-counts for clouds in the frame of the loop.

        Raises:
            ValueError: the prior's mean or covariance has another number of features.
        """
        features = cloud.center.shape[1]
        for name, value in (("mean", self.mean), ("covariance", self.covariance)):
            if value is not None and len(value) != features:
                raise ValueError(f"the prior's {name} has shape ({len(value)},); give ({features},), one a feature")
        place = torch.zeros_like(cloud.center)
        if self.mean is not None:
            place = cloud.center.new_tensor(self.mean) - cloud.center
        if self.covariance is None:
            share = num_components ** (-2.0 / features) if self.share is None else self.share
            variance = share * cloud.variance
        else:
            variance = cloud.center.new_tensor(self.covariance).expand_as(cloud.center)
        if self.log_spread is not None:
            variance = variance * self.log_spread.to(variance.dtype).exp()
        axes = torch.eye(features, dtype=variance.dtype, device=variance.device).unsqueeze(0)
        spread = variance @ squares_of(structure, axes)[0]
        dtype = cloud.center.dtype
        return PseudoCounts(
            self.count("weight", dtype),
            self.count("mean", dtype),
            self.count("covariance", dtype),
            structure.features(place.unsqueeze(-1), dtype).mT,
            spread.unsqueeze(1),
        )

    def log_prob(
        self, mixture: Mixture, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Return the logarithm of the prior density of mixtures, up to a constant, as (B,).

        Args:
            mixture: B mixtures.
            x: points (B, N, D), whose mean and variances the prior may refer to.
            mask: (B, N), false where a row is padding.
            weights: (B, N), how often each point counts.
        """
        cloud = prepare(x, mask, weights)
        return self.log_density(mixture, cloud.center, cloud.variance).to(x.dtype)

    def log_density(self, mixture: Mixture, center: Tensor, variance: Tensor) -> Tensor:
        """Return the same as :meth:`log_prob` for points of this mean and these variances, (B, D) both."""
        structure = structure_of(mixture)
        cloud = Cloud(center.unsqueeze(-1), None, torch.ones_like(center[:, 0]), center, variance)
        state = enter(cloud, mixture)
        return log_prior(state, structure, self.beside(cloud, structure, state.means.shape[1]))

    def extra_repr(self) -> str:
        """Return the pseudo-counts."""
        with torch.no_grad():
            return ", ".join(f"{name}={float(self.count(name)):g}" for name in self._counts)


def log_prior(state: State, structure: Structure, counts: PseudoCounts) -> Tensor:
    """Return the logarithm of the prior density of the loop's parameters, up to a constant, as (B,)."""
    # Under natural parameters without weights: theta . phi is the log-density of a Gaussian.
    theta = structure.natural(state._replace(log_weights=torch.zeros_like(state.log_weights)))
    own = structure.features(state.means.mT, theta.dtype).mT
    pull = (theta * (counts.place - own)).sum(-1)
    features = state.means.shape[-1]
    shape = (theta * own).sum(-1) + (theta[..., 1 + features :] * counts.spread).sum(-1)
    shape = shape + 0.5 * features * math.log(2.0 * math.pi)
    shape = shape[:, 0] if structure.name == "tied" else shape.sum(-1)
    return counts.weight * state.log_weights.sum(-1) + counts.mean * pull.sum(-1) + counts.covariance * shape


def posterior_moments(
    moments: Tensor, structure: Structure, num_features: int, counts: PseudoCounts | None, pull: Tensor | None = None
) -> Tensor:
    r"""Return moments (B, K, F) whose maximum-likelihood estimate is what a prior and pulls make of the given ones.

    Args:
        moments: ``sum_n r_nk [1, u_nk x, u_nk x x^T]`` (B, K, F), with ``u = 1`` unless ``pull`` is given.
        structure: the covariance structure whose moments they are.
        num_features: D.
        counts: the prior.
        pull: ``sum_n r_nk u_nk`` (B, K) where points pull by ``u``: it divides what makes the mean, and the mass
            ``sum_n r_nk`` what makes the covariance.
    """
    if counts is None and pull is None:
        return moments
    empty = 10.0 * torch.finfo(moments.dtype).eps  # as in the M-step itself
    mass, first, second = moments[..., :1], moments[..., 1 : 1 + num_features], moments[..., 1 + num_features :]
    pull = mass if pull is None else pull.unsqueeze(-1)
    # Points far from their component pull by next to nothing: what is empty is told by its mass.
    guard = empty * torch.where(pull > 0, pull / torch.where(mass > 0, mass, 1.0), 1.0).detach()
    extra: Tensor | float = 0.0
    shape: Tensor | float = 0.0
    if counts is not None:
        pull = pull + counts.mean
        first = first + counts.mean * counts.place[..., 1 : 1 + num_features]
        second = second + counts.mean * counts.place[..., 1 + num_features :]
        extra, shape = counts.weight, counts.covariance
    means = first / (pull + guard)
    squares = squares_of(structure, means)
    scatter = second - pull * squares
    divisor = mass + empty
    if structure.name == "tied":
        scatter, divisor = scatter.sum(1, keepdim=True), divisor.sum(1, keepdim=True)
    if counts is not None:
        scatter = scatter + shape * counts.spread
    mass = mass + extra
    return torch.cat([mass, (mass + empty) * torch.cat([means, scatter / (divisor + shape) + squares], -1)], -1)


def squares_of(structure: Structure, vectors: Tensor) -> Tensor:
    """Return the features of the second degree of vectors (B, K, D)."""
    return structure.features(vectors.mT, vectors.dtype)[:, 1 + vectors.shape[-1] :].mT


def _numbers(values: Tensor | Sequence[float] | float) -> tuple[float, ...]:
    return tuple(torch.as_tensor(values, dtype=torch.float64, device="cpu").flatten().tolist())
