"""The mixture as a value: densities, posteriors, samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, MultivariateNormal, Normal

from em_lightning.competition import Posterior, softmin
from em_lightning.mixture.cloud import Cloud, about, widest
from em_lightning.mixture.covariance import COVARIANCES, Structure
from em_lightning.mixture.factors import State
from em_lightning.mixture.general import frame_of, general_log_density, log_joint
from em_lightning.mixture.moments import get_ready, log_density, loses_all_digits


class Mixture(NamedTuple):
    r"""A batch of Gaussian mixtures, ``p(x) = sum_k pi_k N(x | mu_k, Sigma_k)``, one for each set.

    Shape:
        - log_weights: (B, K), ``log pi``, normalized over components.
        - means: (B, K, D).
        - covariances: full (B, K, D, D), diagonal (B, K, D), spherical (B, K), tied (B, 1, D, D). The shape says
          which it is.

    Example:
        >>> mixture = Mixture(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[[-1.0], [1.0]]]), torch.ones(1, 2, 1))
        >>> mixture.posterior(torch.zeros(1, 1, 1)).responsibilities
        tensor([[[0.5000, 0.5000]]])
        >>> mixture.log_prob(torch.zeros(1, 1, 1)).exp()  # the standard normal density at 1
        tensor([[0.2420]])

    Source: Bishop, Pattern Recognition and Machine Learning, 2006, section 9.2.
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def covariance_type(self) -> str:
        """``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``."""
        return structure_of(self).name

    @property
    def weights(self) -> Tensor:
        """Mixing weights (B, K)."""
        return self.log_weights.exp()

    def log_joint(self, x: Tensor) -> Tensor:
        """Return ``log pi_k + log N(x_n | mu_k, Sigma_k)`` of points (B, N, D), as (B, N, K)."""
        cloud, state, structure = self._ready(x)
        frame = frame_of(state, structure, None, cloud)
        if frame.origins is not None and x.dtype != widest(x):
            return self.log_joint(x.to(widest(x))).to(x.dtype)  # float32 holds no points about a center far from them
        return log_joint(cloud.part(), frame, structure, None)[1].mT.to(x.dtype)

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``log p(x)`` of points (B, N, D), as (B, N); zero where the mask (B, N) is false."""
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, 0.0)
        cloud, state, structure = self._ready(x)
        theta, cloud = structure.natural(state), cloud._replace(ready=get_ready(cloud, structure))
        if loses_all_digits(cloud, theta, structure) is None:
            density = log_density(cloud, theta, structure)
        elif x.dtype == widest(x):
            density = general_log_density(cloud, state, structure, None, None)
        else:  # float32 holds no points about a center far from them
            density = self.log_prob(x.to(widest(x))).to(x.dtype)
        return density if mask is None else torch.where(mask, density, 0.0)

    def _ready(self, x: Tensor) -> tuple[Cloud, State, Structure]:
        """Return points and parameters about the means: far from the origin digits are kept that way."""
        check_points(self, x)
        structure = structure_of(self)
        log_weights, means, covariances = (part.to(widest(x)) for part in self)
        center = means.mean(1)
        state = State(log_weights, means - center.unsqueeze(1), structure.factorize(covariances))
        points, shift = about(x, center)
        none = torch.zeros_like(center)
        return Cloud(points, None, none[:, 0], none, none, shift), state, structure

    def posterior(self, x: Tensor) -> Posterior:
        """Return the posterior over components of points (B, N, D).

        Energies are ``-log pi_k - log N(x | mu_k, Sigma_k)`` (B, N, K); the free energy (B, N) is ``-log p(x)``.
        """
        return softmin(-self.log_joint(x))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` points from each mixture, as (B, n, D)."""
        if n < 0:
            raise ValueError(f"n={n} points cannot be drawn; give a number of at least 0")
        sets, _, features = self.means.shape
        structure = structure_of(self)
        chosen = torch.multinomial(self.weights, max(n, 1), replacement=True, generator=generator)[:, :n]
        noise = torch.randn(sets, n, features, generator=generator, dtype=self.means.dtype, device=self.means.device)
        scale = structure.factorize(self.covariances.to(widest(self.means))).scale.to(self.means.dtype)
        if scale.ndim == 4:
            rows = chosen if scale.shape[1] == self.means.shape[1] else torch.zeros_like(chosen)
            picked = scale.gather(1, rows[..., None, None].expand(-1, -1, features, features))
            noise = (picked @ noise.unsqueeze(-1)).squeeze(-1)
        else:
            noise = noise * scale.gather(1, chosen.unsqueeze(-1).expand(-1, -1, scale.shape[-1]))
        return self.means.gather(1, chosen.unsqueeze(-1).expand(-1, -1, features)) + noise

    def to_distribution(self) -> MixtureSameFamily:
        """Return the same mixtures as a ``torch.distributions`` object with batch shape (B,)."""
        structure = structure_of(self)
        scale = structure.factorize(self.covariances.to(widest(self.means))).scale.to(self.means.dtype)
        components: Distribution
        if scale.ndim == 4:
            components = MultivariateNormal(self.means, scale_tril=scale.expand(*self.means.shape, -1))
        else:
            components = Independent(Normal(self.means, scale.expand_as(self.means)), 1)
        return MixtureSameFamily(Categorical(logits=self.log_weights), components)

    def affine(self, scale: Tensor, shift: Tensor) -> Mixture:
        """Return the mixtures of ``scale * x + shift`` for a scale (B,) and a shift (B, D), such as data units."""
        spread = scale.square().reshape(-1, *[1] * (self.covariances.ndim - 1))
        return Mixture(
            self.log_weights, self.means * scale[:, None, None] + shift.unsqueeze(1), self.covariances * spread
        )


def structure_of(mixture: Mixture) -> Structure:
    """Return the covariance structure that the shape of the covariances stands for.

    Raises:
        ValueError: the shapes belong to no structure.
    """
    shape = tuple(mixture.covariances.shape)
    sets, components, features = mixture.means.shape
    fitting = {
        (sets, components, features, features): "full",
        (sets, 1, features, features): "tied" if components > 1 else "full",
        (sets, components, features): "diag",
        (sets, components): "spherical",
    }
    if shape not in fitting:
        known = ", ".join(f"{name} {dims}" for dims, name in fitting.items())
        raise ValueError(
            f"covariances of shape {shape} fit no structure for means {(sets, components, features)}: {known}"
        )
    return COVARIANCES[fitting[shape]]


def check_points(mixture: Mixture, x: Tensor) -> None:
    """Raise ValueError unless points (B, N, D) fit the mixtures."""
    sets, _, features = mixture.means.shape
    if x.ndim != 3 or x.shape[0] not in (1, sets) or x.shape[-1] != features:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit {sets} mixtures of {features} features; "
            f"give ({sets}, N, {features})"
        )
