"""Covariance structures: how a component's spread is held, used to whiten points, and re-estimated.

Every structure works on a *factor* ``L`` with ``Sigma = L L^T`` and its inverse ``W``, never on ``Sigma`` itself:
moments are taken of ``y = W (x - mu)``, in the component's own frame, where thin components look like round ones.
That keeps float32 accurate when the extent of the points is thousands of times the thickness of a component.
"""

from __future__ import annotations

from typing import NamedTuple, Union

import torch
from torch import Tensor

# Up to this many features a Cholesky factorization written out over (B, K) tensors is faster than the library's.
_UNROLLED_UP_TO = 4


class Factors(NamedTuple):
    """A factor of each covariance and its inverse, in the shape that the structure prescribes."""

    scale: Tensor
    inverse: Tensor


class Moments(NamedTuple):
    """Mass (B, K), mean (B, K, D) and second moment of whitened points, the latter in the structure's shape."""

    mass: Tensor
    first: Tensor
    second: Tensor


def cholesky_with_inverse(matrix: Tensor, least_pivots: Tensor) -> Factors:
    """Return the lower Cholesky factor of (..., D, D) matrices and its inverse, finite for every finite input.

    Args:
        matrix: symmetric, positive definite up to rounding.
        least_pivots: (..., D), what a pivot that rounding made smaller is raised to.
    """
    size = matrix.shape[-1]
    if size > _UNROLLED_UP_TO:
        return _library_cholesky(matrix, least_pivots)
    lower: list[list[Tensor]] = [[] for _ in range(size)]
    inverse: list[list[Tensor]] = [[] for _ in range(size)]
    zero = torch.zeros_like(matrix[..., 0, 0])
    for i in range(size):
        for j in range(i):
            entry = matrix[..., i, j]
            for p in range(j):
                entry = entry - lower[i][p] * lower[j][p]
            lower[i].append(entry * inverse[j][j])
        pivot = matrix[..., i, i]
        for p in range(i):
            pivot = pivot - lower[i][p] * lower[i][p]
        root = torch.maximum(pivot, least_pivots[..., i]).sqrt()
        lower[i].append(root)
        for j in range(i):
            entry = lower[i][j] * inverse[j][j]
            for p in range(j + 1, i):
                entry = entry + lower[i][p] * inverse[p][j]
            inverse[i].append(-entry / root)
        inverse[i].append(root.reciprocal())

    def assemble(rows: list[list[Tensor]]) -> Tensor:
        filled = [row + [zero] * (size - len(row)) for row in rows]
        return torch.stack([entry for row in filled for entry in row], -1).unflatten(-1, (size, size))

    return Factors(assemble(lower), assemble(inverse))


def _library_cholesky(matrix: Tensor, least_pivots: Tensor) -> Factors:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if torch.compiler.is_compiling() or bool((info != 0).any()):
        # Rounding made a matrix indefinite: its diagonal is the nearest thing that can be factored.
        diagonal = torch.maximum(matrix.diagonal(dim1=-2, dim2=-1), least_pivots).diag_embed()
        factor = torch.linalg.cholesky_ex(torch.where((info != 0)[..., None, None], diagonal, matrix))[0]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return Factors(factor, torch.linalg.solve_triangular(factor, eye.expand_as(matrix), upper=False))


Structure = Union["FullCovariance", "DiagonalCovariance"]


class FullCovariance:
    """Any positive definite covariance for each component: ``Sigma (B, K, D, D)``, lower-triangular factors."""

    name = "full"

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of ``variance (B, D) * I`` for every component."""
        root = variance.sqrt().unsqueeze(-2).expand(-1, num_components, -1)
        return Factors(root.diag_embed(), root.reciprocal().diag_embed())

    def factorize(self, covariances: Tensor) -> Factors:
        """Return the factors of covariances (B, K, D, D)."""
        diagonal = covariances.diagonal(dim1=-2, dim2=-1)
        return cholesky_with_inverse(covariances, _least_pivots(diagonal))

    def covariances(self, scale: Tensor) -> Tensor:
        """Return ``L L^T``."""
        return scale @ scale.mT

    def log_det(self, inverse: Tensor, num_features: int) -> Tensor:
        """Return ``-1/2 log det Sigma`` (B, K)."""
        return inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def whiten(self, inverse: Tensor, means: Tensor, points: Tensor) -> Tensor:
        """Return ``W (x - mu)`` (B, K, D, N) of points (B, D, N)."""
        sets, components, features = means.shape
        rows = inverse.expand(-1, components, -1, -1).reshape(sets, components * features, features)
        offsets = (inverse @ means.unsqueeze(-1)).reshape(sets, components * features, 1)
        return torch.baddbmm(-offsets, rows, points).unflatten(1, (components, features))

    def apply(self, scale: Tensor, whitened: Tensor) -> Tensor:
        """Return ``L y`` (B, K, D), from the component's frame to that of the points."""
        return (scale @ whitened.unsqueeze(-1)).squeeze(-1)

    def second_moment(self, weighted: Tensor, whitened: Tensor) -> Tensor:
        """Return the sum over points of ``w y y^T`` (B, K, D, D) from ``w y`` and ``y`` (B, K, D, N)."""
        return weighted @ whitened.mT

    def update(self, factors: Factors, moments: Moments, floor: Tensor) -> Factors:
        """Return the factors of the re-estimated covariances, a floor (B,) added to their diagonal."""
        spread = self._spread(moments) + floor[:, None, None, None] * (factors.inverse @ factors.inverse.mT)
        largest = moments.second.diagonal(dim1=-2, dim2=-1)
        step = cholesky_with_inverse(spread, _least_pivots(largest).expand_as(spread[..., 0]))
        return self.compose(factors, step)

    def _spread(self, moments: Moments) -> Tensor:
        return moments.second - moments.first.unsqueeze(-1) * moments.first.unsqueeze(-2)

    def compose(self, factors: Factors, step: Factors) -> Factors:
        """Return the factors of ``L E (L E)^T`` for a step ``E`` taken in the component's frame."""
        return Factors(factors.scale @ step.scale, step.inverse @ factors.inverse)

    def step_size(self, num_features: int) -> int:
        """Return how many numbers describe a correction: log-diagonal, then the strict lower triangle."""
        return num_features * (num_features + 1) // 2

    def correct(self, factors: Factors, correction: Tensor, floor: Tensor) -> Factors:
        """Return the factors of ``L (E (I - V) E^T + V) L^T``, ``V`` the share of the floor that ``Sigma`` contains.

        ``E`` is lower triangular with a positive diagonal, so the result is positive definite whatever the
        correction (B, K, step_size), never below the floor, and ``Sigma`` itself where the correction is zero.
        """
        features = factors.scale.shape[-1]
        below = torch.tril_indices(features, features, -1, device=correction.device)
        step = correction.new_zeros(*correction.shape[:-1], features, features)
        step[..., below[0], below[1]] = correction[..., features:]
        step = step + correction[..., :features].exp().diag_embed()
        share = floor[:, None, None, None] * (factors.inverse @ factors.inverse.mT)
        eye = torch.eye(features, dtype=share.dtype, device=share.device)
        spread = step @ (eye - share) @ step.mT + share
        return self.compose(factors, cholesky_with_inverse(spread, _least_pivots(spread.diagonal(dim1=-2, dim2=-1))))


class TiedCovariance(FullCovariance):
    """One covariance that all components of a set share: ``Sigma (B, 1, D, D)``."""

    name = "tied"

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of ``variance (B, D) * I``, once a set."""
        return super().expand(variance, 1, num_features)

    def update(self, factors: Factors, moments: Moments, floor: Tensor) -> Factors:
        """Return the factors of the re-estimated covariance, pooled over components by their mass."""
        share = (moments.mass / moments.mass.sum(-1, keepdim=True))[..., None, None]
        pooled = (share * self._spread(moments)).sum(1, keepdim=True)
        spread = pooled + floor[:, None, None, None] * (factors.inverse @ factors.inverse.mT)
        largest = (share * moments.second).sum(1, keepdim=True).diagonal(dim1=-2, dim2=-1)
        return self.compose(factors, cholesky_with_inverse(spread, _least_pivots(largest)))

    def correct(self, factors: Factors, correction: Tensor, floor: Tensor) -> Factors:
        """Return the corrected factors; the correction is the mean of what the components ask for."""
        return super().correct(factors, correction.mean(1, keepdim=True), floor)


class DiagonalCovariance:
    """Axis-parallel components: variances ``Sigma (B, K, D)``, factors are standard deviations."""

    name = "diag"

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of ``variance (B, D)`` for every component."""
        root = variance.sqrt().unsqueeze(-2).expand(-1, num_components, -1)
        return Factors(root, root.reciprocal())

    def factorize(self, covariances: Tensor) -> Factors:
        """Return the factors of variances (B, K, D)."""
        root = torch.maximum(covariances, _least_pivots(covariances)).sqrt()
        return Factors(root, root.reciprocal())

    def covariances(self, scale: Tensor) -> Tensor:
        """Return ``L L^T``, its diagonal only."""
        return scale.square()

    def log_det(self, inverse: Tensor, num_features: int) -> Tensor:
        """Return ``-1/2 log det Sigma`` (B, K)."""
        return inverse.log().sum(-1) * (num_features / inverse.shape[-1])

    def whiten(self, inverse: Tensor, means: Tensor, points: Tensor) -> Tensor:
        """Return ``W (x - mu)`` (B, K, D, N) of points (B, D, N)."""
        return (points.unsqueeze(1) - means.unsqueeze(-1)) * inverse.unsqueeze(-1)

    def apply(self, scale: Tensor, whitened: Tensor) -> Tensor:
        """Return ``L y`` (B, K, D), from the component's frame to that of the points."""
        return scale * whitened

    def second_moment(self, weighted: Tensor, whitened: Tensor) -> Tensor:
        """Return the sum over points of ``w y^2`` (B, K, D) from ``w y`` and ``y`` (B, K, D, N)."""
        return (weighted * whitened).sum(-1)

    def update(self, factors: Factors, moments: Moments, floor: Tensor) -> Factors:
        """Return the factors of the re-estimated variances, a floor (B,) added to them."""
        spread = moments.second - moments.first.square() + floor[:, None, None] * factors.inverse.square()
        root = torch.maximum(spread, _least_pivots(moments.second)).sqrt()
        return self.compose(factors, Factors(root, root.reciprocal()))

    def compose(self, factors: Factors, step: Factors) -> Factors:
        """Return the factors of ``(L E)^2`` for a step ``E`` taken in the component's frame."""
        return Factors(factors.scale * step.scale, factors.inverse * step.inverse)

    def step_size(self, num_features: int) -> int:
        """Return how many numbers describe a correction: the log of the step in each feature."""
        return num_features

    def correct(self, factors: Factors, correction: Tensor, floor: Tensor) -> Factors:
        """Return the factors of ``L (exp(2 c) (1 - V) + V) L``, ``V`` the share of the floor (see the full case)."""
        share = floor[:, None, None] * factors.inverse.square()
        spread = (2.0 * correction).exp() * (1.0 - share) + share
        root = torch.maximum(spread, _least_pivots(spread)).sqrt()
        return self.compose(factors, Factors(root, root.reciprocal()))


class SphericalCovariance(DiagonalCovariance):
    """Round components: one variance each, ``Sigma (B, K)``, factors (B, K, 1)."""

    name = "spherical"

    def expand(self, variance: Tensor, num_components: int, num_features: int) -> Factors:
        """Return the factors of the mean of ``variance (B, D)`` for every component."""
        return super().expand(variance.mean(-1, keepdim=True), num_components, num_features)

    def factorize(self, covariances: Tensor) -> Factors:
        """Return the factors of variances (B, K)."""
        return super().factorize(covariances.unsqueeze(-1))

    def covariances(self, scale: Tensor) -> Tensor:
        """Return the variances (B, K)."""
        return scale.square().squeeze(-1)

    def step_size(self, num_features: int) -> int:
        """Return 1: the log of the step."""
        return 1

    def update(self, factors: Factors, moments: Moments, floor: Tensor) -> Factors:
        """Return the factors of the re-estimated variances, averaged over features."""
        spread = (moments.second - moments.first.square()).mean(-1, keepdim=True)
        spread = spread + floor[:, None, None] * factors.inverse.square()
        root = torch.maximum(spread, _least_pivots(moments.second.mean(-1, keepdim=True))).sqrt()
        return self.compose(factors, Factors(root, root.reciprocal()))


COVARIANCES = {
    part.name: part for part in (FullCovariance(), DiagonalCovariance(), SphericalCovariance(), TiedCovariance())
}


def _least_pivots(largest: Tensor) -> Tensor:
    """Return what rounding leaves of a difference of numbers as large as these, and never zero."""
    info = torch.finfo(largest.dtype)
    return (4.0 * info.eps * largest.detach()).clamp(min=info.eps**4)
