"""Mixtures as parameters of a module: weights, means and covariances for EM, or unconstrained for an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from em_lightning.mixture import COVARIANCES, Mixture


class PlainMixture(nn.Module):
    """Weights, means and covariances of one mixture in float64, initially K equal standard normal components."""

    def __init__(self, num_components: int, num_features: int, covariance: str) -> None:
        super().__init__()
        ones = torch.ones(1, num_features, dtype=torch.float64)
        uniform = torch.zeros(1, num_components, dtype=torch.float64).log_softmax(-1)
        # Parameters, although they get no gradient: DDP refuses a module without parameters.
        self.log_weights = nn.Parameter(uniform)
        self.means = nn.Parameter(torch.zeros(1, num_components, num_features, dtype=torch.float64))
        self.covariances = nn.Parameter(COVARIANCES[covariance].expand(ones, num_components).clone())

    def forward(self) -> Mixture:
        """Return the mixture of one set."""
        return Mixture(self.log_weights.detach(), self.means.detach(), self.covariances.detach())

    @torch.no_grad()
    def assign(self, mixture: Mixture) -> None:
        """Copy a mixture of the same shapes."""
        for parameter, value in zip(self.parameters(), mixture.parameters(), strict=True):
            parameter.copy_(value)


class UnconstrainedMixture(nn.Module):
    r"""A mixture as unconstrained parameters.

    .. math::
        \pi = \operatorname{softmax}(a), \quad \mu_k = c + S m_k, \quad
        \Sigma_k = S L_k L_k^\top S + \epsilon I, \quad L_k = \operatorname{tril}(l_k) + \operatorname{diag}(e^{s_k})

    :math:`c` is the mean of the mixture that was assigned last and :math:`S` the diagonal matrix of its standard
    deviations, ``scale``, so that the learning rate does not depend on the units. :math:`\epsilon` is the covariance
    floor.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, num_components: int, num_features: int, covariance: str, floor: float) -> None:
        super().__init__()
        self.covariance = COVARIANCES[covariance]
        self.floor = floor
        ones = torch.ones(1, num_features, dtype=torch.float64)
        entries = self.covariance.unconstrained(self.covariance.expand(ones, num_components))[0]
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.offsets = nn.Parameter(torch.zeros(num_components, num_features))
        self.entries = nn.Parameter(entries.float())
        self.register_buffer("center", torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(num_features, dtype=torch.float64))

    def forward(self) -> Mixture:
        """Return the mixture of one set, in float64."""
        dtype, scale = self.center.dtype, self.scale
        log_weights = self.logits.to(dtype).log_softmax(-1)
        means = self.center + scale * self.offsets.to(dtype)
        covariances = self.covariance.constrained(self.entries.to(dtype)[None], len(scale))
        floor = self.covariance.expand(torch.full_like(scale, self.floor)[None], len(means))
        return Mixture(log_weights[None], means[None], self.covariance.rescaled(covariances, scale) + floor)

    @torch.no_grad()
    def assign(self, mixture: Mixture) -> None:
        """Copy a mixture; ``forward`` returns its variances plus the floor."""
        self.center.copy_(mixture.mean[0])
        self.scale.copy_(self.covariance.common_scale(mixture.variance[0].sqrt()))
        self.logits.copy_(mixture.log_weights[0])
        self.offsets.copy_((mixture.means[0] - self.center) / self.scale)
        covariances = self.covariance.rescaled(mixture.covariances, self.scale.reciprocal())
        self.entries.copy_(self.covariance.unconstrained(covariances)[0])
