"""Diagonal and spherical covariances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from em_lightning.mixture.covariance.cholesky import Factor, identity, smallest_pivots
from em_lightning.mixture.covariance.full import FullCovariance, half_log_two_pi
from em_lightning.mixture.points import Parameters


class DiagonalCovariance(FullCovariance):
    """Axis-parallel components: variances (B, K, D), ``s(x) = [x_i^2]``; factors are standard deviations."""

    name = "diag"
    native_kind = "diag"

    def shape(self, num_components: int, num_features: int) -> tuple[int, ...]:
        return num_components, num_features

    def num_parameters(self, num_components: int, num_features: int) -> int:
        return math.prod(self.shape(num_components, num_features))

    def variances(self, covariances: Tensor) -> Tensor:
        """Return covariances as (B, K, D), or (B, K, 1) where features share them."""
        return covariances

    def pack(self, variances: Tensor) -> Tensor:
        """Return the covariances of variances (B, K, D) or (B, K, 1), averaged where features share one."""
        return variances

    def second_degree(self, x: Tensor) -> Tensor:
        return x.square()

    def second_moments(self, variances: Tensor, means: Tensor | None) -> Tensor:
        """Return ``sigma^2 + mu^2`` in the shape of the variances, or ``sigma^2`` without means."""
        return variances if means is None else variances + self.variances(self.pack(means.square()))

    def factorize(self, covariances: Tensor, means: Tensor | None = None) -> Factor:
        variances = self.variances(covariances)
        root = torch.maximum(variances, smallest_pivots(self.second_moments(variances, means))).sqrt()
        return Factor(root, root.reciprocal())

    def indefinite(self, covariances: Tensor) -> Tensor:
        """Return which variances, in their shape, are not positive."""
        return covariances <= 0

    def natural_parameters(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return ``[log pi_k N(0 | mu, v), mu / v, -1 / (2 v)]`` with variances v, and ``log pi_k N(mu | mu, v)``."""
        log_weights, means, covariances = parameters
        num_features = means.shape[-1]
        inverse = self.factorize(covariances, means).inverse
        precision = inverse.square()
        linear = precision * means
        peak = self.log_peak(log_weights, inverse, num_features)
        return torch.cat([(peak - 0.5 * (means * linear).sum(-1)).unsqueeze(-1), linear, -0.5 * precision], -1), peak

    def log_peak(self, log_weights: Tensor, inverse: Tensor, num_features: int) -> Tensor:
        log_det_w = inverse.log().sum(-1) * (num_features / inverse.shape[-1])  # D features may share one entry
        return log_weights + log_det_w - half_log_two_pi(num_features)

    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The scatter (B, K, S) has S = D entries; of a variance shared by D features, it is their sum, and S = 1.
        variances = self.average(scatter, mass) * (scatter.shape[-1] / means.shape[-1])
        least = smallest_pivots(self.second_moments(variances.abs(), means))  # round-off may make variances negative
        return means, self.pack(torch.maximum(variances + floor[:, None, None], least))

    def diagonal(self, covariances: Tensor, num_features: int) -> Tensor:
        return self.variances(covariances).expand(-1, -1, num_features)

    def marginal(self, covariances: Tensor, indices: list[int]) -> Tensor:
        return covariances[..., indices]

    def precisions(self, covariances: Tensor) -> Tensor:
        return covariances.reciprocal()

    def precision_factors(self, covariances: Tensor) -> Tensor:
        return covariances.rsqrt()

    def to_full(self, covariances: Tensor, means: Tensor) -> Tensor:
        return self.diagonal(covariances, means.shape[-1]).diag_embed()

    def principal_axes(self, parameters: Parameters, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        _, means, covariances = parameters
        root = self.factorize(covariances, means).scale.expand(*means.shape)
        return identity(means.shape[-1], root), root

    def stretched(self, covariances: Tensor, axes: Tensor, stretch: Tensor, floor: Tensor) -> Tensor:
        """Return ``exp(2 stretch) (sigma^2 - floor) + floor``."""
        least = floor[:, None, None]
        return self.pack((2.0 * stretch).exp() * (self.variances(covariances) - least) + least)

    def entries(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal(dim1=-2, dim2=-1)  # S = D


class SphericalCovariance(DiagonalCovariance):
    """Spherical components: one variance each, (B, K), ``s(x) = |x|^2``."""

    name = "spherical"
    native_kind = "spherical"

    def shape(self, num_components: int, num_features: int) -> tuple[int, ...]:
        return (num_components,)

    def variances(self, covariances: Tensor) -> Tensor:
        return covariances.unsqueeze(-1)

    def pack(self, variances: Tensor) -> Tensor:
        return variances.mean(-1)

    def marginal(self, covariances: Tensor, indices: list[int]) -> Tensor:
        return covariances

    def second_degree(self, x: Tensor) -> Tensor:
        return x.square().sum(1, keepdim=True)

    def entries(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)  # S = 1
