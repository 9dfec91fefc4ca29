"""What an operator takes its points to be drawn from: the density of a mixture, and the prior of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.competition import COMPETITIONS, Background, Posterior
from em_lightning.kernels import KERNELS
from em_lightning.mixture.background import Level, UniformBackground
from em_lightning.mixture.cloud import Cloud, prepare
from em_lightning.mixture.covariance import COVARIANCES, Structure
from em_lightning.mixture.factors import State
from em_lightning.mixture.general import frame_of, general_log_density, log_joint, with_background
from em_lightning.mixture.lowrank import LowRankCovariance
from em_lightning.mixture.prior import MixturePrior, log_prior
from em_lightning.mixture.radial import radial_of
from em_lightning.mixture.state import Mixture, check_points, structure_of
from em_lightning.mixture.step import enter
from em_lightning.operators.checks import check_values
from em_lightning.registry import from_options


class MixtureModel(nn.Module):
    r"""The density :math:`p(x) = w_0 p_0 + (1 - w_0) \sum_k \pi_k p_k(x)` of a kernel and a background, and a prior.

    Args:
        num_components: K.
        num_features: D.
        covariance: the covariance structure.
        rank: of low-rank covariances.
        kernel: the energy of a point under a component.
        competition: how components share points.
        prior: of the parameters of the mixture.
        background: a component of constant density.

    Raises:
        TypeError: the prior or the background is none.
        ValueError: the kernel has no M-step, or the competition has a background too.
    """

    _compiled: Structure | None = None

    def __init__(
        self,
        num_components: int,
        num_features: int,
        covariance: str,
        rank: int | None,
        kernel: object,
        competition: object,
        prior: MixturePrior | Mapping[str, Any] | None,
        background: UniformBackground | Mapping[str, Any] | float | None,
    ) -> None:
        super().__init__()
        self.num_components = num_components
        self.num_features = num_features
        if (rank is not None) != (covariance == "lowrank"):
            raise ValueError(f"rank={rank} with covariance={covariance!r}: give a rank for 'lowrank' and for it alone")
        if rank is not None and not 1 <= rank < num_features:
            raise ValueError(f"rank={rank} must be at least 1 and less than num_features={num_features}")
        self.covariance = covariance
        self.rank = rank
        self.kernel = KERNELS.build({"name": kernel, "density": True} if kernel == "student_t" else kernel)
        radial_of(self.kernel, num_features)  # says which kernels can be fitted
        self.competition = COMPETITIONS.build(competition)
        if isinstance(background, (int, float)):
            background = {"weight": background}
        if isinstance(background, Mapping):
            background = from_options("background", UniformBackground, background)
        self.background = background
        self.prior = from_options("prior", MixturePrior, prior) if isinstance(prior, Mapping) else prior
        for name, value, cls in (
            ("prior", self.prior, MixturePrior),
            ("background", self.background, UniformBackground),
        ):
            if value is not None and not isinstance(value, cls):
                raise TypeError(f"{name}={value!r} is none; give a {cls.__name__}, a mapping of its arguments or None")
        if self.background is not None and isinstance(self.competition, Background):
            raise ValueError("background and competition='background' are two backgrounds; give one of them")

    @property
    def structure(self) -> Structure:
        """The covariance structure."""
        return self._compiled or (COVARIANCES[self.covariance] if self.rank is None else LowRankCovariance(self.rank))

    def objective(
        self, x: Tensor, mixture: Mixture, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Return what EM climbs, (B,): ``sum_n w_n log p(x_n)`` and the logarithm of the prior, up to a constant."""
        cloud = self._prepared(x, mixture, mask, weights)
        return self._objective(cloud, self._enter(cloud, mixture)).to(x.dtype)

    def _prepared(self, x: Tensor, mixture: Mixture, mask: Tensor | None, weights: Tensor | None = None) -> Cloud:
        """Return points as clouds, or say what is wrong with them."""
        check_points(mixture, x)
        if not torch.compiler.is_compiling():
            check_values(x, mask, weights)
        return prepare(x, mask, weights)

    def _objective(self, cloud: Cloud, state: State) -> Tensor:
        structure = self.structure
        density = self._log_density(cloud, state, structure).to(cloud.mass.dtype)
        total = density.sum(-1) if cloud.weights is None else (density * cloud.weights).sum(-1)
        return total if self.prior is None else total + self._log_prior(cloud, state)

    def _log_prior(self, cloud: Cloud, state: State) -> Tensor:
        """Return the logarithm of the prior density, up to a constant, as (B,)."""
        assert self.prior is not None
        counts = self.prior.beside(cloud, self.structure, self.num_components)
        own = log_prior(state, self.structure, counts)
        level = self._level(cloud, state)
        return own if level is None or not self._estimates else own + counts.weight * level.weight

    def log_prob(self, x: Tensor, mixture: Mixture, mask: Tensor | None = None) -> Tensor:
        """Return ``log p(x)`` of points (B, N, D) under the operator's kernel and background, as (B, N).

        Zero where masked. A background without an energy is uniform over the bounding box of these points.
        """
        cloud = self._prepared(x, mixture, mask)
        density = self._log_density(cloud, self._enter(cloud, mixture), structure_of(mixture)).to(x.dtype)
        return density if mask is None else torch.where(mask, density, 0.0)

    def posterior(self, x: Tensor, mixture: Mixture, mask: Tensor | None = None) -> Posterior:
        """Return what the competition makes of points (B, N, D): responsibilities (B, N, K).

        A background is one more hypothesis, the last: ``competition.none_of_the_above`` reads it.
        """
        cloud = self._prepared(x, mixture, mask)
        structure, state = structure_of(mixture), self._enter(cloud, mixture)
        radial = radial_of(self.kernel, self.num_features)
        joint = log_joint(cloud.part(), frame_of(state, structure, radial, cloud), structure, radial)[1]
        return self.competition(-with_background(joint.to(x.dtype), self._level(cloud, state)).mT)

    def _log_density(self, cloud: Cloud, state: State, structure: Structure) -> Tensor:
        radial = radial_of(self.kernel, self.num_features)
        return general_log_density(cloud, state, structure, radial, self._level(cloud, state))

    @property
    def _estimates(self) -> bool:
        """Whether the weight of a background is estimated."""
        return self.background is not None and self.background.estimate

    def _enter(self, cloud: Cloud, mixture: Mixture) -> State:
        """Return a mixture's parameters as the loop holds them."""
        return self._with_room(enter(cloud, mixture))

    def _with_room(self, state: State) -> State:
        if self.background is None:
            return state
        return state._replace(log_weights=self.background.leave_room(state.log_weights))

    def _level(self, cloud: Cloud, state: State) -> Level | None:
        return None if self.background is None else self.background.beside(cloud, state.log_weights)
