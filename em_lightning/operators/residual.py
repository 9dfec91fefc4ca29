"""What the operator learns: corrections of means and covariances after each M-step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from em_lightning.mixture.cloud import Cloud
from em_lightning.mixture.covariance import COVARIANCES, Structure
from em_lightning.mixture.factors import State


class ResidualCorrection(nn.Module):
    r"""Correct each component by what it knows: ``mu <- mu + L MLP_mu(h)``, ``L <- L E(MLP_Sigma(h))``.

    ``h_k`` describes component k: its weight, its place and spread relative to the cloud, how far the last M-step
    moved and reshaped it, how much of the loop is left, and the mean of the same over all components of its cloud.
    Steps are taken in the component's own frame ``L``, so they follow the scale of the data; ``E`` stretches, turns and
    repeats the change that the M-step made, and covariances stay positive definite and above their floor. Both networks
    end in zeros: before training the correction is nothing, exactly. Components are treated alike (equivariant).

    Args:
        num_features: D.
        covariance: the covariance structure, or its key.
        width: of the hidden layers.

    Source: the residual operator core ``mu <- mu + MLP(mu), Sigma <- Sigma + MLP(Sigma)`` of EM as a neural operator.
    """

    def __init__(self, num_features: int, covariance: str | Structure = "full", width: int = 64) -> None:
        super().__init__()
        self.structure: Structure = COVARIANCES[covariance] if isinstance(covariance, str) else covariance
        shape_size = self.structure.step_size(num_features)
        inputs = 1 + 2 * num_features + 2 * (shape_size - 2) + 2
        self.describe = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.mean_mlp = _mlp(2 * width, width, num_features)
        self.covariance_mlp = _mlp(2 * width, width, shape_size)

    def forward(self, cloud: Cloud, before: State, after: State, floor: Tensor, progress: float) -> State:
        """Return the corrected state.

        Args:
            cloud: the point sets.
            before: the state that the E-step saw.
            after: the state that the M-step made.
            floor: (B,), of the variances.
            progress: the share of the loop that is done, 1 at the last iteration.
        """
        dtype = next(self.parameters()).dtype
        hidden = self.describe(self._features(cloud, before, after, progress).to(dtype))
        hidden = torch.cat([hidden, hidden.mean(1, keepdim=True).expand_as(hidden)], -1)
        # Wider bounds learn no better, and now and then throw a component out of its cloud.
        shift = _bounded(self.mean_mlp(hidden), 1.0).to(after.means.dtype)
        means = after.means + self.structure.apply(after.factors.scale, shift)
        stretch = _bounded(self.covariance_mlp(hidden), 2.0).to(after.means.dtype)
        return State(after.log_weights, means, self.structure.correct(before.factors, after.factors, stretch, floor))

    def _features(self, cloud: Cloud, before: State, after: State, progress: float) -> Tensor:
        components = after.means.shape[1]
        scale = cloud.variance.mean(-1).clamp(min=torch.finfo(cloud.points.dtype).tiny).sqrt()[:, None, None]
        spread, change = self._shape(before, after, scale)
        done = torch.full_like(after.means[..., :1], progress)
        features = [
            after.log_weights.unsqueeze(-1) + math.log(components),
            after.means / scale,
            self.structure.apply(before.factors.inverse, after.means - before.means),
            spread.expand(-1, components, -1),
            change.expand(-1, components, -1),
            done,
            (done == 1.0).to(done),
        ]
        return _bounded(torch.cat(features, -1), 10.0)

    def _shape(self, before: State, after: State, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithmic size of each factor beside the cloud's, and how the M-step changed it."""
        factor = after.factors.scale
        if factor.ndim == 3:
            return (factor / scale).log(), (factor * before.factors.inverse).log()
        features = factor.shape[-1]
        below = torch.tril_indices(features, features, -1, device=factor.device)
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        slopes = factor[..., below[0], below[1]] / diagonal[..., below[1]]
        step = before.factors.inverse @ factor
        turned = step[..., below[0], below[1]]
        shrunk = step.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([(diagonal / scale).log(), slopes], -1), torch.cat([shrunk, turned], -1)


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), last)


def _bounded(values: Tensor, bound: float) -> Tensor:
    """Return values near zero as they are and large ones smoothly below a bound."""
    return bound * torch.tanh(values / bound)
