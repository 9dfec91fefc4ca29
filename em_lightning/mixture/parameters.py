"""The parameters of a mixture inside the EM loop."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Parameters(NamedTuple):
    """The parameters of a mixture inside the EM loop, in the coordinates of its :class:`~.points.Points`.

    log_weights: (B, K).
    means: (B, K, D).
    covariances: in the shape of the covariance type; concentrations (B, K) for directions.
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor


class Family(Protocol):
    """Densities with a logarithm linear in ``phi(x) = [1, x, s(x)]``: a covariance type, or von Mises-Fisher."""

    def features(self, x: Tensor) -> Tensor:
        """Return ``phi(x)`` (B, F, N) of points (B, D, N)."""

    def second_degree(self, x: Tensor) -> Tensor:
        """Return the features of second degree ``s(x)`` (B, S, N) of points (B, D, N)."""

    def natural_parameters(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return theta (B, K, F) with ``theta_k . phi(x) = log pi_k + log p_k(x)``, and its maximum over x (B, K)."""

    def sharing(self, num_components: int) -> int:
        """Return how many components share a covariance."""

    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return means and covariances for weighted means, scatters (B, K, S) about them and masses (B, K)."""
