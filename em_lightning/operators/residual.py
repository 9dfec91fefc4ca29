"""Learned corrections of means and covariances after each M-step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from em_lightning.mixture.covariance import COVARIANCES, Covariance
from em_lightning.mixture.parameters import Parameters
from em_lightning.mixture.points import Points


class ResidualCorrection(nn.Module):
    r"""Correct each component: ``mu <- mu + L MLP_mu(h)`` and ``L <- L E(MLP_Sigma(h))``, with ``Sigma = L L^T``.

    ``h_k`` encodes component k: its weight, mean and covariance relative to the set, their change in the last M-step,
    the progress of the loop, and the mean encoding of all components. Corrections are in the coordinates of the
    component's factor ``L`` and therefore independent of the scale of the data. ``E`` is a triangular matrix times an
    extrapolation of the M-step; covariances stay positive definite and above their floor. The last layers of both
    networks start at zero, so that an untrained correction changes nothing. The correction is equivariant in the
    components.

    Args:
        num_features: D.
        covariance: the covariance type, or its key.
        width: of the hidden layers.
    """

    def __init__(self, num_features: int, covariance: str | Covariance = "full", width: int = 64) -> None:
        super().__init__()
        self.covariance: Covariance = COVARIANCES[covariance] if isinstance(covariance, str) else covariance
        size = self.covariance.correction_size(num_features)
        inputs = 1 + 2 * num_features + 2 * (size - 2) + 2
        self.describe = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.mean_mlp = _mlp(2 * width, width, num_features)
        self.covariance_mlp = _mlp(2 * width, width, size)

    def forward(
        self, points: Points, before: Parameters, after: Parameters, floor: Tensor, progress: float
    ) -> Parameters:
        """Return corrected parameters for those before and after an EM iteration.

        Args:
            points: the point sets.
            before: the parameters before the E-step.
            after: the parameters after the M-step.
            floor: (B,), of the variances.
            progress: completed share of the loop, 1 at the last iteration.
        """
        covariance, components = self.covariance, after.means.shape[1]
        own = covariance.factorize(before.covariances, before.means)
        new = covariance.factorize(after.covariances, after.means)
        unit = points.unit()[:, None, None]
        size, change = covariance.describe(own, new, unit)
        done = torch.full_like(after.means[..., :1], progress)
        features = [
            after.log_weights.unsqueeze(-1) + math.log(components),
            (after.means - points.mean.unsqueeze(1)) / unit,
            covariance.apply(own.inverse, after.means - before.means),
            size.expand(-1, components, -1),
            change.expand(-1, components, -1),
            done,
            (done == 1.0).to(done),
        ]
        hidden = self.describe(_bounded(torch.cat(features, -1), 10.0).to(next(self.parameters()).dtype))
        hidden = torch.cat([hidden, hidden.mean(1, keepdim=True).expand_as(hidden)], -1)
        # With larger bounds components sometimes left their set.
        shift = _bounded(self.mean_mlp(hidden), 1.0).to(after.means.dtype)
        stretch = _bounded(self.covariance_mlp(hidden), 2.0).to(after.means.dtype)
        means = after.means + covariance.apply(new.scale, shift)
        covariances = covariance.correct(own, new, after.covariances, stretch, floor)
        return Parameters(after.log_weights, means, covariances)


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Return a network with zero output before training."""
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), last)


def _bounded(values: Tensor, bound: float) -> Tensor:
    """Return values bounded smoothly, nearly unchanged around zero."""
    return bound * torch.tanh(values / bound)
