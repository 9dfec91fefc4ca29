"""Covariances of low rank plus a diagonal: mixtures of factor analyzers."""

from __future__ import annotations

import torch
from torch import Tensor

from em_lightning.mixture.covariance.cholesky import cholesky_with_inverse, identity, smallest_pivots
from em_lightning.mixture.covariance.full import FullCovariance

# Steps of EM for factor analysis: in an M-step, 16 instead of 4 gain less than 0.001 nats per point after 20 iterations
# (samples of random mixtures, D = 8, rank 2); to approximate a full covariance, 1000 instead of 40 gain 0.02 nats.
_STEPS, _INITIAL_STEPS = 4, 40
# Share of initial variances in U U^T; the rest is in Psi. EM can change neither U = 0 nor a variance of 0 in Psi.
_INITIAL_SHARE = 0.5  # chosen, not measured


class LowRankCovariance(FullCovariance):
    r"""Covariances ``Sigma = U U^T + Psi`` with ``U (D, R)`` and a diagonal ``Psi``: a mixture of factor analyzers.

    The EM loop stores ``[U, sqrt(diag Psi)]`` (B, K, D, R + 1); ``to_public`` gives the full ``Sigma``. The
    sufficient statistics, and therefore the cost, are those of full covariances. Given the sample covariance ``S`` of a
    component, the M-step takes a few steps of EM for factor analysis,

    .. math::
        \beta = (I + U^\top \Psi^{-1} U)^{-1} U^\top \Psi^{-1}, \quad
        U \leftarrow S \beta^\top (I - \beta U + \beta S \beta^\top)^{-1}, \quad
        \Psi \leftarrow \operatorname{diag}(S - U \beta S).

    No step lowers the likelihood. The floor is the smallest value of ``Psi``.

    Args:
        rank: R, at least 1 and less than D.

    Source: Ghahramani and Hinton, The EM Algorithm for Mixtures of Factor Analyzers, 1996.
    """

    name = "lowrank"
    native_m_step = False

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @property
    def unrestricted(self) -> FullCovariance:
        return FullCovariance()

    def num_parameters(self, num_components: int, num_features: int) -> int:
        # Rotations of the factors do not change Sigma.
        return num_components * (num_features * (self.rank + 1) - self.rank * (self.rank - 1) // 2)

    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return means and ``[U, sqrt(diag Psi)]``; the expected log-likelihood does not decrease."""
        sample = self.matrix(self.average(scatter, mass), means.shape[-1])
        second_moment = sample.diagonal(dim1=-2, dim2=-1) + means.square()
        least = torch.maximum(smallest_pivots(second_moment), floor[:, None, None])
        loadings, noise = before[..., :-1], torch.maximum(before[..., -1].square(), least)
        return means, self._factor_analysis(sample, loadings, noise, least, _STEPS)

    def _factor_analysis(self, sample: Tensor, loadings: Tensor, noise: Tensor, least: Tensor, steps: int) -> Tensor:
        """Return ``[U, sqrt(diag Psi)]`` after EM for sample covariances S from loadings U and noise diag(Psi)."""
        eye = identity(self.rank, sample)
        variance = sample.diagonal(dim1=-2, dim2=-1)
        for _ in range(steps):
            weighted = loadings / noise.unsqueeze(-1)  # Psi^-1 U
            inner = torch.linalg.inv(eye + loadings.mT @ weighted)  # I - beta U
            cross = sample @ (weighted @ inner)  # S beta^T
            loadings = torch.linalg.solve(inner + inner @ weighted.mT @ cross, cross, left=False)
            noise = torch.maximum(variance - (loadings * cross).sum(-1), least)
        return torch.cat([loadings, noise.sqrt().unsqueeze(-1)], -1)

    def to_public(self, covariances: Tensor) -> Tensor:
        loadings = covariances[..., :-1]
        return loadings @ loadings.mT + covariances[..., -1].square().diag_embed()

    def from_public(self, covariances: Tensor) -> Tensor:
        """Return ``[U, sqrt(diag Psi)]`` near full covariances, by EM from R scaled Cholesky columns."""
        pivots = smallest_pivots(covariances.diagonal(dim1=-2, dim2=-1))
        loadings = _INITIAL_SHARE**0.5 * cholesky_with_inverse(covariances, pivots).scale[..., : self.rank]
        noise = covariances.diagonal(dim1=-2, dim2=-1) - loadings.square().sum(-1)
        return self._factor_analysis(covariances, loadings, torch.maximum(noise, pivots), pivots, _INITIAL_STEPS)

    def pack(self, variances: Tensor) -> Tensor:
        """Return ``diag(variances)`` (B, K, D) with half of the first R variances in ``U U^T``."""
        root = variances.sqrt()
        root_share = _INITIAL_SHARE**0.5 * identity(variances.shape[-1], root)[:, : self.rank]
        loadings = root.unsqueeze(-1) * root_share
        noise = (root.square() - loadings.square().sum(-1)).sqrt()
        return torch.cat([loadings, noise.unsqueeze(-1)], -1)

    def scaled(self, covariances: Tensor, ratio: Tensor) -> Tensor:
        return covariances * ratio.sqrt()[..., None, None]  # U and sqrt(diag Psi), the roots of covariances

    def stretched(self, covariances: Tensor, axes: Tensor, stretch: Tensor, floor: Tensor) -> Tensor:
        """Return ``[G U, sqrt(diag(G)^2 Psi)]``, ``G = axes exp(stretch) axes^T``: Psi stays diagonal, and >= floor."""
        g = (axes * stretch.exp().unsqueeze(-2)) @ axes.mT
        root = covariances[..., -1] * g.diagonal(dim1=-2, dim2=-1)
        least = torch.maximum(floor[:, None, None], smallest_pivots(root.square()))
        root = torch.maximum(root.square(), least).sqrt()
        return torch.cat([g @ covariances[..., :-1], root.unsqueeze(-1)], -1)
