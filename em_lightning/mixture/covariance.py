"""Covariance structures: which moments of the points a component needs, and what it makes of them.

A structure names *features* ``phi(x)`` such that ``log pi_k + log N(x | mu_k, Sigma_k) = theta_k . phi(x)``. The E-step
is then one product ``theta phi`` and a softmax, and the M-step needs nothing but the moments ``r phi^T``.
Covariances are held by a *factor* ``L`` with ``Sigma = L L^T`` and its inverse ``W``.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Up to this many features a Cholesky factorization written out over (B, K) tensors is faster than the library's.
_UNROLLED_UP_TO = 4


class Factors(NamedTuple):
    """A factor of each covariance and its inverse, in the shape that the structure prescribes."""

    scale: Tensor
    inverse: Tensor


class State(NamedTuple):
    """The parameters inside the loop, means relative to the centre of the cloud; natural ones where at hand."""

    log_weights: Tensor
    means: Tensor
    factors: Factors
    theta: Tensor | None = None


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
        i, j = _pairs(features, points.device)
        points = points.to(grad.dtype)
        pairs = grad[:, 1 + features :]
        own = grad[:, 1 : 1 + features].index_add(1, i, pairs * points[:, j])
        return own.index_add(1, j, pairs * points[:, i])

    def natural(self, state: State) -> Tensor:
        """Return theta (B, K, F) with ``theta . phi(x) = log pi + log N(x | mu, Sigma)``."""
        features = state.means.shape[-1]
        inverse = state.factors.inverse
        if features <= _UNROLLED_UP_TO:
            return _unrolled_natural(state)
        i, j = _pairs(features, inverse.device)
        precision = inverse.mT @ inverse
        whitened = (inverse @ state.means.unsqueeze(-1)).squeeze(-1)
        log_det = inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = state.log_weights + log_det - 0.5 * whitened.square().sum(-1) - _half_log_tau(features)
        linear = (inverse.mT @ whitened.unsqueeze(-1)).squeeze(-1)
        square = precision[..., i, j] * torch.where(i == j, -0.5, -1.0).to(precision)
        return torch.cat([constant.unsqueeze(-1), linear, square.expand(*linear.shape[:-1], -1)], -1)

    def maximize(self, moments: Tensor, floor: Tensor) -> State:
        """Return weights, means and covariances of largest expected log-likelihood for moments (B, K, F).

        A floor (B,) is added to the variances.
        """
        features = _features_of(moments.shape[-1])
        mass, log_weights = _mass(moments)
        if features <= _UNROLLED_UP_TO:
            return self._unrolled(moments, mass, log_weights, floor)
        shares = moments[..., 1:] / mass.unsqueeze(-1)
        means = shares[..., :features]
        i, j = _pairs(features, moments.device)
        # Twice the triangle makes the matrix symmetric: entry (i, j) is the pair's place in the list.
        place = torch.empty(features, features, dtype=torch.long, device=moments.device)
        place[i, j] = place[j, i] = torch.arange(len(i), device=moments.device)
        second = shares[..., features:][..., place]
        return State(log_weights, means, self._factors(mass, means, second, floor))

    def _factors(self, mass: Tensor, means: Tensor, second: Tensor, floor: Tensor) -> Factors:
        spread = second - means.unsqueeze(-1) * means.unsqueeze(-2)
        return _with_floor(spread, second.diagonal(dim1=-2, dim2=-1), floor)

    def _unrolled(self, moments: Tensor, mass: Tensor, log_weights: Tensor, floor: Tensor) -> State:
        """Return the same in operations on (B, K) tensors."""
        size = _features_of(moments.shape[-1])
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
                    least.append(_least_pivots(self._pool(square, mass)))
        return State(log_weights, torch.stack(means, -1), _cholesky_of_rows(spread, least))

    def _pool(self, entry: Tensor, mass: Tensor) -> Tensor:
        """Return an entry (B, K) of the covariances as the components share it."""
        return entry

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of ``variance (B, D) * I`` for every component."""
        root = variance.sqrt().unsqueeze(-2).expand(-1, num_components, -1)
        return Factors(root.diag_embed(), root.reciprocal().diag_embed())

    def factorize(self, covariances: Tensor) -> Factors:
        """Return the factors of given covariances."""
        return cholesky_with_inverse(covariances, _least_pivots(covariances.diagonal(dim1=-2, dim2=-1)))

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
        taken = cholesky_with_inverse(spread, _least_pivots(spread.diagonal(dim1=-2, dim2=-1)))
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

    def maximize(self, moments: Tensor, floor: Tensor) -> State:
        """Return weights, means and variances of largest expected log-likelihood for moments (B, K, F).

        A floor (B,) is added to the variances.
        """
        mass, log_weights = _mass(moments)
        shares = moments[..., 1:] / mass.unsqueeze(-1)
        means, second = self._split(shares)
        spread = self._average(second, means) + floor[:, None, None]
        root = torch.maximum(spread, _least_pivots(second)).sqrt()
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
        root = torch.maximum(covariances, _least_pivots(covariances)).sqrt()
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
        root = torch.maximum(spread, _least_pivots(spread)).sqrt()
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


def compiled(name: str, **options: Any) -> Structure:
    """Return the structure of that name, what an iteration calls compiled; options are those of ``torch.compile``."""
    structure = copy.copy(COVARIANCES[name])
    for function in (structure.natural, structure.maximize):
        setattr(structure, function.__name__, torch.compile(function, **options))
    return structure


def cholesky_with_inverse(matrix: Tensor, least_pivots: Tensor) -> Factors:
    """Return the lower Cholesky factor of (..., D, D) matrices and its inverse, finite for every finite input.

    Args:
        matrix: symmetric, positive definite up to rounding.
        least_pivots: (..., D), what a pivot that rounding made smaller is raised to.
    """
    size = matrix.shape[-1]
    if size > _UNROLLED_UP_TO:
        return _library_cholesky(matrix, least_pivots)
    rows = [[matrix[..., i, j] for j in range(i + 1)] for i in range(size)]
    return _cholesky_of_rows(rows, list(least_pivots.unbind(-1)))


def _cholesky_of_rows(rows: list[list[Tensor]], least_pivots: list[Tensor]) -> Factors:
    """Return the factor and its inverse of matrices given by the rows of their lower triangles."""
    size = len(rows)
    lower: list[list[Tensor]] = [[] for _ in range(size)]
    inverse: list[list[Tensor]] = [[] for _ in range(size)]
    zero = torch.zeros_like(rows[0][0])
    for i in range(size):
        for j in range(i):
            entry = rows[i][j]
            for p in range(j):
                entry = torch.addcmul(entry, lower[i][p], lower[j][p], value=-1)
            lower[i].append(entry * inverse[j][j])
        pivot = rows[i][i]
        for p in range(i):
            pivot = torch.addcmul(pivot, lower[i][p], lower[i][p], value=-1)
        root = torch.maximum(pivot, least_pivots[i]).sqrt()
        lower[i].append(root)
        reciprocal = root.reciprocal()
        for j in range(i):
            entry = lower[i][j] * inverse[j][j]
            for p in range(j + 1, i):
                entry = torch.addcmul(entry, lower[i][p], inverse[p][j])
            inverse[i].append(-entry * reciprocal)
        inverse[i].append(reciprocal)

    def assemble(rows: list[list[Tensor]]) -> Tensor:
        filled = [row + [zero] * (size - len(row)) for row in rows]
        return torch.stack([entry for row in filled for entry in row], -1).unflatten(-1, (size, size))

    return Factors(assemble(lower), assemble(inverse))


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


def _library_cholesky(matrix: Tensor, least_pivots: Tensor) -> Factors:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if torch.compiler.is_compiling() or bool((info != 0).any()):
        # Rounding made a matrix indefinite: its diagonal is the nearest thing that can be factored.
        diagonal = torch.maximum(matrix.diagonal(dim1=-2, dim2=-1), least_pivots).diag_embed()
        factor = torch.linalg.cholesky_ex(torch.where((info != 0)[..., None, None], diagonal, matrix))[0]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return Factors(factor, torch.linalg.solve_triangular(factor, eye.expand_as(matrix), upper=False))


def _with_floor(spread: Tensor, largest: Tensor, floor: Tensor) -> Factors:
    eye = torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device)
    return cholesky_with_inverse(spread + floor[:, None, None, None] * eye, _least_pivots(largest))


def _mass(moments: Tensor) -> tuple[Tensor, Tensor]:
    # The same guard against empty components as scikit-learn's, so that results agree step for step.
    mass = moments[..., 0] + 10.0 * torch.finfo(moments.dtype).eps
    return mass, mass.log() - mass.sum(-1, keepdim=True).log()


def _least_pivots(largest: Tensor) -> Tensor:
    """Return what rounding leaves of a difference of numbers as large as these, and never zero."""
    info = torch.finfo(largest.dtype)
    return (4.0 * info.eps * largest.detach()).clamp(min=info.eps**4)


def _half_log_tau(num_features: int) -> float:
    return 0.5 * num_features * math.log(2.0 * math.pi)


def _pairs(num_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(num_features, num_features, device=device)
    return i, j


def _features_of(num_moments: int) -> int:
    """Return D of F = 1 + D + D (D + 1) / 2."""
    return int((math.isqrt(8 * num_moments + 1) - 3) // 2)
