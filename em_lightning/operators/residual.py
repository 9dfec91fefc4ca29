"""The learned M-step: pseudo-counts per component, and corrections of means and covariances."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from em_lightning.kernels import squared_distance
from em_lightning.mixture.covariance import COVARIANCES, Covariance
from em_lightning.mixture.m_step import PseudoCounts
from em_lightning.mixture.parameters import Parameters
from em_lightning.mixture.points import Points

# Bounds of the corrections: of a standard deviation and of a pseudo-count as logarithms of factors.
_STRETCH, _FACTOR = 2.0, 12.0


class Correction(NamedTuple):
    """Corrections of one iteration; all are zero in an untrained operator.

    stretch: (B, K, D), logarithms of the factors of the standard deviations along the principal axes.
    shift: (B, K, D), steps of the mean along the principal axes, as multiples of its change in this iteration.
    counts: (B, K, 4), logarithms of the factors of the prior's three pseudo-counts and of its covariance.
    share: (B, K), share of the neighbours' covariance in the prior covariance, at least 0.
    neighbours: (B, K, D, D), second moments of the neighbouring components about the mean of each.
    """

    stretch: Tensor
    shift: Tensor
    counts: Tensor
    share: Tensor
    neighbours: Tensor

    def pseudo_counts(self, prior: PseudoCounts, covariance: Covariance) -> PseudoCounts:
        """Return the pseudo-counts of each component."""
        weight, mean, strength, spread = self.counts.exp().unbind(-1)
        share = self.share.unsqueeze(-1)
        scatter = (1.0 - share) * prior.scatter + share * covariance.pairs(self.neighbours)
        return PseudoCounts(
            prior.weight_count * weight,
            prior.mean_count * mean,
            prior.covariance_count * strength,
            prior.mean,
            spread.unsqueeze(-1) * scatter,
        )

    def apply(self, covariance: Covariance, before: Tensor, after: Parameters, floor: Tensor) -> Parameters:
        """Return corrected parameters, given the means before and the parameters after an M-step."""
        axes, deviations = covariance.principal_axes(after.covariances, after.means, self.neighbours)
        step = (axes.mT @ (after.means - before).unsqueeze(-1)).squeeze(-1)
        step = deviations * _bounded(self.shift * step / deviations, 1.0)
        means = after.means + (axes @ step.unsqueeze(-1)).squeeze(-1)
        return Parameters(after.log_weights, means, covariance.stretched(after.covariances, axes, self.stretch, floor))


class ResidualCorrection(nn.Module):
    r"""Networks that correct the M-step of each component, given features of the component and of its set.

    The features ``h_k`` of component k are its principal standard deviations, the changes of these and of the mean in
    the last iteration, the number of its points, the extent of its neighbours, and the size of the set. Then

    .. math::
        (\text{counts}, \text{stretch}, \text{shift})_k = \operatorname{MLP}(h_k, \text{mean}_j h_j, \max_j h_j) + A h_k

    The pseudo-counts of a prior, if there is one, are multiplied by ``exp(counts)``, and its covariance is mixed with
    that of the neighbouring components. Along each principal axis of the M-step's covariance the standard deviation is
    multiplied by ``exp(stretch)``, and the mean moves by ``shift`` times its change. The last layers start at zero, so
    that an untrained correction changes nothing. Corrections are independent of the scale and, for full covariances, of
    the rotation of the data, and equivariant in the components.

    Args:
        num_features: D.
        covariance: the covariance type, or its key.
        width: width of the hidden layers.

    Source: EM as a neural operator with a residual core; here in the principal axes of each component.
    """

    def __init__(self, num_features: int, covariance: str | Covariance = "full", width: int = 64) -> None:
        super().__init__()
        self.covariance: Covariance = COVARIANCES[covariance] if isinstance(covariance, str) else covariance
        self.num_features = num_features
        inputs, outputs = 7 * num_features + 10, 2 * num_features + 5
        self.describe = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.decide = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, outputs))
        self.direct = nn.Linear(inputs, outputs, bias=False)
        for last in (self.decide[-1], self.direct):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, points: Points, mass: Tensor, before: Parameters, after: Parameters, floor: Tensor, progress: float
    ) -> Correction:
        """Return the corrections of an iteration, for masses (B, K), floors (B,) and the share of completed steps."""
        covariance, dtype = self.covariance, after.means.dtype
        components = after.means.shape[1]
        unit = points.unit()[:, None, None]
        neighbours = neighbour_moments(after, covariance, unit)
        axes, deviations = covariance.principal_axes(after.covariances, after.means, neighbours)

        def along(matrix: Tensor) -> Tensor:
            """Return the standard deviations (B, K, D) of covariances along the axes."""
            return ((axes.mT @ matrix) * axes.mT).sum(-1).clamp(min=0).sqrt() + 1e-6 * unit

        step = (axes.mT @ (after.means - before.means).unsqueeze(-1)).squeeze(-1)
        wide = (deviations + 1e-6 * unit).expand_as(after.means)
        count = points.num_points[:, None, None].expand(-1, components, 1)
        one = torch.ones_like(count)
        thickness = torch.cat([(wide / unit).log(), floor[:, None, None] / wide.square()], -1)
        features = [
            thickness,
            (after.log_weights.softmax(-1).unsqueeze(1) @ thickness).expand_as(thickness),
            (along(covariance.to_full(before.covariances, before.means)) / wide).log(),
            (along(neighbours) / wide).log(),
            (step / wide).abs().log1p(),
            (after.log_weights + math.log(components)).unsqueeze(-1),
            mass.unsqueeze(-1).clamp(min=1e-3).log(),
            1.0 / (mass.unsqueeze(-1) + 1.0),
            count.clamp(min=1.0).log() - 5.0,
            (count.clamp(min=1.0).log() - 5.0).square(),
            ((after.means - points.mean.unsqueeze(1)) / unit).square().sum(-1, keepdim=True),
            (neighbours.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).sqrt() / unit).log(),
            (floor[:, None, None].sqrt() / unit + 1e-6).log().expand_as(one),
            one * progress,
            one * (progress == 1.0),
        ]
        described = _bounded(torch.cat(features, -1), 10.0).to(next(self.parameters()).dtype)
        hidden = self.describe(described)
        pooled = torch.cat([hidden.mean(1, keepdim=True), hidden.amax(1, keepdim=True)], -1)
        decided = self.decide(torch.cat([hidden, pooled.expand(-1, components, -1)], -1)) + self.direct(described)
        stretch, shift, counts, share = decided.to(dtype).split([self.num_features, self.num_features, 4, 1], -1)
        # Parameters of components with many points have small standard errors and need small corrections.
        error = (8.0 / (8.0 + mass)).sqrt().unsqueeze(-1)
        return Correction(
            error * _bounded(stretch, _STRETCH),
            _bounded(shift, 10.0),
            error.square() * _bounded(counts, _FACTOR),
            torch.where(share >= 0, share.tanh(), 0.0).squeeze(-1),  # has a gradient at 0, where training starts
            neighbours,
        )


def neighbour_moments(parameters: Parameters, covariance: Covariance, unit: Tensor) -> Tensor:
    """Return second moments (B, K, D, D) of the mixture near each component about its mean.

    Components are weighted by their weight times a Gaussian of their distance; its width is unit * K^(-1 / D).
    """
    log_weights, means, covariances = parameters
    components, features = means.shape[1:]
    width = unit * components ** (-1.0 / features)
    distances = squared_distance(means / width, means / width)
    near = (log_weights.unsqueeze(1) - 0.5 * distances).softmax(-1)
    square = means.unsqueeze(-1) * means.unsqueeze(-2)
    second = (near @ (covariance.to_full(covariances, means) + square).flatten(2)).unflatten(2, (features, features))
    cross = (near @ means).unsqueeze(-1) * means.unsqueeze(-2)
    return second - cross - cross.mT + square


def _bounded(values: Tensor, bound: float) -> Tensor:
    """Return values bounded smoothly, nearly unchanged around zero."""
    return bound * torch.tanh(values / bound)
