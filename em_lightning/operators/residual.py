"""The learned M-step: pseudo-counts per component, and corrections of means and covariances."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from em_lightning.kernels import squared_distance
from em_lightning.mixture.covariance import COVARIANCES, Covariance, variances_along
from em_lightning.mixture.m_step import PseudoCounts
from em_lightning.mixture.points import Parameters, Points

# Bounds of the fields ``stretch``, ``factors`` and ``shift`` of a Correction, chosen wide so as not to limit training.
_LARGEST_STRETCH, _LARGEST_FACTOR, _LARGEST_SHIFT = 2.0, 12.0, 10.0
_LARGEST_FEATURE = 10.0  # of the networks' inputs, against extreme values; chosen, not measured
# Added to standard deviations, relative to the unit of the set (Points.unit), so that logarithms and ratios are finite.
_SMALLEST_DEVIATION = 1e-6


class Correction(NamedTuple):
    """Corrections of one iteration; in an untrained operator all are zero except ``neighbours``.

    stretch: (B, K, D), logarithms of the factors of the standard deviations along the principal axes.
    shift: (B, K, D), steps of the mean along the principal axes, as multiples of its change in this iteration.
    factors: (B, K, 4), logarithms of the factors of the prior's three pseudo-counts and of its covariance.
    share: (B, K), share of the ``neighbours`` in the prior covariance, from 0 to 1.
    neighbours: (B, K, D, D), second moments of the neighbouring components about the mean of each.
    """

    stretch: Tensor
    shift: Tensor
    factors: Tensor
    share: Tensor
    neighbours: Tensor

    def pseudo_counts(self, prior: PseudoCounts, covariance: Covariance) -> PseudoCounts:
        """Return the pseudo-counts of each component."""
        weight_factor, mean_factor, covariance_factor, scatter_factor = self.factors.exp().unbind(-1)
        share = self.share.unsqueeze(-1)
        scatter = (1.0 - share) * prior.scatter + share * covariance.entries(self.neighbours)
        return prior._replace(
            weight_count=prior.weight_count * weight_factor,
            mean_count=prior.mean_count * mean_factor,
            covariance_count=prior.covariance_count * covariance_factor,
            scatter=scatter_factor.unsqueeze(-1) * scatter,
        )

    def apply(self, covariance: Covariance, before: Tensor, after: Parameters, floor: Tensor) -> Parameters:
        """Return corrected parameters, given the means before and the parameters after an M-step."""
        axes, deviations = covariance.principal_axes(after, self.neighbours)
        change = (axes.mT @ (after.means - before).unsqueeze(-1)).squeeze(-1)
        step = deviations * _bounded(self.shift * change / deviations, 1.0)  # at most one standard deviation
        means = after.means + (axes @ step.unsqueeze(-1)).squeeze(-1)
        return Parameters(after.log_weights, means, covariance.stretched(after.covariances, axes, self.stretch, floor))


class ResidualCorrection(nn.Module):
    r"""Networks that correct the M-step of each component, given features of the component and of its set.

    The features ``h_k`` of component k are its weight and number of points, its principal standard deviations and their
    mean over components, the changes of its deviations and mean in this iteration, its squared distance from the set's
    mean, the extent of its neighbours, the floor, the set's number of points, and the fraction of completed iterations.

    .. math::
        e_k = \mathrm{describe}(h_k), \qquad
        (\text{stretch}, \text{shift}, \text{factors}, \text{share})_k
        = \mathrm{decide}(e_k, \text{mean}_j e_j, \max_j e_j) + \mathrm{direct}(h_k)

    with two networks ``describe`` and ``decide``, and a linear map ``direct``.

    The pseudo-counts of a prior, if there is one, are multiplied by ``exp(factors)``, and its covariance is mixed with
    that of the neighbouring components. Along each principal axis of the M-step's covariance the standard deviation is
    multiplied by ``exp(stretch)``, and the mean moves by ``shift`` times its change. The last layers start at zero, so
    that an untrained correction changes nothing. Corrections are independent of the scale and, for full covariances, of
    the rotation of the data, and equivariant in the components.

    Args:
        num_features: D.
        covariance: the covariance type, or its key.
        width: width of the hidden layers.

    Source: EM as a neural operator, see docs/theory.md; here with corrections in the principal axes of each component.
    """

    def __init__(self, num_features: int, covariance: str | Covariance = "full", width: int = 64) -> None:
        super().__init__()
        self.covariance: Covariance = COVARIANCES[covariance] if isinstance(covariance, str) else covariance
        self.num_features = num_features
        num_inputs, num_outputs = 7 * num_features + 10, 2 * num_features + 5  # as listed in _features and forward
        self.describe = nn.Sequential(nn.Linear(num_inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.decide = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, num_outputs))
        self.direct = nn.Linear(num_inputs, num_outputs, bias=False)
        for parameter in (*self.decide[-1].parameters(), *self.direct.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self, points: Points, mass: Tensor, before: Parameters, after: Parameters, floor: Tensor, progress: float
    ) -> Correction:
        """Return corrections of an iteration, for masses (B, K), floors (B,) and the fraction of completed steps."""
        features, neighbours = self._features(points, mass, before, after, floor, progress)
        h = _bounded(features, _LARGEST_FEATURE).to(next(self.parameters()).dtype)
        e = self.describe(h)
        pooled = torch.cat([e.mean(1, keepdim=True), e.amax(1, keepdim=True)], -1).expand(-1, e.shape[1], -1)
        outputs = (self.decide(torch.cat([e, pooled], -1)) + self.direct(h)).to(mass.dtype)
        stretch, shift, factors, share = outputs.split([self.num_features, self.num_features, 4, 1], -1)
        # Above 8 points (chosen), stretches decrease as standard errors do, as mass^-1/2, and factors as mass^-1.
        error = (8.0 / (8.0 + mass)).sqrt().unsqueeze(-1)
        return Correction(
            stretch=error * _bounded(stretch, _LARGEST_STRETCH),
            shift=_bounded(shift, _LARGEST_SHIFT),
            factors=error.square() * _bounded(factors, _LARGEST_FACTOR),
            share=torch.where(share >= 0, share.tanh(), 0.0).squeeze(-1),  # has a gradient at 0, where training starts
            neighbours=neighbours,
        )

    def _features(
        self, points: Points, mass: Tensor, before: Parameters, after: Parameters, floor: Tensor, progress: float
    ) -> tuple[Tensor, Tensor]:
        """Return features h (B, K, 7 D + 10), which depend on the scale only through the floor, and neighbours."""
        num_components, unit = after.means.shape[1], points.root_mean_variance()[:, None, None]
        neighbours = neighbour_moments(after, self.covariance, unit)
        axes, deviations = self.covariance.principal_axes(after, neighbours)
        deviations = (deviations + _SMALLEST_DEVIATION * unit).expand_as(after.means)

        def log_ratio(matrix: Tensor) -> Tensor:
            """Return the logarithm of a covariance's deviations along the axes, as multiples of ``deviations``."""
            along = variances_along(axes, matrix).clamp(min=0).sqrt() + _SMALLEST_DEVIATION * unit
            return (along / deviations).log()

        change = (axes.mT @ (after.means - before.means).unsqueeze(-1)).squeeze(-1)
        # Deviations divided by the unit of the set, and the floor divided by variances, (B, K, 2 D).
        thickness = torch.cat([(deviations / unit).log(), floor[:, None, None] / deviations.square()], -1)
        mean_thickness = after.log_weights.softmax(-1).unsqueeze(1) @ thickness
        from_center = ((after.means - points.mean.unsqueeze(1)) / unit).square().sum(-1, keepdim=True)
        extent = neighbours.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).sqrt()
        mass = mass.unsqueeze(-1)
        log_count = points.num_points.clamp(min=1.0).log()[:, None, None] - 5.0  # about 0 for common sizes: e^5 = 148
        log_floor = (floor[:, None, None].sqrt() / unit + _SMALLEST_DEVIATION).log()
        features = [
            thickness,
            mean_thickness.expand_as(thickness),
            log_ratio(self.covariance.to_full(before.covariances, before.means)),
            log_ratio(neighbours),
            (change / deviations).abs().log1p(),
            (after.log_weights + math.log(num_components)).unsqueeze(-1),
            mass.clamp(min=1e-3).log(),  # finite for empty components
            1.0 / (mass + 1.0),
            log_count.expand_as(mass),
            log_count.square().expand_as(mass),
            from_center,
            (extent / unit).log(),
            log_floor.expand_as(mass),
            torch.full_like(mass, progress),
            torch.full_like(mass, float(progress == 1.0)),  # no exact M-step follows the last correction
        ]
        return torch.cat(features, -1), neighbours


def neighbour_moments(parameters: Parameters, covariance: Covariance, unit: Tensor) -> Tensor:
    """Return second moments (B, K, D, D) of the mixture near each component, about the mean of the component.

    Each component counts with its weight times exp(-d^2 / 2h^2), d its distance, h = unit K^(-1/D) the typical spacing.
    """
    log_weights, means, covariances = parameters
    num_components, num_features = means.shape[1:]
    scaled = means / (unit * num_components ** (-1.0 / num_features))
    shares = (log_weights.unsqueeze(1) - 0.5 * squared_distance(scaled, scaled)).softmax(-1)
    square = means.unsqueeze(-1) * means.unsqueeze(-2)
    second = (shares @ (covariance.to_full(covariances, means) + square).flatten(2)).unflatten(2, square.shape[2:])
    cross = (shares @ means).unsqueeze(-1) * means.unsqueeze(-2)
    return second - cross - cross.mT + square


def _bounded(values: Tensor, bound: float) -> Tensor:
    """Return values bounded smoothly, nearly unchanged around zero."""
    return bound * torch.tanh(values / bound)
