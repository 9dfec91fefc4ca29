"""The inputs of the iterations of the EM operator, and its learned start."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from em_lightning.mixture.covariance import Covariance
from em_lightning.mixture.m_step import PseudoCounts
from em_lightning.mixture.points import Parameters, Points


class Sets(NamedTuple):
    """The inputs of all iterations of an EM operator.

    points: the points prepared for EM; ``points.x`` is (B, D, N), in the user's units.
    mass, mask: ``points.mass`` (B,), under the name that all operators have, and the given mask (B, N).
    family: the covariance type of the operator; in ``EMOperator.objective`` that of its mixture; or von Mises-Fisher.
    floor: (B,), the floor of variances in frame coordinates; of 1 / kappa for von Mises-Fisher.
    pseudo_counts, dtype: the pseudo-counts of the prior, and the dtype of the result.
    """

    points: Points
    mass: Tensor
    mask: Tensor | None
    family: Covariance
    floor: Tensor
    pseudo_counts: PseudoCounts | None
    dtype: torch.dtype


class LearnedStart(nn.Module):
    """Learned centers, scales and weights, relative to the mean and root mean variance of the set."""

    def __init__(self, num_components: int, num_features: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(num_components, num_features))
        self.log_scale = nn.Parameter(torch.full((num_components, 1), -0.5))  # narrower than the set; not tuned
        self.logits = nn.Parameter(torch.zeros(num_components))

    def forward(self, sets: Sets) -> Parameters:
        """Return the start of each set."""
        mean, unit, family = sets.points.mean, sets.points.root_mean_variance()[:, None, None], sets.family
        deviation = unit * self.log_scale.exp() + sets.floor.sqrt()[:, None, None]  # (B, K, 1)
        identities = family.expand(torch.ones_like(mean), len(self.means))  # unit variances
        covariances = family.scaled(identities, deviation.square().squeeze(-1))
        log_weights = self.logits.log_softmax(-1).to(unit).expand(unit.shape[0], -1)
        return Parameters(log_weights, mean.unsqueeze(1) + self.means * unit, covariances)
