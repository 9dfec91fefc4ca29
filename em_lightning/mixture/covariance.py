"""Covariance structures: which moments of the points a component needs, and what it makes of them.

A structure names *features* ``phi(x)`` such that ``log pi_k + log N(x | mu_k, Sigma_k) = theta_k . phi(x)``. The E-step
is then one product ``theta phi`` and a softmax, and the M-step needs nothing but the moments ``r phi^T``.
Covariances are held by a *factor* ``L`` with ``Sigma = L L^T`` and its inverse ``W``.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from em_lightning.mixture.factors import (
    UNROLLED_UP_TO,
    Factors,
    State,
    cholesky_of_rows,
    cholesky_with_inverse,
    least_pivots_of,
)


class FullCovariance:
    """Any positive definite covariance for each component: ``Sigma (B, K, D, D)``, lower-triangular factors.

    Features are ``[1, x_i, x_i x_j for i <= j]``.
    """

    name = "full"

    def num_moments(self, num_features: int) -> int:
        """Return F, the number of features."""
        return 1 + num_features + num_features * (num_features + 1) // 2

    def features(self, points: Tensor, dtype: torch.dtype) -> Tensor:
        """Return phi (B, F, N) of points (B, D, N)."""
        points = points.to(dtype)
        pairs = [points[:, i : i + 1] * points[:, i:] for i in range(points.shape[1])]
        return torch.cat([torch.ones_like(points[:, :1]), points, *pairs], 1)

    def fill(self, points: Tensor, out: Tensor) -> Tensor:
        """Write phi of points (B, D, N) of the same type into ``out`` (B, F, N)."""
        features = points.shape[1]
        out[:, 0] = 1.0
        out[:, 1 : 1 + features] = points
        place = 1 + features
        for i in range(features):
            torch.mul(points[:, i : i + 1], points[:, i:], out=out[:, place : place + features - i])
            place += features - i
        return out

    def pull_back(self, points: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of points (B, D, N) that a gradient (B, F, N) of their features stands for."""
        features = points.shape[1]
        points = points.to(grad.dtype)
        own = grad[:, 1 : 1 + features].clone()
        place = 1 + features
        for i in range(features):
            pairs = grad[:, place : place + features - i]
            own[:, i:].addcmul_(pairs, points[:, i : i + 1])
            own[:, i].add_((pairs * points[:, i:]).sum(1))
            place += features - i
        return own

    def natural(self, state: State) -> Tensor:
        """Return theta (B, K, F) with ``theta . phi(x) = log pi + log N(x | mu, Sigma)``."""
        features = state.means.shape[-1]
        inverse = state.factors.inverse
        if features <= UNROLLED_UP_TO:
            return _unrolled_natural(state)
        i, j = _pairs(features, inverse.device)
        precision = inverse.mT @ inverse
        whitened = (inverse @ state.means.unsqueeze(-1)).squeeze(-1)
        log_det = inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = state.log_weights + log_det - 0.5 * whitened.square().sum(-1) - _half_log_tau(features)
        linear = (inverse.mT @ whitened.unsqueeze(-1)).squeeze(-1)
        square = precision[..., i, j] * torch.where(i == j, -0.5, -1.0).to(precision)
        return torch.cat([constant.unsqueeze(-1), linear, square.expand(*linear.shape[:-1], -1)], -1)

    def maximize(self, moments: Tensor, floor: Tensor, before: Factors | None = None) -> State:
        """Return weights, means and covariances of largest expected log-likelihood for moments (B, K, F).

        A floor (B,) is added to the variances. The factors that the E-step saw play no part.
        """
        if _features_of(moments.shape[-1]) <= UNROLLED_UP_TO:
            return self._unrolled(moments, floor)
        log_weights, means, second = moments_of(moments)
        return State(log_weights, means, self._factors(_mass(moments)[0], means, second, floor))

    def _factors(self, mass: Tensor, means: Tensor, second: Tensor, floor: Tensor) -> Factors:
        spread = second - means.unsqueeze(-1) * means.unsqueeze(-2)
        return _with_floor(spread, second.diagonal(dim1=-2, dim2=-1), floor)

    def _unrolled(self, moments: Tensor, floor: Tensor) -> State:
        """Return the same in operations on (B, K) tensors."""
        size = _features_of(moments.shape[-1])
        mass, log_weights = _mass(moments)
        shares = (moments[..., 1:] / mass.unsqueeze(-1)).permute(2, 0, 1).contiguous().unbind(0)
        means, second = shares[:size], iter(shares[size:])
        spread: list[list[Tensor]] = [[] for _ in range(size)]  # rows of the lower triangle
        least = []
        for i in range(size):
            for j in range(i, size):
                square = next(second)
                difference = self._pool(torch.addcmul(square, means[i], means[j], value=-1), mass)
                spread[j].append(difference if i != j else difference + floor.unsqueeze(-1))
                if i == j:
                    least.append(least_pivots_of(self._pool(square, mass)))
        return State(log_weights, torch.stack(means, -1), cholesky_of_rows(spread, least))

    def _pool(self, entry: Tensor, mass: Tensor) -> Tensor:
        """Return an entry (B, K) of the covariances as the components share it."""
        return entry

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of ``variance (B, D) * I`` for every component."""
        root = variance.sqrt().unsqueeze(-2).expand(-1, num_components, -1)
        return Factors(root.diag_embed(), root.reciprocal().diag_embed())

    def factorize(self, covariances: Tensor) -> Factors:
        """Return the factors of given covariances."""
        return cholesky_with_inverse(covariances, least_pivots_of(covariances.diagonal(dim1=-2, dim2=-1)))

    def covariances(self, scale: Tensor) -> Tensor:
        """Return ``L L^T``."""
        return scale @ scale.mT

    def apply(self, factor: Tensor, vectors: Tensor) -> Tensor:
        """Return the product of a factor and vectors (B, K, D)."""
        return (factor @ vectors.unsqueeze(-1)).squeeze(-1)

    def step_size(self, num_features: int) -> int:
        """Return how many numbers describe a correction: log-diagonal, strict lower triangle, two repetitions."""
        return num_features * (num_features + 1) // 2 + 2

    def correct(self, before: Factors, after: Factors, correction: Tensor, floor: Tensor) -> Factors:
        """Return the factors of ``L (E (I - V) E^T + V) L^T``, ``V`` the share of the floor that ``Sigma`` contains.

        ``E = T (I + a (M - I) + b (M^2 - M))``: a lower triangle ``T`` with a positive diagonal, and the change ``M``
        that the last M-step made, repeated by ``a`` and ``b`` (EM shrinks a thin component by a constant factor an
        iteration; here it may take several at once). The result is positive definite whatever the correction
        (B, K, step_size), never below the floor, and ``Sigma`` itself where the correction is zero.
        """
        features = after.scale.shape[-1]
        below = torch.tril_indices(features, features, -1, device=correction.device)
        eye = torch.eye(features, dtype=after.scale.dtype, device=after.scale.device)
        change = before.inverse @ after.scale
        change = change.mT @ change
        change = change / change.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1.0)[..., None, None]
        once, twice = correction[..., -2:].tanh()[..., None, None].unbind(-3)
        repeated = eye + once * (change - eye) + twice * (change @ change - change)
        triangle = correction.new_zeros(*correction.shape[:-1], features, features)
        triangle[..., below[0], below[1]] = correction[..., features:-2]
        step = (triangle + correction[..., :features].exp().diag_embed()) @ repeated
        share = floor[:, None, None, None] * (after.inverse @ after.inverse.mT)
        spread = step @ (eye - share) @ step.mT + share
        taken = cholesky_with_inverse(spread, least_pivots_of(spread.diagonal(dim1=-2, dim2=-1)))
        return Factors(after.scale @ taken.scale, taken.inverse @ after.inverse)


class TiedCovariance(FullCovariance):
    """One covariance that all components of a set share: ``Sigma (B, 1, D, D)``."""

    name = "tied"

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of ``variance (B, D) * I``, once a set."""
        return super().expand(variance, 1, num_features)

    def _pool(self, entry: Tensor, mass: Tensor) -> Tensor:
        return (mass * entry).sum(-1, keepdim=True) / mass.sum(-1, keepdim=True)

    def _factors(self, mass: Tensor, means: Tensor, second: Tensor, floor: Tensor) -> Factors:
        share = (mass / mass.sum(-1, keepdim=True))[..., None, None]
        spread = (share * (second - means.unsqueeze(-1) * means.unsqueeze(-2))).sum(1, keepdim=True)
        largest = (share * second).sum(1, keepdim=True).diagonal(dim1=-2, dim2=-1)
        return _with_floor(spread, largest, floor)

    def correct(self, before: Factors, after: Factors, correction: Tensor, floor: Tensor) -> Factors:
        """Return the corrected factors; the correction is the mean of what the components ask for."""
        return super().correct(before, after, correction.mean(1, keepdim=True), floor)


class DiagonalCovariance:
    """Axis-parallel components: variances ``Sigma (B, K, D)``, factors are standard deviations.

    Features are ``[1, x_i, x_i^2]``.
    """

    name = "diag"

    def num_moments(self, num_features: int) -> int:
        """Return F, the number of features."""
        return 1 + 2 * num_features

    def features(self, points: Tensor, dtype: torch.dtype) -> Tensor:
        """Return phi (B, F, N) of points (B, D, N)."""
        points = points.to(dtype)
        return torch.cat([torch.ones_like(points[:, :1]), points, self._squares(points)], 1)

    def fill(self, points: Tensor, out: Tensor) -> Tensor:
        """Write phi of points (B, D, N) of the same type into ``out`` (B, F, N)."""
        features = points.shape[1]
        out[:, 0] = 1.0
        out[:, 1 : 1 + features] = points
        out[:, 1 + features :] = self._squares(points)
        return out

    def _squares(self, points: Tensor) -> Tensor:
        return points.square()

    def pull_back(self, points: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of points (B, D, N) that a gradient (B, F, N) of their features stands for."""
        features = points.shape[1]
        return grad[:, 1 : 1 + features] + 2.0 * points * grad[:, 1 + features :]

    def natural(self, state: State) -> Tensor:
        """Return theta (B, K, F) with ``theta . phi(x) = log pi + log N(x | mu, Sigma)``."""
        features = state.means.shape[-1]
        inverse = state.factors.inverse
        whitened = inverse * state.means
        log_det = inverse.log().sum(-1) * (features / inverse.shape[-1])
        constant = state.log_weights + log_det - 0.5 * whitened.square().sum(-1) - _half_log_tau(features)
        return torch.cat([constant.unsqueeze(-1), inverse * whitened, -0.5 * inverse.square()], -1)

    def maximize(self, moments: Tensor, floor: Tensor, before: Factors | None = None) -> State:
        """Return weights, means and variances of largest expected log-likelihood for moments (B, K, F).

        A floor (B,) is added to the variances. The factors that the E-step saw play no part.
        """
        mass, log_weights = _mass(moments)
        shares = moments[..., 1:] / mass.unsqueeze(-1)
        means, second = self._split(shares)
        spread = self._average(second, means) + floor[:, None, None]
        root = torch.maximum(spread, least_pivots_of(second)).sqrt()
        return State(log_weights, means, Factors(root, root.reciprocal()))

    def _split(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        means, second = shares.chunk(2, -1)
        return means, second

    def _average(self, second: Tensor, means: Tensor) -> Tensor:
        return second - means.square()

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of ``variance (B, D) * I`` for every component."""
        root = variance.sqrt().unsqueeze(-2).expand(-1, num_components, -1)
        return Factors(root, root.reciprocal())

    def factorize(self, covariances: Tensor) -> Factors:
        """Return the factors of given variances."""
        root = torch.maximum(covariances, least_pivots_of(covariances)).sqrt()
        return Factors(root, root.reciprocal())

    def covariances(self, scale: Tensor) -> Tensor:
        """Return ``L L^T``, its diagonal only."""
        return scale.square()

    def apply(self, factor: Tensor, vectors: Tensor) -> Tensor:
        """Return the product of a factor and vectors (B, K, D)."""
        return factor * vectors

    def step_size(self, num_features: int) -> int:
        """Return how many numbers describe a correction: the log of the step in each feature, two repetitions."""
        return num_features + 2

    def correct(self, before: Factors, after: Factors, correction: Tensor, floor: Tensor) -> Factors:
        """Return the factors of ``L (E^2 (1 - V) + V) L``, feature by feature what the full case is."""
        change = (before.inverse * after.scale).square()
        change = change / change.mean(-1, keepdim=True).clamp(min=1.0)
        once, twice = correction[..., -2:].tanh().unsqueeze(-1).unbind(-2)
        repeated = 1.0 + once * (change - 1.0) + twice * (change.square() - change)
        share = floor[:, None, None] * after.inverse.square()
        spread = (correction[..., :-2].exp() * repeated).square() * (1.0 - share) + share
        root = torch.maximum(spread, least_pivots_of(spread)).sqrt()
        return Factors(after.scale * root, after.inverse / root)


class SphericalCovariance(DiagonalCovariance):
    """Round components: one variance each, ``Sigma (B, K)``, factors (B, K, 1).

    Features are ``[1, x_i, |x|^2]``.
    """

    name = "spherical"

    def num_moments(self, num_features: int) -> int:
        """Return F, the number of features."""
        return 2 + num_features

    def _squares(self, points: Tensor) -> Tensor:
        return points.square().sum(1, keepdim=True)

    def _split(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        return shares[..., :-1], shares[..., -1:] / (shares.shape[-1] - 1)

    def _average(self, second: Tensor, means: Tensor) -> Tensor:
        return second - means.square().mean(-1, keepdim=True)

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of the mean of ``variance (B, D)`` for every component."""
        return super().expand(variance.mean(-1, keepdim=True), num_components, num_features)

    def factorize(self, covariances: Tensor) -> Factors:
        """Return the factors of given variances (B, K)."""
        return super().factorize(covariances.unsqueeze(-1))

    def covariances(self, scale: Tensor) -> Tensor:
        """Return the variances (B, K)."""
        return scale.square().squeeze(-1)

    def step_size(self, num_features: int) -> int:
        """Return how many numbers describe a correction: the log of the step, two repetitions."""
        return 3


Structure = FullCovariance | DiagonalCovariance
COVARIANCES: dict[str, Structure] = {
    part.name: part for part in (FullCovariance(), DiagonalCovariance(), SphericalCovariance(), TiedCovariance())
}


def compiled(structure: Structure, **options: Any) -> Structure:
    """Return a structure, what an iteration calls compiled; options are those of ``torch.compile``."""
    structure = copy.copy(structure)
    for function in (structure.natural, structure.maximize):
        setattr(structure, function.__name__, torch.compile(function, **options))
    return structure


def _unrolled_natural(state: State) -> Tensor:
    """Return theta (B, K, F) of full covariances, in operations on (B, K) tensors."""
    size = state.means.shape[-1]
    # Contiguous (B, K) tensors, once: what follows reads each several times.
    inverse = [row.unbind(0) for row in state.factors.inverse.permute(2, 3, 0, 1).contiguous().unbind(0)]
    means = state.means.permute(2, 0, 1).contiguous().unbind(0)

    def total(left: list[Tensor], right: list[Tensor]) -> Tensor:
        out = left[0] * right[0]
        for a, b in zip(left[1:], right[1:], strict=True):
            out = torch.addcmul(out, a, b)
        return out

    columns = [[inverse[i][j] for i in range(j, size)] for j in range(size)]
    whitened = [total(list(inverse[i][: i + 1]), list(means[: i + 1])) for i in range(size)]
    constant = state.log_weights - _half_log_tau(size)
    for i in range(size):
        constant = torch.addcmul(constant + inverse[i][i].log(), whitened[i], whitened[i], value=-0.5)
    linear = [total(columns[j], whitened[j:]) for j in range(size)]
    square = [
        total(columns[i][j - i :], columns[j]) * (-0.5 if i == j else -1.0) for i in range(size) for j in range(i, size)
    ]
    return torch.stack([constant, *linear, *(entry.expand_as(constant) for entry in square)], -1)


def _with_floor(spread: Tensor, largest: Tensor, floor: Tensor) -> Factors:
    eye = torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device)
    return cholesky_with_inverse(spread + floor[:, None, None, None] * eye, least_pivots_of(largest))


def moments_of(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-weights (B, K), means (B, K, D) and mean squares (B, K, D, D) of moments of all pairs of features."""
    features = _features_of(moments.shape[-1])
    mass, log_weights = _mass(moments)
    shares = moments[..., 1:] / mass.unsqueeze(-1)
    i, j = _pairs(features, moments.device)
    # Twice the triangle makes the matrix symmetric: entry (i, j) is the pair's place in the list.
    place = torch.empty(features, features, dtype=torch.long, device=moments.device)
    place[i, j] = place[j, i] = torch.arange(len(i), device=moments.device)
    return log_weights, shares[..., :features], shares[..., features:][..., place]


def _mass(moments: Tensor) -> tuple[Tensor, Tensor]:
    # The same guard against empty components as scikit-learn's, so that results agree step for step.
    mass = moments[..., 0] + 10.0 * torch.finfo(moments.dtype).eps
    return mass, mass.log() - mass.sum(-1, keepdim=True).log()


def _half_log_tau(num_features: int) -> float:
    return 0.5 * num_features * math.log(2.0 * math.pi)


def _pairs(num_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(num_features, num_features, device=device)
    return i, j


def _features_of(num_moments: int) -> int:
    """Return D of F = 1 + D + D (D + 1) / 2."""
    return int((math.isqrt(8 * num_moments + 1) - 3) // 2)
