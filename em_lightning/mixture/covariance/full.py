"""Full and tied covariances, and the interface that all covariance types share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from em_lightning.mixture.covariance.cholesky import Factor, cholesky_with_inverse, identity, smallest_pivots
from em_lightning.mixture.points import Parameters

# Share of second moments of the mixture that principal_axes adds, to determine axes of equal variances.
_TIE_BREAKER = 1e-6  # so small that it hardly turns axes of different variances; chosen, not measured
# Where eigenvalues differ by less than this share of the largest, derivatives of the axes decrease to 0.
_SMALLEST_GAP = 1e-6  # chosen, not measured


def half_log_two_pi(num_features: int) -> float:
    """Return ``D / 2 log(2 pi)``."""
    return 0.5 * num_features * math.log(2.0 * math.pi)


def variances_along(axes: Tensor, covariance: Tensor) -> Tensor:
    """Return the variances (..., D) of covariances (..., D, D) along axes (..., D, D), one per column."""
    return ((axes.mT @ covariance) * axes.mT).sum(-1)


class _OnceDifferentiable(torch.autograd.Function):
    """Identity that raises for second derivatives, because those of the principal axes would be wrong."""

    @staticmethod
    def forward(axes: Tensor) -> Tensor:
        return axes.view_as(axes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "corrections of full, tied and lowrank covariances do not support second derivatives or torch.func; "
                "use residual=False, operator.classical() or covariance='diag'"
            )
        return grad


class FullCovariance:
    """Any positive definite covariance for each component: ``Sigma (B, K, D, D)``, ``s(x) = [x_i x_j for i <= j]``.

    The other covariance types override these methods. In the EM loop, means and covariances are in the coordinates of
    the :class:`~.points.Frame`; ``s(x)`` are the features of second degree.
    """

    name = "full"
    # W = L^-1 in C++ and Triton: a triangle ("full"), diagonal ("diag") or number ("spherical"); None: not supported.
    native_kind: str | None = "full"
    native_m_step = True  # whether each component has its own covariance, which follows from its sums
    # Number of leading axes of size 1 that covariances have in a mixture of one set, but not in scikit-learn.
    sklearn_axes = 1

    @property
    def unrestricted(self) -> FullCovariance:
        """The type for estimates without previous covariances: this one; full for lowrank, which iterates from them."""
        return self

    # Shapes and sizes.

    def shape(self, num_components: int, num_features: int) -> tuple[int, ...]:
        """Return the shape of the covariances of one set."""
        return num_components, num_features, num_features

    def num_parameters(self, num_components: int, num_features: int) -> int:
        """Return the number of free parameters of the covariances."""
        return self.shape(num_components, num_features)[0] * num_features * (num_features + 1) // 2

    def sharing(self, num_components: int) -> int:
        """Return how many components share a covariance."""
        return num_components // self.shape(num_components, 1)[0]

    # The E-step.

    def second_degree(self, x: Tensor) -> Tensor:
        """Return the features of second degree (B, S, N) of points (B, D, N)."""
        i, j = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
        return x.index_select(1, i) * x.index_select(1, j)

    def features(self, x: Tensor) -> Tensor:
        """Return ``phi(x) = [1, x, s(x)]`` (B, 1 + D + S, N) of points (B, D, N)."""
        return torch.cat([torch.ones_like(x[:, :1]), x, self.second_degree(x)], 1)

    def factorize(self, covariances: Tensor, means: Tensor | None = None) -> Factor:
        """Return L with ``Sigma = L L^T`` and its inverse W; ``L_ii^2`` is above round-off of ``Sigma_ii + mu_i^2``."""
        matrix = self.to_public(covariances)
        second_moment = matrix.diagonal(dim1=-2, dim2=-1)
        if means is not None:
            second_moment = second_moment + self.pool(means.square())
        return cholesky_with_inverse(matrix, smallest_pivots(second_moment))

    def indefinite(self, covariances: Tensor) -> Tensor:
        """Return, as (B, K) or (B, 1), which finite covariances are indefinite by more than round-off."""
        num_features = covariances.shape[-1]
        # Rounding makes L L^T of a singular L indefinite by up to D eps; 16 is a chosen margin for more operations.
        round_off = 16 * num_features * torch.finfo(covariances.dtype).eps * covariances.diagonal(dim1=-2, dim2=-1)
        failed = torch.linalg.cholesky_ex(covariances + round_off.diag_embed()).info != 0
        return failed & covariances.isfinite().flatten(-2).all(-1)

    def natural_parameters(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return theta (B, K, 1 + D + S) and the joint log-density at the mean, ``log pi_k N(mu | mu, Sigma)`` (B, K).

        Theta is ``[log pi_k N(0 | mu, Sigma), P mu, -P_ii / 2, -P_ij]`` with the precision ``P = W^T W``.
        """
        log_weights, means, covariances = parameters
        num_features = means.shape[-1]
        inverse = self.factorize(covariances, means).inverse
        precision = inverse.mT @ inverse
        linear = (precision @ means.unsqueeze(-1)).squeeze(-1)
        peak = self.log_peak(log_weights, inverse, num_features)
        constant = peak.sub((means * linear).sum(-1), alpha=0.5)  # peak - mu^T P mu / 2
        # x^T P x / 2 contains x_i^2 once and x_i x_j twice: the coefficients are -P_ii / 2 and -P_ij.
        quadratic = 0.5 * precision.tril() - precision  # correct in the upper triangle, which alone is used
        rows = [quadratic[..., i, i:].expand(*linear.shape[:-1], -1) for i in range(num_features)]
        return torch.cat([constant.unsqueeze(-1), linear, *rows], -1), peak

    def log_peak(self, log_weights: Tensor, inverse: Tensor, num_features: int) -> Tensor:
        """Return the joint log-density at the mean (B, K), ``log pi_k + log det W - D/2 log(2 pi)``, W the inverse."""
        entries = inverse.diagonal(dim1=-2, dim2=-1).movedim(-1, 0).contiguous()  # strided logarithms are slower
        return log_weights + entries.log().sum(0) - half_log_two_pi(num_features)

    # The M-step.

    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the means and covariances of the M-step, ``Sigma = scatter / mass + floor I``.

        Means are (B, K, D), the scatter ``sum_n r_nk s(x_n - mu_k)`` is (B, K, S), the mass (B, K), the floor (B,).
        An iterative estimate starts from the covariances ``before`` the step.
        """
        sample_covariance = self.matrix(self.average(scatter, mass), means.shape[-1])
        return means, sample_covariance + floor[:, None, None, None] * identity(means.shape[-1], sample_covariance)

    def average(self, scatter: Tensor, mass: Tensor) -> Tensor:
        """Return the scatter (B, K, S) divided by the mass (B, K), over all components that share a covariance."""
        return self.pool(scatter) / self.pool(mass).unsqueeze(-1)

    def pool(self, values: Tensor) -> Tensor:
        """Return the average of values (B, K, ...) or (B, 1, ...) over components that share a covariance."""
        return values

    def matrix(self, upper: Tensor, num_features: int) -> Tensor:
        """Return symmetric matrices (..., D, D) from their upper triangles (..., S)."""
        rows = upper.split([*range(num_features, 0, -1)], -1)  # row i starts at the diagonal entry (i, i)
        entries: list[Tensor] = []
        for i, row in enumerate(rows):  # entries (i, j) left of it are the entries (j, i) of the rows above
            entries += [*(rows[j][..., i - j, None] for j in range(i)), row]
        return torch.cat(entries, -1).unflatten(-1, (num_features, num_features))

    # Conversions.

    def expand(self, variance: Tensor, num_components: int) -> Tensor:
        """Return the covariances of components that all have the variances (B, D) of the features, uncorrelated."""
        num_covariances = self.shape(num_components, variance.shape[-1])[0]
        return self.pack(variance.unsqueeze(1).expand(-1, num_covariances, -1))

    def pack(self, variances: Tensor) -> Tensor:
        """Return the covariances of uncorrelated features with variances (B, K, D)."""
        return variances.diag_embed()

    def scaled(self, covariances: Tensor, ratio: Tensor) -> Tensor:
        """Return covariances multiplied by a ratio (B, K) or (B, 1)."""
        ratio = self.pool(ratio)
        return covariances * ratio.reshape(*ratio.shape, *[1] * (covariances.ndim - 2))

    def diagonal(self, covariances: Tensor, num_features: int) -> Tensor:
        """Return the variances (B, K, D) or, where components share them, (B, 1, D)."""
        return self.to_public(covariances).diagonal(dim1=-2, dim2=-1)

    def marginal(self, covariances: Tensor, indices: list[int]) -> Tensor:
        """Return the covariances of the features with some indices."""
        return covariances[..., indices, :][..., indices]

    def to_full(self, covariances: Tensor, means: Tensor) -> Tensor:
        """Return full covariances (B, K, D, D) of components with means (B, K, D)."""
        return self.to_public(covariances).expand(-1, means.shape[1], -1, -1)

    def to_public(self, covariances: Tensor) -> Tensor:
        """Convert covariances of the EM loop to those of a :class:`~.mixture.Mixture`."""
        return covariances

    def from_public(self, covariances: Tensor) -> Tensor:
        """Convert covariances of a :class:`~.mixture.Mixture` to those of the EM loop."""
        return covariances

    def precisions(self, covariances: Tensor) -> Tensor:
        """Return the inverse covariances, in the same shape."""
        inverse = self.factorize(covariances).inverse
        return inverse.mT @ inverse

    def precision_factors(self, covariances: Tensor) -> Tensor:
        """Return factors ``U`` of the precisions, ``P = U U^T``, in the same shape, as in scikit-learn."""
        return self.factorize(covariances).inverse.mT

    # Learned corrections, along the principal axes of each component.

    def principal_axes(self, parameters: Parameters, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        """Return axes (B, K, D, D) or (D, D), one per column, and the standard deviations (B, K, D) along them.

        Tied covariances give (B, 1, D, D) and (B, 1, D). ``neighbours`` are second moments (B, K, D, D) of the mixture
        near each mean. They and the moments of the whole mixture determine axes of equal variances, for instance at the
        floor, in place of round-off; the latter also for isolated components, which have no neighbours.
        """
        log_weights, means, covariances = parameters
        sigma, weights = self.to_public(covariances), log_weights.softmax(-1).unsqueeze(-1)
        offset = means - (weights * means).sum(1, keepdim=True)
        square = offset.unsqueeze(-1) * offset.unsqueeze(-2)
        whole = (weights.unsqueeze(-1) * (sigma + square)).sum(1, keepdim=True) + square
        matrix = sigma + _TIE_BREAKER * self.pool(neighbours + whole)
        values, axes = torch.linalg.eigh(matrix.detach())
        # First-order perturbation of axes V of a matrix M: dV = V (V^T dM V / gap) with gaps lambda_j - lambda_i, as in
        # eigh. Replace 1 / gap, infinite for equal eigenvalues, by gap / (gap^2 + bound).
        gap = values.unsqueeze(-2) - values.unsqueeze(-1)
        bound = (_SMALLEST_GAP * values[..., -1:, None]).square().clamp(min=torch.finfo(gap.dtype).tiny)
        rotation = axes.mT @ (matrix - matrix.detach()) @ axes * gap / (gap.square() + bound)
        axes = _OnceDifferentiable.apply(axes + axes @ rotation)
        least = smallest_pivots(self.pool(means.square()).amax(-1, keepdim=True))
        return axes, torch.maximum(variances_along(axes, sigma), least).sqrt()

    def stretched(self, covariances: Tensor, axes: Tensor, stretch: Tensor, floor: Tensor) -> Tensor:
        """Return ``G (Sigma - floor I) G^T + floor I`` with ``G = axes exp(stretch) axes^T``, stretch (B, K, D)."""
        g = (axes * self.pool(stretch).exp().unsqueeze(-2)) @ axes.mT
        least = floor[:, None, None, None] * identity(axes.shape[-1], axes)
        return g @ (covariances - least) @ g.mT + least

    def entries(self, matrix: Tensor) -> Tensor:
        """Return the entries (..., S) of symmetric matrices (..., D, D) that this type uses: upper triangles."""
        i, j = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], device=matrix.device)
        return matrix[..., i, j]


class TiedCovariance(FullCovariance):
    """One covariance that all components of a set share: ``Sigma (B, 1, D, D)``."""

    name = "tied"
    native_m_step = False
    sklearn_axes = 2

    def shape(self, num_components: int, num_features: int) -> tuple[int, ...]:
        return 1, num_features, num_features

    def pool(self, values: Tensor) -> Tensor:
        return values.mean(1, keepdim=True)
