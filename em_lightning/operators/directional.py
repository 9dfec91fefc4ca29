"""EM operator for mixtures of von Mises-Fisher distributions on the unit sphere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.checks import check_choice
from em_lightning.competition import Posterior
from em_lightning.mixture import initialization
from em_lightning.mixture.e_step import Likelihood, SufficientStatistics, e_step, log_density
from em_lightning.mixture.m_step import m_step
from em_lightning.mixture.parameters import Parameters
from em_lightning.mixture.points import Points
from em_lightning.mixture.von_mises_fisher import VON_MISES_FISHER, DirectionalMixture, directions
from em_lightning.operators.base import SetOperator


class _Sets(NamedTuple):
    """Inputs of the EM loop: unit vectors, the lower bound (B,) of ``1 / kappa``, and the dtype of the result."""

    points: Points
    mass: Tensor
    floor: Tensor
    dtype: torch.dtype


class DirectionalEM(SetOperator):
    r"""Fit a mixture of von Mises-Fisher distributions to the directions of each set by T iterations of EM.

    The responsibilities ``r_nk`` are proportional to ``pi_k C_D(kappa_k) exp(kappa_k mu_k . x_n / |x_n|)``. No
    iteration decreases the likelihood.

    Args:
        num_components: K.
        num_features: D, at least 2.
        num_iters, gradient: as in :class:`EMOperator`.
        init: how the initial centers are drawn: ``"farthest"``, ``"kmeans++"`` or ``"random"`` points.
        dispersion_floor: lower bound of ``1 / kappa``, so kappa is at most 1e6 by default.

    Shape:
        - x: (B, N, D); mask: (B, N), true for points that count; weights: (B, N), relative to their mean.
        - output: a :class:`~em_lightning.mixture.DirectionalMixture` of B mixtures.

    Raises:
        ValueError: an argument is out of range, or a shape does not fit.

    Example:
        >>> angles = torch.tensor([0.0, 0.1, -0.1, 1.5, 1.6, 1.4])
        >>> x = torch.stack([angles.cos(), angles.sin()], -1)
        >>> DirectionalEM(2, 2)(x.unsqueeze(0)).means[0].abs().round(decimals=1).sort(0).values
        tensor([[0.1000, 0.0000],
                [1.0000, 1.0000]])

    Source: Banerjee et al., Clustering on the unit hypersphere using von Mises-Fisher distributions, 2005.
    """

    def __init__(
        self,
        num_components: int,
        num_features: int,
        *,
        num_iters: int = 10,
        init: str = "farthest",
        dispersion_floor: float = 1e-6,
        gradient: str = "unrolled",
    ) -> None:
        super().__init__(num_components, num_features, num_iters, gradient)
        if num_features < 2:
            raise ValueError(f"num_features={num_features} must be at least 2")
        check_choice("init", init, ("farthest", "kmeans++", "random"))
        if not dispersion_floor > 0:
            raise ValueError(f"dispersion_floor={dispersion_floor} must be positive")
        self.init = init
        self.dispersion_floor = dispersion_floor

    def log_prob(self, x: Tensor, mixture: DirectionalMixture, mask: Tensor | None = None) -> Tensor:
        """Return ``log p`` of the directions of x (B, N, D), as (B, N); zero where masked."""
        return mixture.log_prob(x, mask)

    def posterior(self, x: Tensor, mixture: DirectionalMixture, mask: Tensor | None = None) -> Posterior:
        """Return the posterior over components of the directions of x (B, N, D)."""
        return mixture.posterior(x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0))

    def _prepare(self, x: Tensor, mask: Tensor | None, weights: Tensor | None) -> _Sets:
        points = directions(x, mask, weights)
        return _Sets(points, points.mass, torch.full_like(points.mass, self.dispersion_floor), x.dtype)

    @torch.no_grad()
    def _start(self, sets: _Sets, choose: bool) -> Parameters:
        """Draw centers, assign each point to the nearest, and return the parameters of one M-step."""
        points = sets.points
        x, weights = points.coordinates(), points.weights
        centers = initialization.draw_centers(self.init, x.mT, self.num_components, weights=weights)
        counts = torch.ones_like(x[:, 0]) if weights is None else weights
        cosines = centers @ x
        members = torch.zeros_like(cosines).scatter_(1, cosines.argmax(1, keepdim=True), counts.unsqueeze(1))
        mass, zeros = members.sum(-1), torch.zeros_like(points.mass)
        second = members.new_zeros(*mass.shape, 0)
        statistics = SufficientStatistics(mass, mass, members @ x.mT, second, zeros, zeros, zeros)
        return m_step(statistics, VON_MISES_FISHER, sets.floor, mass)

    def _enter(self, sets: _Sets, mixture: DirectionalMixture) -> Parameters:
        return Parameters(*(part.to(sets.floor.dtype) for part in mixture.parameters()))

    def _step(
        self, sets: _Sets, state: Parameters, progress: float, with_objective: bool = False
    ) -> tuple[Parameters, Tensor]:
        statistics = e_step(sets.points, state, Likelihood(VON_MISES_FISHER), with_log_likelihood=with_objective)
        after = m_step(statistics, VON_MISES_FISHER, sets.floor, state.covariances)
        return after, statistics.log_likelihood

    def _objective(self, sets: _Sets, state: Parameters) -> Tensor:
        density = log_density(sets.points, state, Likelihood(VON_MISES_FISHER))
        return (density if sets.points.weights is None else density * sets.points.weights).sum(-1)

    def _mixture(self, sets: _Sets, state: Parameters) -> DirectionalMixture:
        return DirectionalMixture(*(part.to(sets.dtype) for part in state))

    def _changes(self, before: Parameters, after: Parameters) -> Tensor:
        return VON_MISES_FISHER.changes(before, after)
