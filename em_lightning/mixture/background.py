"""A uniform background component for outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from em_lightning.mixture.e_step import BackgroundTerms
from em_lightning.mixture.points import Points, prepare

# Smallest side of a bounding box relative to its longest: flat sets get a finite density. Chosen, not measured.
_MIN_SIDE_RATIO = 1e-3
# Smallest estimated weight of the background or of all components: EM cannot change weights of 0. Chosen, not measured.
_MIN_WEIGHT = 1e-5


@dataclass(frozen=True)
class UniformBackground:
    r"""A mixture component for outliers, uniform over the bounding box of each set.

    .. math:: p(x) = w_0 \frac{1}{V} + (1 - w_0) \sum_k \pi_k \, p_k(x)

    with the volume :math:`V` of the box of points with positive weight (no side below a thousandth of the longest), or
    with :math:`1 / V = e^{-\mathrm{energy}}` if ``energy`` is given. EM does not lower the likelihood of this density.

    With a fixed weight :math:`w_0` the weights :math:`\pi_k` of a mixture sum to 1. With ``estimate=True`` the M-step
    estimates one weight per set, the mean responsibility of the background, clamped to [1e-5, 1 - 1e-5]. **The weights
    of a mixture then sum to** :math:`1 - w_0`, and its ``log_prob`` covers the components alone. A
    Dirichlet prior applies to all K + 1 weights. The result depends more on the start than with a fixed weight, because
    a wide component and the background have similar densities.

    Args:
        weight: :math:`w_0` between 0 and 1, the expected share of outliers; the initial value if it is estimated.
        energy: minus the logarithm of the constant density; replaces the density of the box.
        estimate: estimate the weight of each set by EM.

    Raises:
        ValueError: the weight is not between 0 and 1, or the energy is not finite.

    Example:
        >>> UniformBackground(weight=0.2).energies(torch.tensor([[[0.0, 0.0], [2.0, 3.0]]])).exp().round()
        tensor([6.], dtype=torch.float64)

    Source: Banfield and Raftery, Model-Based Gaussian and Non-Gaussian Clustering, 1993.
    """

    weight: float = 0.1
    energy: float | None = None
    estimate: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < 1.0:
            raise ValueError(f"weight={self.weight} must lie between 0 and 1: it is the share of the background")
        if self.energy is not None and not math.isfinite(self.energy):
            raise ValueError(f"energy={self.energy} must be finite; None takes the density of the box of each set")

    def reserve_share(self, log_weights: Tensor) -> Tensor:
        """Return log-weights (B, K); if :math:`w_0` is estimated, scale weights that sum to 1 to the sum 1 - w_0."""
        if not self.estimate:
            return log_weights
        log_total = log_weights.logsumexp(-1, keepdim=True)
        log_rest = math.log1p(-min(max(self.weight, _MIN_WEIGHT), 1.0 - _MIN_WEIGHT))
        # Weights of an earlier fit, which sum to at most 1 - _MIN_WEIGHT, are kept; the threshold is halfway to 1.
        return torch.where(log_total > math.log1p(-0.5 * _MIN_WEIGHT), log_weights + log_rest, log_weights)

    def update_weights(self, log_weights: Tensor, mass_of_components: Tensor, background_mass: Tensor) -> Tensor:
        """Return log-weights (B, K) of the M-step, scaled by the estimated :math:`1 - w_0`; masses are (B,)."""
        if not self.estimate:
            return log_weights
        total = mass_of_components + background_mass
        share = torch.where(total > 0, background_mass / torch.where(total > 0, total, 1.0), self.weight)
        return log_weights + torch.log1p(-share.clamp(_MIN_WEIGHT, 1.0 - _MIN_WEIGHT)).unsqueeze(-1)

    def energies(self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return minus the log-density (B,) of the background of a fit to points (B, N, D), in their units."""
        points = prepare(x, mask, weights)
        return points.log_jacobian() - self._log_density(points)

    def terms(self, points: Points, log_weights: Tensor, energies: Tensor | None = None) -> BackgroundTerms:
        """Return the terms of this background; ``log_weights`` (B, K) are those of the components.

        ``energies`` (B,), as those of :meth:`energies`, replace the density of this background.
        """
        if self.estimate:
            log_weight = (-torch.expm1(log_weights.logsumexp(-1))).clamp(_MIN_WEIGHT, 1.0 - _MIN_WEIGHT).log()
            log_rest = torch.zeros_like(log_weight)
        else:
            log_weight = torch.full_like(points.mass, math.log(self.weight))
            log_rest = torch.full_like(points.mass, math.log1p(-self.weight))
        log_density = self._log_density(points) if energies is None else points.log_jacobian() - energies.to(log_weight)
        return BackgroundTerms(log_joint=log_density + log_weight, log_weight=log_weight, log_rest=log_rest)

    def _log_density(self, points: Points) -> Tensor:
        """Return the log-density (B,) of the background, a constant on each set, in frame coordinates."""
        if self.energy is not None:
            return points.log_jacobian() - self.energy
        z = points.coordinates()
        low = high = z
        if points.weights is not None:
            counted = (points.weights > 0).unsqueeze(1)
            counted = counted | ~counted.any(-1, keepdim=True)  # all points of a set of zero total weight
            low, high = torch.where(counted, z, torch.inf), torch.where(counted, z, -torch.inf)
        sides = high.amax(-1) - low.amin(-1)
        least = (_MIN_SIDE_RATIO * sides.amax(-1, keepdim=True)).clamp(min=points.eps)  # equal points: no sides
        return -torch.maximum(sides, least).log().sum(-1)
