"""Mixtures as parameters of a module: plain for EM, unconstrained for an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from em_lightning.mixture import Mixture
from em_lightning.mixture.fit import marginal

_SHAPES = {"full": "kdd", "tied": "1dd", "diag": "kd", "spherical": "k"}


class PlainMixture(nn.Module):
    """Weights, means and covariances of one mixture as parameters in float64, initially standard normal.

    Args:
        num_components: K.
        num_features: D.
        covariance: ``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``.
    """

    def __init__(self, num_components: int, num_features: int, covariance: str) -> None:
        super().__init__()
        sizes = {"k": num_components, "d": num_features, "1": 1}
        wide = torch.float64
        shape = [1, *(sizes[letter] for letter in _SHAPES[covariance])]
        square = torch.eye(num_features, dtype=wide) if len(shape) == 4 else torch.ones((), dtype=wide)
        uniform = torch.zeros(1, num_components, dtype=wide).log_softmax(-1)
        # Parameters, although they get no gradient: DDP refuses a module without parameters.
        self.log_weights = nn.Parameter(uniform)
        self.means = nn.Parameter(torch.zeros(1, num_components, num_features, dtype=wide))
        self.covariances = nn.Parameter(square.expand(shape).clone())

    def forward(self) -> Mixture:
        """Return the mixture of one set."""
        return Mixture(self.log_weights.detach(), self.means.detach(), self.covariances.detach())

    @torch.no_grad()
    def assign(self, mixture: Mixture) -> None:
        """Copy a mixture of the same shapes."""
        for parameter, value in zip(self.parameters(), mixture, strict=True):
            parameter.copy_(value)


class UnconstrainedMixture(nn.Module):
    r"""A mixture as unconstrained parameters.

    .. math::
        \pi = \operatorname{softmax}(a), \quad \mu_k = c + S m_k, \quad
        \Sigma_k = S L_k L_k^\top S + \epsilon I, \quad L_k = \operatorname{tril}(l_k) + \operatorname{diag}(e^{s_k})

    with :math:`c` and the diagonal :math:`S` the mean and the standard deviations of the mixture that was assigned
    last, so that the learning rate does not depend on the units of the data.

    Args:
        num_components: K.
        num_features: D.
        covariance: ``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``.
        floor: :math:`\epsilon`.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, num_components: int, num_features: int, covariance: str, floor: float) -> None:
        super().__init__()
        self.covariance = covariance
        self.floor = floor
        sets = 1 if covariance == "tied" else num_components
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.offsets = nn.Parameter(torch.zeros(num_components, num_features))
        self.log_scale = nn.Parameter(torch.zeros(sets, 1 if covariance == "spherical" else num_features))
        if covariance in ("full", "tied"):
            self.lower = nn.Parameter(torch.zeros(sets, num_features, num_features))
        self.register_buffer("center", torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("spread", torch.ones(num_features, dtype=torch.float64))

    def forward(self) -> Mixture:
        """Return the mixture of one set, in float64."""
        wide, spread = self.center.dtype, self.spread
        log_weights = self.logits.to(wide).log_softmax(-1)
        means = self.center + spread * self.offsets.to(wide)
        scale = self.log_scale.to(wide).exp()
        if self.covariance in ("full", "tied"):
            factor = spread.unsqueeze(-1) * (self.lower.to(wide).tril(-1) + scale.diag_embed())
            eye = torch.eye(len(spread), dtype=wide, device=spread.device)
            covariances = factor @ factor.mT + self.floor * eye
        else:
            covariances = (spread[: scale.shape[1]] * scale).square() + self.floor
        covariances = covariances.squeeze(-1) if self.covariance == "spherical" else covariances
        return Mixture(log_weights[None], means[None], covariances[None])

    @torch.no_grad()
    def assign(self, mixture: Mixture) -> None:
        """Copy a mixture; its variances become larger by the floor, which ``forward`` adds."""
        center, variance = marginal(mixture)
        self.center.copy_(center[0])
        self.spread.copy_((variance.mean() if self.covariance == "spherical" else variance[0]).sqrt())
        self.logits.copy_(mixture.log_weights[0])
        self.offsets.copy_((mixture.means[0] - self.center) / self.spread)
        covariances = mixture.covariances[0]
        if self.covariance in ("full", "tied"):
            factor = torch.linalg.cholesky(covariances) / self.spread.unsqueeze(-1)
            self.log_scale.copy_(factor.diagonal(dim1=-2, dim2=-1).log())
            self.lower.copy_(factor.tril(-1))
        else:
            scale = covariances.sqrt().unsqueeze(-1) if self.covariance == "spherical" else covariances.sqrt()
            self.log_scale.copy_((scale / self.spread[: scale.shape[1]]).log())
