"""Covariance types: shapes, features, factorization, Gaussian log-densities, M-step estimates and conversions.

No other module branches on the covariance type. A type names the features of second degree ``s(x)`` of a point such
that the Gaussian log-density is linear in ``phi(x) = [1, x, s(x)]``:

    log pi_k + log N(x | mu_k, Sigma_k) = theta_k . phi(x)

The E-step is then one matrix product and a softmax, and the sufficient statistics are ``sum_n r_nk phi(x_n)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.mixture.cholesky import Factor, cholesky_with_inverse, smallest_pivots


class Parameters(NamedTuple):
    """The parameters of a mixture inside the EM loop, in the coordinates of its :class:`~.points.Points`.

    log_weights: (B, K).
    means: (B, K, D).
    covariances: in the shape of the covariance type; concentrations (B, K) for directions.
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor


class Covariance(ABC):
    """One covariance type."""

    name: str
    whitening: str
    """The shape of the inverse factor ``W``: a triangle (full), a diagonal, or a number (spherical)."""

    @property
    def unrestricted(self) -> Covariance:
        """The type whose M-step estimate is in closed form and needs no previous covariances."""
        return self

    @abstractmethod
    def shape(self, num_components: int, num_features: int) -> tuple[int, ...]:
        """Return the shape of the covariances of one set."""

    @abstractmethod
    def num_parameters(self, num_components: int, num_features: int) -> int:
        """Return the number of free parameters of the covariances."""

    @abstractmethod
    def second_degree(self, x: Tensor) -> Tensor:
        """Return the features of second degree (B, S, N) of points (B, D, N)."""

    def features(self, x: Tensor) -> Tensor:
        """Return ``phi(x) = [1, x, s(x)]`` (B, 1 + D + S, N) of points (B, D, N)."""
        return torch.cat([torch.ones_like(x[:, :1]), x, self.second_degree(x)], 1)

    @abstractmethod
    def factorize(self, covariances: Tensor, means: Tensor | None = None) -> Factor:
        """Return ``L`` with ``Sigma = L L^T`` and its inverse; pivots below round-off are raised to it."""

    @abstractmethod
    def natural_parameters(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return theta (B, K, 1 + D + S) and the log-density at the mean, ``log pi_k N(mu_k | mu_k, Sigma_k)`` (B, K)."""

    @abstractmethod
    def log_peak(self, log_weights: Tensor, inverse: Tensor, num_features: int) -> Tensor:
        """Return the log-density at the mean (B, K) for an inverse factor ``W``."""

    @abstractmethod
    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return means and covariances of largest expected log-likelihood.

        Args:
            means: (B, K, D), weighted means of the points.
            scatter: (B, K, S), ``sum_n r_nk s(x_n - mu_k)``.
            mass: (B, K), what the scatter is divided by.
            floor: (B,), added to every variance.
            before: covariances of the E-step.
        """

    @abstractmethod
    def expand(self, variance: Tensor, num_components: int) -> Tensor:
        """Return covariances with the variances (B, D) of each feature for every component."""

    @abstractmethod
    def scaled(self, covariances: Tensor, ratio: Tensor) -> Tensor:
        """Return covariances multiplied by a ratio (B, K) or (B, 1)."""

    @abstractmethod
    def diagonal(self, covariances: Tensor, num_features: int) -> Tensor:
        """Return the variances (B, K, D) or, where components share them, (B, 1, D)."""

    @abstractmethod
    def marginal(self, covariances: Tensor, features: list[int]) -> Tensor:
        """Return the covariances of some features."""

    @abstractmethod
    def to_full(self, covariances: Tensor, means: Tensor) -> Tensor:
        """Return full covariances (B, K, D, D) of components with means (B, K, D)."""

    def sharing(self, num_components: int) -> int:
        """Return how many components share a covariance."""
        return 1

    @abstractmethod
    def apply(self, factor: Tensor, vectors: Tensor) -> Tensor:
        """Return the product of a factor and vectors (B, K, D)."""

    @abstractmethod
    def correction_size(self, num_features: int) -> int:
        """Return how many numbers describe a correction: see :meth:`correct`."""

    @abstractmethod
    def correct(self, before: Factor, after: Factor, covariances: Tensor, correction: Tensor, floor: Tensor) -> Tensor:
        """Return corrected covariances, never below the floor (B,), equal to ``covariances`` for a correction of zero.

        ``Sigma <- G (Sigma - floor I) G^T + floor I`` with ``G = L E W``. ``E`` stretches and shears the component, and
        repeats the change that the M-step made: EM shrinks a thin component by a constant factor per iteration, which
        a correction may apply several times at once.

        Args:
            before: factors of the E-step.
            after: factors ``L, W`` of the covariances.
            covariances: of the M-step.
            correction: (B, K, correction_size).
            floor: (B,).
        """

    @abstractmethod
    def describe(self, before: Factor, after: Factor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-size of each factor relative to a scale (B, 1, 1), and how the M-step changed it."""

    def to_public(self, covariances: Tensor) -> Tensor:
        """Return the covariances of a :class:`~.mixture.Mixture`."""
        return covariances

    def from_public(self, covariances: Tensor) -> Tensor:
        """Return the covariances of the loop for those of a :class:`~.mixture.Mixture`."""
        return covariances

    def changes(self, before: Parameters, after: Parameters) -> Tensor:
        """Return the largest change (B,) of weights, and of means and factors in standard deviations."""
        own, new = self.factorize(before.covariances), self.factorize(after.covariances)
        weights = (after.log_weights.exp() - before.log_weights.exp()).abs().amax(1)
        shift = self.apply(new.inverse, after.means - before.means).abs().flatten(1).amax(1)
        growth = self.compose(new.inverse, new.scale - own.scale).abs().flatten(1).amax(1)
        return torch.stack([weights, shift, growth]).amax(0)

    @abstractmethod
    def compose(self, factor: Tensor, other: Tensor) -> Tensor:
        """Return the product of two factors."""


class FullCovariance(Covariance):
    """Any positive definite covariance for each component: ``Sigma (B, K, D, D)``, ``s(x) = [x_i x_j for i <= j]``."""

    name = "full"
    whitening = "full"

    def shape(self, num_components: int, num_features: int) -> tuple[int, ...]:
        """Return (K, D, D)."""
        return num_components, num_features, num_features

    def num_parameters(self, num_components: int, num_features: int) -> int:
        """Return K D (D + 1) / 2."""
        return num_components * num_features * (num_features + 1) // 2

    def second_degree(self, x: Tensor) -> Tensor:
        """Return the products of pairs of features (B, D (D + 1) / 2, N)."""
        return torch.cat([x[:, i : i + 1] * x[:, i:] for i in range(x.shape[1])], 1)

    def factorize(self, covariances: Tensor, means: Tensor | None = None) -> Factor:
        """Return the lower Cholesky factor and its inverse."""
        matrix = self.to_public(covariances)
        second_moment = matrix.diagonal(dim1=-2, dim2=-1)
        if means is not None:
            second_moment = second_moment + self.pool(means.square())
        return cholesky_with_inverse(matrix, smallest_pivots(second_moment))

    def natural_parameters(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return ``[log pi_k N(0), P mu, -P_ii / 2, -P_ij]`` with the precision ``P``, and the log-density at the mean."""
        log_weights, means, covariances = parameters
        features = means.shape[-1]
        inverse = self.factorize(covariances, means).inverse
        precision = inverse.mT @ inverse
        linear = (precision @ means.unsqueeze(-1)).squeeze(-1)
        peak = self.log_peak(log_weights, inverse, features)
        constant = peak - 0.5 * (means * linear).sum(-1)
        i, j = torch.triu_indices(features, features, device=means.device)
        square = precision[..., i, j] * torch.where(i == j, -0.5, -1.0).to(precision)
        square = square.expand(*linear.shape[:-1], -1)
        return torch.cat([constant.unsqueeze(-1), linear, square], -1), peak

    def log_peak(self, log_weights: Tensor, inverse: Tensor, num_features: int) -> Tensor:
        """Return ``log pi_k + log det W - D / 2 log(2 pi)``."""
        return log_weights + inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1) - half_log_tau(num_features)

    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the means and ``Sigma = scatter / mass + floor I``."""
        spread = self.matrix(self.average(scatter, mass), means.shape[-1])
        return means, spread + floor[:, None, None, None] * torch.eye(means.shape[-1]).to(spread)

    def average(self, scatter: Tensor, mass: Tensor) -> Tensor:
        """Return the scatter (B, K, S) per mass (B, K)."""
        return scatter / mass.unsqueeze(-1)

    def pool(self, values: Tensor) -> Tensor:
        """Return values (B, K, D) as the components share them."""
        return values

    def matrix(self, pairs: Tensor, num_features: int) -> Tensor:
        """Return symmetric matrices (..., D, D) of their upper triangles (..., S)."""
        i, j = torch.triu_indices(num_features, num_features, device=pairs.device)
        place = torch.empty(num_features, num_features, dtype=torch.long, device=pairs.device)
        place[i, j] = place[j, i] = torch.arange(len(i), device=pairs.device)
        return pairs[..., place]

    def expand(self, variance: Tensor, num_components: int) -> Tensor:
        """Return ``diag(variance)`` for every component."""
        return variance.unsqueeze(1).expand(-1, num_components, -1).diag_embed()

    def scaled(self, covariances: Tensor, ratio: Tensor) -> Tensor:
        """Return ``ratio Sigma``."""
        return covariances * ratio[..., None, None]

    def diagonal(self, covariances: Tensor, num_features: int) -> Tensor:
        """Return the diagonal (B, K, D)."""
        return self.to_public(covariances).diagonal(dim1=-2, dim2=-1)

    def marginal(self, covariances: Tensor, features: list[int]) -> Tensor:
        """Return rows and columns of the features."""
        return covariances[..., features, :][..., features]

    def to_full(self, covariances: Tensor, means: Tensor) -> Tensor:
        """Return the covariances of every component (B, K, D, D)."""
        return self.to_public(covariances).expand(-1, means.shape[1], -1, -1)

    def apply(self, factor: Tensor, vectors: Tensor) -> Tensor:
        """Return matrix-vector products (B, K, D)."""
        return (factor @ vectors.unsqueeze(-1)).squeeze(-1)

    def compose(self, factor: Tensor, other: Tensor) -> Tensor:
        """Return the matrix product."""
        return factor @ other

    def correction_size(self, num_features: int) -> int:
        """Return D (D + 1) / 2 + 2: log-diagonal and strict lower triangle of ``T``, and the two repetitions."""
        return num_features * (num_features + 1) // 2 + 2

    def correct(self, before: Factor, after: Factor, covariances: Tensor, correction: Tensor, floor: Tensor) -> Tensor:
        """Return the corrected covariances, with ``E = T (I + a (M - I) + b (M^2 - M))``.

        ``T`` is a lower triangle with a positive diagonal and ``M = L^T Sigma_before^-1 L`` the change of the M-step.
        """
        features = covariances.shape[-1]
        eye = torch.eye(features).to(covariances)
        change = before.inverse @ after.scale
        change = change.mT @ change
        change = change / change.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1.0)[..., None, None]
        once, twice = correction[..., -2:].tanh()[..., None, None].unbind(-3)
        repeated = eye + once * (change - eye) + twice * (change @ change - change)
        step = after.scale @ (lower_triangle(correction[..., :-2], features) @ repeated) @ after.inverse
        least = floor[:, None, None, None] * eye
        return step @ (covariances - least) @ step.mT + least

    def describe(self, before: Factor, after: Factor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-diagonal and slopes of the factor, and of the factor of the change."""
        features = after.scale.shape[-1]
        below = torch.tril_indices(features, features, -1, device=scale.device)
        diagonal = after.scale.diagonal(dim1=-2, dim2=-1)
        slopes = after.scale[..., below[0], below[1]] / diagonal[..., below[1]]
        change = before.inverse @ after.scale
        shrunk = change.diagonal(dim1=-2, dim2=-1).log()
        return (
            torch.cat([(diagonal / scale).log(), slopes], -1),
            torch.cat([shrunk, change[..., below[0], below[1]]], -1),
        )


class TiedCovariance(FullCovariance):
    """One covariance that all components of a set share: ``Sigma (B, 1, D, D)``."""

    name = "tied"

    def shape(self, num_components: int, num_features: int) -> tuple[int, ...]:
        """Return (1, D, D)."""
        return 1, num_features, num_features

    def num_parameters(self, num_components: int, num_features: int) -> int:
        """Return D (D + 1) / 2."""
        return num_features * (num_features + 1) // 2

    def sharing(self, num_components: int) -> int:
        """Return K."""
        return num_components

    def average(self, scatter: Tensor, mass: Tensor) -> Tensor:
        """Return the scatter of all components per mass of all."""
        return scatter.sum(1, keepdim=True) / mass.sum(1, keepdim=True).unsqueeze(-1)

    def pool(self, values: Tensor) -> Tensor:
        """Return the mean over components (B, 1, D)."""
        return values.mean(1, keepdim=True)

    def expand(self, variance: Tensor, num_components: int) -> Tensor:
        """Return ``diag(variance)``, once per set."""
        return super().expand(variance, 1)

    def scaled(self, covariances: Tensor, ratio: Tensor) -> Tensor:
        """Return ``Sigma`` times the mean ratio of the components."""
        return super().scaled(covariances, ratio.mean(1, keepdim=True))

    def correct(self, before: Factor, after: Factor, covariances: Tensor, correction: Tensor, floor: Tensor) -> Tensor:
        """Return the covariances under the mean of the components' corrections."""
        return super().correct(before, after, covariances, correction.mean(1, keepdim=True), floor)


class DiagonalCovariance(Covariance):
    """Axis-parallel components: variances (B, K, D), ``s(x) = [x_i^2]``; factors are standard deviations."""

    name = "diag"
    whitening = "diagonal"

    def shape(self, num_components: int, num_features: int) -> tuple[int, ...]:
        """Return (K, D)."""
        return num_components, num_features

    def num_parameters(self, num_components: int, num_features: int) -> int:
        """Return K D."""
        return num_components * num_features

    def variances(self, covariances: Tensor) -> Tensor:
        """Return covariances as (B, K, D), or (B, K, 1) where features share them."""
        return covariances

    def pack(self, variances: Tensor) -> Tensor:
        """Return the covariances of :meth:`variances`."""
        return variances

    def second_degree(self, x: Tensor) -> Tensor:
        """Return the squares of the features (B, D, N)."""
        return x.square()

    def second_moments(self, variances: Tensor, means: Tensor | None) -> Tensor:
        """Return ``sigma^2 + mu^2`` in the shape of the variances."""
        return variances if means is None else variances + means.square()

    def factorize(self, covariances: Tensor, means: Tensor | None = None) -> Factor:
        """Return the standard deviations and their reciprocals."""
        variances = self.variances(covariances)
        root = torch.maximum(variances, smallest_pivots(self.second_moments(variances, means))).sqrt()
        return Factor(root, root.reciprocal())

    def natural_parameters(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return ``[log pi_k N(0), mu / sigma^2, -1 / (2 sigma^2)]`` and the log-density at the mean."""
        log_weights, means, covariances = parameters
        features = means.shape[-1]
        inverse = self.factorize(covariances, means).inverse
        precision = inverse.square()
        linear = precision * means
        peak = self.log_peak(log_weights, inverse, features)
        constant = peak - 0.5 * (means * linear).sum(-1)
        return torch.cat([constant.unsqueeze(-1), linear, -0.5 * precision], -1), peak

    def log_peak(self, log_weights: Tensor, inverse: Tensor, num_features: int) -> Tensor:
        """Return ``log pi_k - sum log sigma - D / 2 log(2 pi)``."""
        log_det = inverse.log().sum(-1) * (num_features / inverse.shape[-1])
        return log_weights + log_det - half_log_tau(num_features)

    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the means and ``sigma^2 = scatter / mass + floor``."""
        variances = self.average(scatter, mass, means.shape[-1])
        least = smallest_pivots(self.second_moments(variances.abs(), means))
        return means, self.pack(torch.maximum(variances + floor[:, None, None], least))

    def average(self, scatter: Tensor, mass: Tensor, num_features: int) -> Tensor:
        """Return the scatter (B, K, S) per mass (B, K) and feature."""
        return scatter / mass.unsqueeze(-1)

    def expand(self, variance: Tensor, num_components: int) -> Tensor:
        """Return the variances for every component."""
        return self.pack(variance.unsqueeze(1).expand(-1, num_components, -1))

    def scaled(self, covariances: Tensor, ratio: Tensor) -> Tensor:
        """Return ``ratio sigma^2``."""
        return self.pack(self.variances(covariances) * ratio.unsqueeze(-1))

    def diagonal(self, covariances: Tensor, num_features: int) -> Tensor:
        """Return the variances (B, K, D)."""
        return self.variances(covariances).expand(-1, -1, num_features)

    def marginal(self, covariances: Tensor, features: list[int]) -> Tensor:
        """Return the variances of the features."""
        return covariances[..., features]

    def to_full(self, covariances: Tensor, means: Tensor) -> Tensor:
        """Return diagonal matrices (B, K, D, D)."""
        return self.diagonal(covariances, means.shape[-1]).diag_embed()

    def apply(self, factor: Tensor, vectors: Tensor) -> Tensor:
        """Return elementwise products (B, K, D)."""
        return factor * vectors

    def compose(self, factor: Tensor, other: Tensor) -> Tensor:
        """Return the elementwise product."""
        return factor * other

    def correction_size(self, num_features: int) -> int:
        """Return D + 2: the log of the stretch of each feature, and the two repetitions."""
        return num_features + 2

    def correct(self, before: Factor, after: Factor, covariances: Tensor, correction: Tensor, floor: Tensor) -> Tensor:
        """Return the corrected variances, feature by feature as for full covariances."""
        change = (before.inverse * after.scale).square()
        change = change / change.mean(-1, keepdim=True).clamp(min=1.0)
        once, twice = correction[..., -2:].tanh().unsqueeze(-1).unbind(-2)
        repeated = 1.0 + once * (change - 1.0) + twice * (change.square() - change)
        step, least = correction[..., :-2].exp() * repeated, floor[:, None, None]
        return self.pack(step.square() * (self.variances(covariances) - least) + least)

    def describe(self, before: Factor, after: Factor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return log standard deviations and the logs of their ratios."""
        return (after.scale / scale).log(), (after.scale * before.inverse).log()


class SphericalCovariance(DiagonalCovariance):
    """Round components: one variance each, ``Sigma (B, K)``, ``s(x) = |x|^2``."""

    name = "spherical"
    whitening = "spherical"

    def shape(self, num_components: int, num_features: int) -> tuple[int, ...]:
        """Return (K,)."""
        return (num_components,)

    def num_parameters(self, num_components: int, num_features: int) -> int:
        """Return K."""
        return num_components

    def variances(self, covariances: Tensor) -> Tensor:
        """Return (B, K, 1)."""
        return covariances.unsqueeze(-1)

    def pack(self, variances: Tensor) -> Tensor:
        """Return (B, K)."""
        return variances.mean(-1)

    def marginal(self, covariances: Tensor, features: list[int]) -> Tensor:
        """Return the variances as they are."""
        return covariances

    def second_degree(self, x: Tensor) -> Tensor:
        """Return the squared norm (B, 1, N)."""
        return x.square().sum(1, keepdim=True)

    def second_moments(self, variances: Tensor, means: Tensor | None) -> Tensor:
        """Return ``sigma^2 + |mu|^2 / D``."""
        return variances if means is None else variances + means.square().mean(-1, keepdim=True)

    def average(self, scatter: Tensor, mass: Tensor, num_features: int) -> Tensor:
        """Return the scatter per mass and feature (B, K, 1)."""
        return scatter / (num_features * mass.unsqueeze(-1))

    def correction_size(self, num_features: int) -> int:
        """Return 3: the log of the stretch, and the two repetitions."""
        return 3


COVARIANCES: dict[str, Covariance] = {
    kind.name: kind for kind in (FullCovariance(), DiagonalCovariance(), SphericalCovariance(), TiedCovariance())
}


def covariance_of(covariances: Tensor, means: Tensor) -> Covariance:
    """Return the covariance type that the shape of a mixture's covariances implies.

    Args:
        covariances: (B, ...).
        means: (B, K, D).

    Raises:
        ValueError: the shape belongs to no type.
    """
    components, features = means.shape[1:]
    for kind in COVARIANCES.values():
        if covariances.shape == (len(means), *kind.shape(components, features)):
            return kind
    known = ", ".join(f"{name} {(len(means), *kind.shape(components, features))}" for name, kind in COVARIANCES.items())
    raise ValueError(
        f"covariances of shape {tuple(covariances.shape)} fit no covariance type for means {tuple(means.shape)}: {known}"
    )


def lower_triangle(entries: Tensor, num_features: int) -> Tensor:
    """Return lower triangles (..., D, D) of log-diagonals and strict lower triangles (..., D (D + 1) / 2)."""
    below = torch.tril_indices(num_features, num_features, -1, device=entries.device)
    triangle = entries.new_zeros(*entries.shape[:-1], num_features, num_features)
    triangle[..., below[0], below[1]] = entries[..., num_features:]
    return triangle + entries[..., :num_features].exp().diag_embed()


def half_log_tau(num_features: int) -> float:
    """Return ``D / 2 log(2 pi)``."""
    return 0.5 * num_features * math.log(2.0 * math.pi)
