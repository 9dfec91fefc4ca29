"""AmortizedClustering: an EM operator with a learned prior and a "none of the above" component, trained across sets."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.checks import check_positive
from em_lightning.mixture import Mixture
from em_lightning.modules.base import EMModule
from em_lightning.operators import EMOperator
from em_lightning.studies.mixture_sets import MixtureSetBatch


class AmortizedClustering(EMModule):
    r"""Train an :class:`~em_lightning.EMOperator` to find the mixtures that sets of points were drawn from.

    The loss is the negative mean log-density of held-out points of each set, with n points in the set:

    .. math:: p(x) = \frac{n \sum_k \pi_k N(x | \mu_k, \sigma_k^2 I) + c\, N(x | \bar x, s^2 I)}{n + c}

    Three parts are learned: the **prior** of scales and weights, whose pseudo-counts the M-step adds; the
    **corrections** of means and scales; and the background, an explicit **"none of the above" component** around the
    mean of the set with pseudo-count c and scale s. Without the background, each held-out point of a cluster that has
    no point in the set would cost tens of nats.

    Args:
        num_components: K; no parameter depends on it: ``load_from_checkpoint(path, num_components=...)`` may change it.
        num_features: D.
        num_iters: T, EM iterations per set.
        init: initialization of the centers, as in :class:`~em_lightning.EMOperator`.
        num_starts: number of random starts, of which the best is kept for each set, also in training; corrections that
            are trained on worse starts are too small. ``init="farthest"`` is not random and has one start.
        residual: whether to learn corrections in addition to the prior.
        prior_strength: initial pseudo-count of the scales.
        prior_scale: initial scale of the prior, in units of the points.
        lr: largest learning rate of the corrections.
        prior_lr: largest learning rate of the prior and the "none of the above" component.
        schedule: of both learning rates, as in :class:`EMModule`.

    Shape:
        - batch: a :class:`~em_lightning.studies.MixtureSetBatch` of B sets.
        - ``forward(points (B, N, D), mask (B, N))``: a :class:`~em_lightning.Mixture`.

    Example:
        >>> from em_lightning.studies import MixtureSets
        >>> batch = next(iter(MixtureSets(batch_size=2).val_dataloader()))
        >>> module = AmortizedClustering()
        >>> mixture = module(batch.points, batch.mask)
        >>> module.log_prob(mixture, batch.held_out, batch.points, batch.mask).shape
        torch.Size([2, 1000])

    Source: the task of Lee et al., Set Transformer, 2019.
    """

    def __init__(
        self,
        num_components: int = 4,
        num_features: int = 2,
        num_iters: int = 10,
        init: Literal["kmeans++", "farthest", "random"] = "kmeans++",
        num_starts: int = 16,
        residual: bool = True,
        prior_strength: float = 100.0,
        prior_scale: float = 0.5,
        lr: float = 2e-3,
        prior_lr: float = 3e-2,
        schedule: Literal["one_cycle", "constant"] = "one_cycle",
    ) -> None:
        super().__init__(lr, schedule)
        check_positive(prior_scale=prior_scale, prior_lr=prior_lr)
        self.save_hyperparameters()
        self.prior_lr = prior_lr
        prior = {
            "weight_concentration": 2.0,  # a pseudo-count of 1 per component
            "mean_strength": 0.0,
            "covariance_strength": prior_strength,
            "covariance": [prior_scale**2] * num_features,
            "learnable": True,
        }
        options: dict[str, Any] = {"covariance": "spherical", "init": init, "residual": residual, "prior": prior}
        options |= {"num_iters": num_iters, "num_starts": num_starts if init != "farthest" else 1}
        self.operator = EMOperator(num_components, num_features, **options)
        # log c and log s of the background. Initially s is 5 with the default prior_scale, to cover sets in [-4, 4].
        self.log_count = nn.Parameter(torch.zeros(1))
        self.log_scale = nn.Parameter(torch.full((1,), math.log(10.0 * prior_scale)))

    def train(self, mode: bool = True) -> AmortizedClustering:
        """Set the mode; the operator stays in eval mode, in which it keeps the best of several starts."""
        super().train(mode)
        self.operator.eval()
        return self

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Mixture:
        return self.operator(points, mask)

    def log_prob(self, mixture: Mixture, x: Tensor, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the log-density (B, M) of x (B, M, D) under the mixtures of sets (B, N, D) and the background."""
        valid = torch.ones_like(points[..., 0]) if mask is None else mask.to(points.dtype)
        n = valid.sum(-1, keepdim=True)
        center = (points * valid.unsqueeze(-1)).sum(1, keepdim=True) / n.clamp(min=1.0).unsqueeze(-1)
        background = Mixture(torch.zeros_like(n), center, (2.0 * self.log_scale).exp().to(n.dtype).expand_as(n))
        log_total = torch.logaddexp(n.log(), self.log_count)
        log_weighted = torch.logaddexp(n.log() + mixture.log_prob(x), self.log_count + background.log_prob(x))
        return log_weighted - log_total

    def step(self, batch: MixtureSetBatch, stage: str) -> dict[str, Tensor]:
        mixture = self(batch.points, batch.mask)
        log_likelihood = self.log_prob(mixture, batch.held_out, batch.points, batch.mask).mean()
        return {"loss": -log_likelihood, "gap_to_oracle": log_likelihood - batch.truth.log_prob(batch.held_out).mean()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the corrections, and a group with its own learning rate for everything else."""
        correction = self.operator.correction
        corrections = [] if correction is None else list(correction.parameters())
        others = [*self.operator.prior.parameters(), self.log_count, self.log_scale]
        return [{"params": corrections}, {"params": others, "lr": self.prior_lr}]
