"""Mixtures of von Mises-Fisher distributions: densities of directions, whose energy is the cosine's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from em_lightning.competition import Posterior, softmin
from em_lightning.mixture.cloud import Cloud, widest
from em_lightning.mixture.factors import Factors, State
from em_lightning.mixture.moments import log_density

# Orders that the recurrence of Bessel ratios begins above the one that is wanted.
_ORDERS = 40
_NEWTON = 6
_SMALLEST = 1e-6


class DirectionalMixture(NamedTuple):
    r"""A batch of mixtures of directions, ``p(x) = sum_k pi_k C_D(kappa_k) exp(kappa_k mu_k . x)`` on the unit sphere.

    .. math:: C_D(\kappa) = \frac{\kappa^{D/2 - 1}}{(2 \pi)^{D/2} \, I_{D/2 - 1}(\kappa)}

    Shape:
        - log_weights: (B, K), normalized over components.
        - means: (B, K, D), of length 1.
        - concentrations: (B, K), positive.

    Example:
        >>> one = DirectionalMixture(torch.zeros(1, 1), torch.tensor([[[0.0, 0.0, 1.0]]]), torch.full((1, 1), 1e-4))
        >>> one.log_prob(torch.tensor([[[5.0, 0.0, 0.0]]])).exp() * 4 * torch.pi  # as good as uniform
        tensor([[1.0000]])

    Source: Banerjee et al., Clustering on the unit hypersphere using von Mises-Fisher distributions, 2005.
    """

    log_weights: Tensor
    means: Tensor
    concentrations: Tensor

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``log p`` of the directions of x (B, N, D), as (B, N); zero where the mask (B, N) is false."""
        density = log_density(directions(x, mask), self._natural(x), VON_MISES_FISHER)
        return density if mask is None else torch.where(mask, density, 0.0)

    def posterior(self, x: Tensor) -> Posterior:
        """Return the posterior over components of the directions of x (B, N, D)."""
        cloud, theta = directions(x), self._natural(x)
        return softmin(-torch.bmm(theta, VON_MISES_FISHER.features(cloud.points, theta.dtype)).mT.to(x.dtype))

    def _natural(self, x: Tensor) -> Tensor:
        return VON_MISES_FISHER.natural(enter_directions(self, widest(x)))


class VonMisesFisher:
    """The statistics of directions: features ``[1, x_i]``; a factor (B, K, 1) is ``kappa^(-1/2)``, as of a variance."""

    name = "von Mises-Fisher"

    def num_moments(self, num_features: int) -> int:
        """Return F, the number of features."""
        return 1 + num_features

    def features(self, points: Tensor, dtype: torch.dtype) -> Tensor:
        """Return phi (B, F, N) of points (B, D, N)."""
        points = points.to(dtype)
        return torch.cat([torch.ones_like(points[:, :1]), points], 1)

    def fill(self, points: Tensor, out: Tensor) -> Tensor:
        """Write phi of points (B, D, N) of the same type into ``out`` (B, F, N)."""
        out[:, 0] = 1.0
        out[:, 1:] = points
        return out

    def pull_back(self, points: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of points (B, D, N) that a gradient (B, F, N) of their features stands for."""
        return grad[:, 1:]

    def natural(self, state: State) -> Tensor:
        """Return theta (B, K, F) with ``theta . phi(x) = log pi + log C(kappa) + kappa mu . x``."""
        concentration = state.factors.inverse.square()
        constant = state.log_weights - log_normalizer(concentration.squeeze(-1), state.means.shape[-1])
        return torch.cat([constant.unsqueeze(-1), concentration * state.means], -1)

    def maximize(self, moments: Tensor, floor: Tensor, before: Factors | None = None) -> State:
        r"""Return weights, mean directions and concentrations of largest expected log-likelihood.

        ``A(kappa) = |sum r x| / sum r`` is solved by Newton's method from the estimate of Banerjee et al., where
        ``A = I_{D/2} / I_{D/2 - 1}``. The floor (B,) bounds ``1 / kappa`` from below.
        """
        features = moments.shape[-1] - 1
        mass = moments[..., 0] + 10.0 * torch.finfo(moments.dtype).eps
        log_weights = mass.log() - mass.sum(-1, keepdim=True).log()
        total = moments[..., 1:]
        square = total.square().sum(-1, keepdim=True)
        length = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
        axis = torch.zeros_like(total)
        axis[..., 0] = 1.0
        means = torch.where(square > 0, total / torch.where(square > 0, length, 1.0), axis)
        concentration = concentration_of(length.squeeze(-1) / mass, features, floor.unsqueeze(-1).reciprocal())
        root = concentration.sqrt().unsqueeze(-1)
        return State(log_weights, means, Factors(root.reciprocal(), root))


VON_MISES_FISHER = VonMisesFisher()


def directions(x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Cloud:
    """Return points (B, N, D) as directions; a zero vector, which has none, tells nothing but its weight."""
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, 0.0)
        weights = mask if weights is None else torch.where(mask, weights, 0.0)
    weights = None if weights is None else weights.to(x.dtype)
    # In units of the largest entry, whose square may lie outside the range of the dtype.
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    square = x.square().sum(-1, keepdim=True)
    points = (x / torch.where(square > 0, square, 1.0).sqrt()).mT.contiguous()
    wide, none = widest(x), torch.zeros_like(x[:, 0], dtype=widest(x))
    mass = none[:, 0] + x.shape[1] if weights is None else weights.sum(-1, dtype=wide)
    return Cloud(points, weights, mass, none, none)


def enter_directions(mixture: DirectionalMixture, dtype: torch.dtype) -> State:
    """Return a mixture's parameters as the loop holds them."""
    root = mixture.concentrations.to(dtype).sqrt().unsqueeze(-1)
    return State(mixture.log_weights.to(dtype), mixture.means.to(dtype), Factors(root.reciprocal(), root))


def concentration_of(resultant: Tensor, num_features: int, largest: Tensor) -> Tensor:
    r"""Return the concentration whose mean resultant length ``A(kappa)`` is given, at most ``largest``.

    Source: Banerjee et al., 2005 (the estimate); Sra, A short note on parameter approximation for von Mises-Fisher
    distributions, 2012 (Newton's method).
    """
    given = resultant.detach().clamp(max=1.0 - 1e-12)
    with torch.no_grad():
        square = given.square()
        kappa = (given * (num_features - square) / (1.0 - square)).clamp(min=_SMALLEST)
        for _ in range(_NEWTON):
            ratio = bessel_ratios(kappa, 0.5 * num_features - 1.0)[0]
            slope = 1.0 - ratio.square() - (num_features - 1.0) * ratio / kappa
            slope = slope.clamp(min=torch.finfo(kappa.dtype).tiny)
            # Halving at most: far from the root the ratio is flat.
            kappa = (kappa - (ratio - given) / slope).maximum(0.5 * kappa).clamp(min=_SMALLEST)
        inside = (kappa > _SMALLEST) & (kappa < largest)
    # By the implicit function theorem: d kappa / d A = 1 / A'(kappa).
    change = torch.where(inside, (resultant - resultant.detach()) / slope, 0.0)
    return torch.minimum(kappa, largest) + change


def log_normalizer(concentration: Tensor, num_features: int) -> Tensor:
    """Return ``-log C_D(kappa)``, the logarithm of the integral of ``exp(kappa mu . x)`` over the unit sphere."""
    order, x = 0.5 * num_features - 1.0, concentration
    if num_features % 2:  # from I_(1/2), which is sqrt(2 / (pi x)) sinh(x)
        base = 0.5
        log_bessel = 0.5 * (2.0 / (math.pi * x)).log() + x + (-torch.expm1(-2.0 * x)).log() - math.log(2.0)
    else:
        base = 0.0
        log_bessel = torch.special.i0e(x).log() + x
    steps = round(order - base)
    for ratio in bessel_ratios(x, base, steps)[:steps]:
        log_bessel = log_bessel + ratio.log()
    return 0.5 * num_features * math.log(2.0 * math.pi) + log_bessel - order * x.log()


def bessel_ratios(x: Tensor, order: float, count: int = 1) -> list[Tensor]:
    r"""Return ``I_{v+1}(x) / I_v(x)`` for v = order, order + 1, ...: ``count`` of them, at least one.

    The recurrence ``1 / R_v = R_{v+1} + 2 (v + 1) / x`` runs downwards, where it is stable, from an expansion that is
    uniform in the order: ``I_v' / I_v`` solves ``y' = 1 + v^2 / x^2 - y / x - y^2``.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, 9.6.26 and 9.7.7.
    """
    top = order + max(count, 1) - 1 + _ORDERS
    size = (top**2 + x.square()).sqrt()
    ratio = (size - top) / x - 0.5 * x / size.square() + 0.5 * x * (1.0 - 1.25 * (x / size).square()) / size**3
    ratios: list[Tensor] = []
    for step in range(max(count, 1) - 1 + _ORDERS, 0, -1):
        ratio = (ratio + 2.0 * (order + step) / x).reciprocal()
        ratios.append(ratio)
    return ratios[::-1][: max(count, 1)]
