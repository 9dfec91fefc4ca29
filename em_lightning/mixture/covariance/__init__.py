"""Covariance types: shapes, features, factorization, Gaussian log-densities, M-step estimates and conversions.

A type defines S products ``s(x)`` of features such that the log-density is linear in ``phi(x) = [1, x, s(x)]``:

    log pi_k + log N(x | mu_k, Sigma_k) = theta_k . phi(x)

The E-step is then one matrix product and a softmax, and the sufficient statistics are ``sum_n r_nk phi(x_n)``.
"""

from __future__ import annotations

from torch import Tensor

from em_lightning.mixture.covariance.diagonal import DiagonalCovariance, SphericalCovariance
from em_lightning.mixture.covariance.full import FullCovariance, TiedCovariance, half_log_two_pi, variances_along
from em_lightning.mixture.covariance.lowrank import LowRankCovariance

__all__ = [
    "COVARIANCES",
    "Covariance",
    "FullCovariance",
    "LowRankCovariance",
    "covariance_of",
    "half_log_two_pi",
    "variances_along",
]

Covariance = FullCovariance  # the base class of all types
COVARIANCES: dict[str, Covariance] = {
    each.name: each for each in (FullCovariance(), DiagonalCovariance(), SphericalCovariance(), TiedCovariance())
}


def covariance_of(covariances: Tensor, means: Tensor) -> Covariance:
    """Return the type that the shapes of covariances and means (B, K, D) imply; raise ValueError if none fits."""
    num_sets, k, d = means.shape
    for covariance in COVARIANCES.values():
        if covariances.shape == (num_sets, *covariance.shape(k, d)):
            return covariance
    known = ", ".join(f"{name} {(num_sets, *covariance.shape(k, d))}" for name, covariance in COVARIANCES.items())
    raise ValueError(
        f"covariances of shape {tuple(covariances.shape)} must fit means of shape {tuple(means.shape)}: {known}"
    )
