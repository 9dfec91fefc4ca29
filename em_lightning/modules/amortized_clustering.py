"""Clustering learned over many sets: an EM operator with a learned prior, learned corrections and an open world."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.data import MixtureSetBatch
from em_lightning.mixture import Mixture
from em_lightning.modules.base import EMModule
from em_lightning.operators import EMOperator


class AmortizedClustering(EMModule):
    r"""Train an :class:`~em_lightning.EMOperator` to find the mixtures that sets of points were drawn from.

    The loss is minus the mean log-density of fresh points of each set, not of those the mixture was fitted to:

    .. math:: p(x) = \frac{n \sum_k \pi_k N(x | \mu_k, \sigma_k^2 I) + c\, N(x | \bar x, s^2 I)}{n + c}

    with n points in the set. Three things are learned. The **prior** of scales and weights, whose pseudo-counts the
    M-step adds, says how large clusters are. The **corrections** of means and scales say what EM overlooks. The last
    term is an explicit **hypothesis "none of the above"** of c points about the mean of the set, with c and s learned:
    a cluster that left no point in a set would else cost tens of nats a point.

    Args:
        num_components: K; nothing learned depends on it, see :meth:`for_components`.
        num_features: D.
        num_iters: T, EM iterations a set.
        covariance: of the components: ``"spherical"``, ``"diag"`` or ``"full"``.
        init: ``"kmeans++"``, ``"farthest"`` or ``"random"``.
        num_starts: random starts of which each set takes the best, in training too: corrections that learn on worse
            starts than they will meet learn caution.
        residual: whether there are corrections beside the prior.
        open_world: whether there is the hypothesis "none of the above".
        prior_strength: the pseudo-count of scales before training.
        prior_scale: their scale before training, in units of the points.
        weight_concentration: that of the Dirichlet prior before training; 1 keeps it flat.
        lr: largest learning rate of the corrections.
        prior_lr: that of the prior and the open world, a handful of numbers.
        schedule: ``"one_cycle"`` or ``"constant"``.

    Shape:
        - batch: a :class:`~em_lightning.data.MixtureSetBatch` of B sets.
        - ``forward(points (B, N, D), mask (B, N))``: a :class:`~em_lightning.Mixture`.

    Example:
        >>> from em_lightning.data import MixtureSets
        >>> batch = next(iter(MixtureSets(batch_size=2).val_dataloader()))
        >>> module = AmortizedClustering()
        >>> mixture = module(batch.points, batch.mask)
        >>> module.log_prob(mixture, batch.held_out, batch.points, batch.mask).shape
        torch.Size([2, 1000])

    Source: the task of Lee et al., Set Transformer, 2019; the layer of EM as a neural operator.
    """

    def __init__(
        self,
        num_components: int = 4,
        num_features: int = 2,
        num_iters: int = 10,
        covariance: Literal["spherical", "diag", "full"] = "spherical",
        init: Literal["kmeans++", "farthest", "random"] = "kmeans++",
        num_starts: int = 16,
        residual: bool = True,
        open_world: bool = True,
        prior_strength: float = 100.0,
        prior_scale: float = 0.5,
        weight_concentration: float = 2.0,
        lr: float = 2e-3,
        prior_lr: float = 3e-2,
        schedule: Literal["one_cycle", "constant"] = "one_cycle",
    ) -> None:
        super().__init__(lr, schedule)
        for name, value in {"prior_scale": prior_scale, "prior_lr": prior_lr}.items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        self.save_hyperparameters()
        self.prior_lr = prior_lr
        self.operator = EMOperator(
            num_components,
            num_features,
            num_iters=num_iters,
            covariance=covariance,
            init=init,
            num_starts=num_starts if init != "farthest" else 1,
            residual=residual,
            prior={
                "weight_concentration": weight_concentration,
                "mean_strength": 0.0,
                "covariance_strength": prior_strength,
                "covariance": [prior_scale**2] * num_features,
                "learnable": True,
            },
        )
        self.log_count = nn.Parameter(torch.zeros(1)) if open_world else None
        self.log_extent = nn.Parameter(torch.full((1,), math.log(10.0 * prior_scale))) if open_world else None

    def for_components(self, num_components: int) -> AmortizedClustering:
        """Return a module of the same weights for another number of components."""
        known = inspect.signature(AmortizedClustering).parameters
        arguments = {name: value for name, value in self.hparams.items() if name in known}
        other = AmortizedClustering(**{**arguments, "num_components": num_components})
        other.load_state_dict(self.state_dict())
        return other.to(self.device).train(self.training)

    def train(self, mode: bool = True) -> AmortizedClustering:
        """Set the mode; the operator keeps the one in which it searches for its start."""
        super().train(mode)
        self.operator.eval()
        return self

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Mixture:
        """Return the mixtures of sets (B, N, D)."""
        return self.operator(points, mask)

    def log_prob(self, mixture: Mixture, x: Tensor, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the log-density (B, M) of points x (B, M, D) under the mixtures of sets and the open world.

        Args:
            mixture: what :meth:`forward` made of the sets.
            x: where the density is taken.
            points: the sets (B, N, D).
            mask: (B, N), false where a row is padding.
        """
        density = mixture.log_prob(x)
        if self.log_count is None or self.log_extent is None:
            return density
        valid = torch.ones_like(points[..., 0]) if mask is None else mask.to(points.dtype)
        size = valid.sum(-1, keepdim=True)
        center = (points * valid.unsqueeze(-1)).sum(1, keepdim=True) / size.clamp(min=1.0).unsqueeze(-1)
        features = x.shape[-1]
        square = (x - center).square().sum(-1) * (-2.0 * self.log_extent).exp()
        outside = -0.5 * square - features * (self.log_extent + 0.5 * math.log(2.0 * math.pi))
        total = torch.logaddexp(size.clamp(min=torch.finfo(size.dtype).tiny).log(), self.log_count)
        return torch.logaddexp(size.log() + density, self.log_count + outside) - total

    def step(self, batch: MixtureSetBatch, stage: str) -> dict[str, Tensor]:
        """Return the loss, and how far it is from that of the true mixtures on the same points."""
        mixture = self(batch.points, batch.mask)
        held_out = self.log_prob(mixture, batch.held_out, batch.points, batch.mask).mean()
        gap = held_out - batch.truth.log_prob(batch.held_out).mean()
        return {"loss": -held_out, "gap_to_oracle": gap}

    def configure_optimizers(self) -> Any:
        """Return Adam with a rate of its own for the prior and the open world."""
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        assert self.operator.prior is not None
        few = {id(value) for value in (*self.operator.prior.parameters(), self.log_count, self.log_extent)}
        group = optimizer.param_groups[0]
        mine = [value for value in group["params"] if id(value) in few]
        group["params"] = [value for value in group["params"] if id(value) not in few]
        optimizer.add_param_group({"params": mine, "lr": self.prior_lr})
        if not isinstance(configured, dict):
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._one_cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
