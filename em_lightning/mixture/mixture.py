"""Gaussian mixtures as values: log-densities, posteriors, samples, marginals, conditionals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.export import register_dataclass

from em_lightning.competition import Posterior, softmin
from em_lightning.distributed import accumulation_dtype
from em_lightning.mixture.backends.reference import has_values
from em_lightning.mixture.covariance import COVARIANCES, Covariance, covariance_of
from em_lightning.mixture.e_step import Likelihood, log_density, log_joint_of_points
from em_lightning.mixture.points import Frame, Parameters, Points, prepare


@dataclass(frozen=True)
class Mixture:
    r"""A batch of Gaussian mixtures, :math:`p(x) = \sum_k \pi_k N(x \mid \mu_k, \Sigma_k)`, one per set.

    Densities have the points' dtype and derivatives of every order. Rounding changed log-densities by up to 7e-5 for
    two components 1e6 standard deviations apart (.06 for float32 points in C++ code), and by up to 7.3 for 1e8.

    Args:
        log_weights: :math:`\log \pi` (B, K); weights sum to 1, or to 1 - w_0 beside an estimated background.
        means: (B, K, D).
        covariances: full (B, K, D, D), diagonal (B, K, D), spherical (B, K) or tied (B, 1, D, D), by their shape.

    Example:
        >>> mixture = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 2, 1))
        >>> mixture.posterior(torch.zeros(1, 1, 1)).responsibilities
        tensor([[[0.5000, 0.5000]]])
        >>> mixture.log_prob(torch.zeros(1, 1, 1)).exp()  # the standard normal density at 1
        tensor([[0.2420]])

    Source: Bishop, Pattern Recognition and Machine Learning, 2006, section 9.2.
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def sets(self) -> int:
        """B, the number of mixtures."""
        return self.means.shape[0]

    @property
    def components(self) -> int:
        """K, the number of components."""
        return self.means.shape[1]

    @property
    def features(self) -> int:
        """D, the number of features."""
        return self.means.shape[2]

    @property
    def covariance_type(self) -> str:
        """``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``; raises ValueError for any other shape."""
        return self._covariance.name

    @property
    def weights(self) -> Tensor:
        """Mixing weights (B, K)."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """The mean of each mixture (B, D)."""
        return (self.weights.unsqueeze(-1) * self.means).sum(1) / self.weights.sum(-1, keepdim=True)

    @property
    def variance(self) -> Tensor:
        """The variance of each mixture in each feature (B, D)."""
        moments_about_mean = self.variances() + (self.means - self.mean.unsqueeze(1)).square()
        return (self.weights.unsqueeze(-1) * moments_about_mean).sum(1) / self.weights.sum(-1, keepdim=True)

    def variances(self) -> Tensor:
        """Return the variances of each component in each feature (B, K, D)."""
        return self._covariance.diagonal(self.covariances, self.features).expand_as(self.means)

    @property
    def num_parameters(self) -> int:
        """Number of free parameters of each mixture."""
        num_in_covariances = self._covariance.num_parameters(self.components, self.features)
        return self.components - 1 + self.components * self.features + num_in_covariances

    @property
    def _covariance(self) -> Covariance:
        return covariance_of(self.covariances, self.means)

    def map(self, function: Callable[[Tensor], Tensor]) -> Mixture:
        """Return the mixture with ``function`` applied to each tensor."""
        return Mixture(function(self.log_weights), function(self.means), function(self.covariances))

    def to(self, target: torch.dtype | torch.device | str) -> Mixture:
        """Return the mixture in another dtype or on another device."""
        return self.map(lambda part: part.to(target))

    def __getitem__(self, sets: int | slice | Tensor | Sequence[int]) -> Mixture:
        """Return some of the mixtures; an integer gives a batch of one."""
        if not isinstance(sets, (slice, Sequence)) and getattr(sets, "ndim", 0) == 0:  # an integer of any kind
            sets = int(sets)
            if not -self.sets <= sets < self.sets:  # IndexError also ends a for loop over a Mixture
                raise IndexError(f"sets={sets} must be at least {-self.sets} and less than {self.sets}")
            sets = slice(sets, sets + 1 if sets != -1 else None)
        return self.map(lambda part: part[sets])

    def parameters(self) -> Parameters:
        """Return the three tensors."""
        return Parameters(self.log_weights, self.means, self.covariances)

    def log_joint(self, x: Tensor) -> Tensor:
        """Return ``log pi_k + log N(x_n | mu_k, Sigma_k)`` of points (B, N, D), as (B, N, K)."""
        return log_joint_of_points(*self._enter(x), Likelihood(self._covariance)).to(x.dtype)

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``log p(x)`` of points (B, N, D), as (B, N); zero where the mask (B, N) is false."""
        points, parameters = self._enter(x, mask)
        log_prob = log_density(points, parameters, Likelihood(self._covariance)).to(x.dtype)  # the scale is 1
        return log_prob if mask is None else torch.where(mask, log_prob, 0.0)

    def _enter(self, x: Tensor, mask: Tensor | None = None) -> tuple[Points, Parameters]:
        """Return points and parameters in a frame at the average of the means, whose scale 1 keeps the densities."""
        check_points(self, x)
        self._check_covariances()
        means = self.means.detach().to(accumulation_dtype(x))
        frame = Frame(center=means.mean(1), scale=means.new_ones(self.sets))
        points = prepare(x.expand(self.sets, -1, -1), mask, frame=frame)
        return points, frame.enter_parameters(self.parameters())

    def _check_covariances(self) -> None:
        if not has_values(self.covariances):
            return
        wrong = self._covariance.indefinite(self.covariances.detach())
        if wrong.any():
            index = wrong.nonzero()[0].tolist()
            value = self.covariances[tuple(index)].tolist()
            remedy = "float32 loses the thickness of thin components: fit x.double(), or raise covariance_floor"
            raise ValueError(f"covariances must be positive definite, got {value} at index {index}; {remedy}")

    def posterior(self, x: Tensor) -> Posterior:
        """Return the posterior over components of points (B, N, D).

        Energies are ``-log pi_k - log N(x | mu_k, Sigma_k)`` (B, N, K); the free energy (B, N) is ``-log p(x)``.
        """
        return softmin(-self.log_joint(x))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` points from each mixture, as (B, n, D)."""
        if n < 0:
            raise ValueError(f"n={n} must be at least 0")
        chosen = torch.multinomial(self.weights, max(n, 1), replacement=True, generator=generator)[:, :n]  # refuses 0
        means = self.means
        noise = torch.randn(self.sets, n, self.features, generator=generator, dtype=means.dtype, device=means.device)
        sets = torch.arange(self.sets, device=chosen.device).unsqueeze(1)
        scale = self._scale_tril()[sets, chosen]
        return means[sets, chosen] + (scale @ noise.unsqueeze(-1)).squeeze(-1)

    def _scale_tril(self) -> Tensor:
        """Return lower triangular factors (B, K, D, D) of the covariances."""
        self._check_covariances()
        covariances = self.full().covariances
        return COVARIANCES["full"].factorize(covariances.to(accumulation_dtype(covariances))).scale.to(self.means.dtype)

    def full(self) -> Mixture:
        """Return the same mixtures with full covariances."""
        return Mixture(self.log_weights, self.means, self._covariance.to_full(self.covariances, self.means))

    def to_distribution(self) -> MixtureSameFamily:
        """Return the same mixtures as a ``torch.distributions`` object with batch shape (B,)."""
        components = MultivariateNormal(self.means, scale_tril=self._scale_tril())
        return MixtureSameFamily(Categorical(logits=self.log_weights), components)

    def affine(self, scale: Tensor, shift: Tensor) -> Mixture:
        """Return the mixtures of ``scale * x + shift`` for a scale (B,) and a shift (B, D)."""
        covariances = self._covariance.scaled(self.covariances, scale.square().unsqueeze(-1))
        return Mixture(self.log_weights, self.means * scale[:, None, None] + shift.unsqueeze(1), covariances)

    def marginal(self, features: Sequence[int]) -> Mixture:
        """Return the mixtures of the features with the given indices, those of ``x[..., features]``."""
        chosen = list(features)
        covariances = self._covariance.marginal(self.covariances, chosen)
        return Mixture(self.log_weights, self.means[..., chosen], covariances)

    def condition(self, features: Sequence[int], values: Tensor) -> Mixture:
        r"""Return the mixtures of the other features a, given ``values`` (B, d) of the features b with these indices.

        Covariances are full. Values (B, N, d) give B * N mixtures: those of the N rows of the first set, and so on.

        .. math::
            \mu_{a|b} = \mu_a + \Sigma_{ab} \Sigma_{bb}^{-1} (x_b - \mu_b), \qquad
            \Sigma_{a|b} = \Sigma_{aa} - \Sigma_{ab} \Sigma_{bb}^{-1} \Sigma_{ba}, \qquad
            \pi_{k|b} \propto \pi_k N(x_b \mid \mu_{kb}, \Sigma_{kbb})

        Example:
            >>> covariances = torch.tensor([[[[1.0, 0.5], [0.5, 1.0]]]])
            >>> one = Mixture(torch.zeros(1, 1), torch.zeros(1, 1, 2), covariances)
            >>> one.condition([0], torch.ones(1, 1)).means
            tensor([[[0.5000]]])

        Source: Bishop, Pattern Recognition and Machine Learning, 2006, section 2.3.
        """
        if values.ndim == 3:
            one_per_row = self.map(lambda part: part.repeat_interleave(values.shape[1], dim=0))
            return one_per_row.condition(features, values.flatten(0, 1))
        b = [index % self.features for index in features]
        a = [index for index in range(self.features) if index not in b]
        log_weights = self.marginal(b).log_joint(values.unsqueeze(1)).squeeze(1).log_softmax(-1)
        sigma = self.full().covariances
        sigma_ab = sigma[..., a, :][..., b]
        gain = torch.linalg.solve(sigma[..., b, :][..., b], sigma_ab, left=False)  # Sigma_ab Sigma_bb^-1
        means = self.means[..., a] + torch.einsum("bkij,bkj->bki", gain, values.unsqueeze(1) - self.means[..., b])
        covariances = sigma[..., a, :][..., a] - gain @ sigma_ab.mT
        return Mixture(log_weights.to(means.dtype), means, 0.5 * (covariances + covariances.mT))


register_dataclass(Mixture, serialized_type_name="em_lightning.Mixture")


def mixture_of(points: Points, parameters: Parameters, covariance: Covariance, dtype: torch.dtype) -> Mixture:
    """Convert parameters in frame coordinates to a mixture in the user's units."""
    mixture = Mixture(*parameters._replace(covariances=covariance.to_public(parameters.covariances)))
    return mixture.affine(points.frame.scale, points.frame.center).to(dtype)


def check_points(mixture: Mixture, x: Tensor) -> None:
    """Raise an error unless x holds points (B, N, D) that match the mixtures."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x)}; convert NumPy arrays with torch.from_numpy")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; give a floating-point tensor, for instance x.float()")
    if x.ndim != 3 or x.shape[0] not in (1, mixture.sets) or x.shape[-1] != mixture.features:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit {mixture.sets} mixtures of {mixture.features} features; "
            f"give ({mixture.sets}, N, {mixture.features})"
        )


class InformationCriteria(NamedTuple):
    """Information criteria of a fit; lower is better."""

    bic: float
    aic: float


def information_criteria(mixture: Mixture, log_likelihood: float, count: float) -> InformationCriteria:
    r"""Return the Bayesian and the Akaike information criterion.

    .. math:: \mathrm{BIC} = m \log N - 2 \log p(X), \qquad \mathrm{AIC} = 2 m - 2 \log p(X)

    m is the number of free parameters, N the ``count`` of points, log p(X) the ``log_likelihood`` of all of them.

    Source: Schwarz, Estimating the Dimension of a Model, 1978; Akaike, A New Look at the Statistical Model
    Identification, 1974.
    """
    m = mixture.num_parameters
    return InformationCriteria(bic=m * math.log(count) - 2.0 * log_likelihood, aic=2.0 * m - 2.0 * log_likelihood)
