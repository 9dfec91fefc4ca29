"""Mixtures of von Mises-Fisher distributions on the unit sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import register_dataclass

from em_lightning.competition import Posterior, softmin
from em_lightning.mixture.e_step import log_joint
from em_lightning.mixture.parameters import Parameters
from em_lightning.mixture.points import Frame, Points, accumulation_dtype, prepare

# The recurrence of Bessel ratios starts this many orders above the result.
_ORDERS = 40
_NEWTON_STEPS = 6
_SMALLEST_CONCENTRATION = 1e-6


@dataclass(frozen=True)
class DirectionalMixture:
    r"""A batch of mixtures on the unit sphere, :math:`p(x) = \sum_k \pi_k C_D(\kappa_k) e^{\kappa_k \mu_k \cdot x}`.

    .. math:: C_D(\kappa) = \frac{\kappa^{D/2 - 1}}{(2 \pi)^{D/2} \, I_{D/2 - 1}(\kappa)}

    Args:
        log_weights: (B, K), normalized over components.
        means: (B, K, D), of length 1.
        concentrations: (B, K), positive.

    Example:
        >>> one = DirectionalMixture(torch.zeros(1, 1), torch.tensor([[[0.0, 0.0, 1.0]]]), torch.full((1, 1), 1e-4))
        >>> one.log_prob(torch.tensor([[[5.0, 0.0, 0.0]]])).exp() * 4 * torch.pi  # nearly uniform
        tensor([[1.0000]])

    Source: Banerjee et al., Clustering on the unit hypersphere using von Mises-Fisher distributions, 2005.
    """

    log_weights: Tensor
    means: Tensor
    concentrations: Tensor

    def parameters(self) -> Parameters:
        """Return the three tensors."""
        return Parameters(self.log_weights, self.means, self.concentrations)

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``log p`` of the directions of x (B, N, D), as (B, N); zero where the mask (B, N) is false."""
        density = -self.posterior(x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)).free_energy
        return density if mask is None else torch.where(mask, density, 0.0)

    def posterior(self, x: Tensor) -> Posterior:
        """Return the posterior over components of the directions of x (B, N, D)."""
        points = directions(x)
        parameters = Parameters(*(part.to(points.mass.dtype) for part in self.parameters()))
        theta, peak = VON_MISES_FISHER.natural_parameters(parameters)
        joint, _ = log_joint(points.lift(), theta, peak, x.shape[-1], None)
        return softmin(-joint.mT.to(x.dtype))


register_dataclass(DirectionalMixture, serialized_type_name="em_lightning.DirectionalMixture")


class VonMisesFisher:
    """The von Mises-Fisher family: features ``[1, x]``; ``Parameters.covariances`` holds its concentrations (B, K)."""

    name = "von Mises-Fisher"

    def second_degree(self, x: Tensor) -> Tensor:
        """Return (B, 0, N): the density has no quadratic features."""
        return x[:, :0]

    def features(self, x: Tensor) -> Tensor:
        """Return ``[1, x]`` (B, 1 + D, N) of directions (B, D, N)."""
        return torch.cat([torch.ones_like(x[:, :1]), x], 1)

    def natural_parameters(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return theta (B, K, 1 + D) with ``theta . phi = log pi + log C(kappa) + kappa mu . x``, and its maximum."""
        log_weights, means, concentrations = parameters
        constant = log_weights - log_normalizer(concentrations, means.shape[-1])
        theta = torch.cat([constant.unsqueeze(-1), concentrations.unsqueeze(-1) * means], -1)
        return theta, constant + concentrations

    def sharing(self, num_components: int) -> int:
        """Return 1: components share no concentration."""
        return 1

    def estimate(
        self, means: Tensor, scatter: Tensor, mass: Tensor, floor: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        r"""Return mean directions, and concentrations with :math:`I_{D/2}(\kappa) / I_{D/2 - 1}(\kappa) = |\bar x|`.

        ``means`` are the mean vectors (B, K, D); the floor (B,) bounds :math:`1 / \kappa` from below.
        """
        square = means.square().sum(-1, keepdim=True)
        length = torch.where(square > 0, square, 1.0).sqrt()
        axis = torch.zeros_like(means)
        axis[..., 0] = 1.0
        resultant = torch.where(square > 0, length, 0.0).squeeze(-1)
        concentrations = concentration_of(resultant, means.shape[-1], floor.unsqueeze(-1).reciprocal())
        return torch.where(square > 0, means / length, axis), concentrations

    def changes(self, before: Parameters, after: Parameters) -> Tensor:
        """Return the largest change (B,) of weights, of means in standard deviations, and of log-concentrations."""
        weights = (after.log_weights.exp() - before.log_weights.exp()).abs().amax(1)
        shift = (after.means - before.means).abs().amax(-1) * after.covariances.sqrt()
        growth = (after.covariances / before.covariances).log().abs()
        return torch.stack([weights, shift.amax(1), growth.amax(1)]).amax(0)


VON_MISES_FISHER = VonMisesFisher()


def directions(x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Points:
    """Return the directions of points (B, N, D), ready for EM; zero vectors stay zero."""
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0.0)
    x = x.to(accumulation_dtype(x))
    # Divide by the largest entry first, since its square may overflow.
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    square = x.square().sum(-1, keepdim=True)
    x = x / torch.where(square > 0, square, 1.0).sqrt()
    frame = Frame(torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0, 0]))
    return prepare(x, VON_MISES_FISHER.features, mask, weights, frame=frame, with_moments=False)


def concentration_of(resultant: Tensor, num_features: int, largest: Tensor) -> Tensor:
    r"""Return the concentration with mean resultant length ``A(kappa) = resultant``, at most ``largest``.

    Source: Banerjee et al., 2005 (the estimate); Sra, A short note on parameter approximation for von Mises-Fisher
    distributions, 2012 (Newton's method).
    """
    given = resultant.detach().clamp(max=1.0 - 1e-12)
    with torch.no_grad():
        square = given.square()
        kappa = (given * (num_features - square) / (1.0 - square)).clamp(min=_SMALLEST_CONCENTRATION)
        for _ in range(_NEWTON_STEPS):
            ratio = bessel_ratios(kappa, 0.5 * num_features - 1.0)[0]
            slope = 1.0 - ratio.square() - (num_features - 1.0) * ratio / kappa
            slope = slope.clamp(min=torch.finfo(kappa.dtype).tiny)
            # A step at most halves kappa, since the ratio is flat far from the root.
            kappa = (kappa - (ratio - given) / slope).maximum(0.5 * kappa).clamp(min=_SMALLEST_CONCENTRATION)
        inside = (kappa > _SMALLEST_CONCENTRATION) & (kappa < largest)
    # Implicit function theorem: d kappa / d A = 1 / A'(kappa).
    change = torch.where(inside, (resultant - resultant.detach()) / slope, 0.0)
    return torch.minimum(kappa, largest) + change


def log_normalizer(concentration: Tensor, num_features: int) -> Tensor:
    """Return ``-log C_D(kappa)``, the logarithm of the integral of ``exp(kappa mu . x)`` over the unit sphere."""
    order, x = 0.5 * num_features - 1.0, concentration
    if num_features % 2:  # I_(1/2)(x) = sqrt(2 / (pi x)) sinh(x)
        base, log_bessel = 0.5, (-torch.expm1(-2.0 * x)).log() + x - 0.5 * (2.0 * math.pi * x).log()
    else:
        base, log_bessel = 0.0, torch.special.i0e(x).log() + x
    steps = round(order - base)
    for ratio in bessel_ratios(x, base, steps)[:steps]:
        log_bessel = log_bessel + ratio.log()
    return 0.5 * num_features * math.log(2.0 * math.pi) + log_bessel - order * x.log()


def bessel_ratios(x: Tensor, order: float, count: int = 1) -> list[Tensor]:
    r"""Return ``I_{v+1}(x) / I_v(x)`` for v = order, order + 1, ..., at least ``count`` of them.

    The recurrence ``1 / R_v = R_{v+1} + 2 (v + 1) / x`` runs downwards, where it is stable. It starts from an expansion
    for large v of the solution ``I_v' / I_v`` of ``y' = 1 + v^2 / x^2 - y / x - y^2``.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, 9.6.26 and 9.7.7.
    """
    steps = count + _ORDERS
    top = order + steps
    size = (top**2 + x.square()).sqrt()
    ratio = (size - top) / x - 0.5 * x / size.square() + 0.5 * x * (1.0 - 1.25 * (x / size).square()) / size**3
    ratios: list[Tensor] = []
    for step in range(steps, 0, -1):
        ratio = (ratio + 2.0 * (order + step) / x).reciprocal()
        ratios.append(ratio)
    return ratios[::-1]
