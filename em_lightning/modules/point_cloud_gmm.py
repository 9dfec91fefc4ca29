"""The main job: an EM operator that learns to fit mixtures to point clouds."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from em_lightning.data import PointCloudBatch
from em_lightning.metrics import DeadComponents, EffectiveComponents, MixtureLogLikelihood, ResponsibilityEntropy
from em_lightning.mixture import Mixture
from em_lightning.modules.base import EMModule
from em_lightning.operators import EMOperator


class PointCloudGMM(EMModule):
    r"""Train an :class:`~em_lightning.EMOperator` to fit Gaussian mixtures to point clouds.

    The loss is minus the mean log-likelihood of a point, ``-mean log sum_k pi_k N(x | mu_k, Sigma_k)``: the
    logsumexp decoder. By default it is taken at fresh points of the same shape, not at those the mixture was fitted
    to, so the operator learns densities that hold for the shape and not only for the sample.

    Args:
        num_components: K.
        num_features: D.
        num_iters: T, EM iterations a cloud.
        covariance: ``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``.
        init: ``"farthest"``, ``"kmeans++"``, ``"random"`` or ``"learned"``.
        num_starts: random starts of which each cloud takes the best, outside training.
        covariance_floor: added to every variance, in squared normalized units.
        target: where the loss is taken: ``"held_out"`` points of the shape, or the ``"fitted"`` ones.
        lr: largest learning rate.
        schedule: ``"one_cycle"`` or ``"constant"``.
        weight_decay: decoupled weight decay.
        skip_gradients_above: the norm of a gradient that is left out: one cloud under a component that is thinner
            than it would else outweigh all others.

    Shape:
        - batch: a :class:`~em_lightning.data.PointCloudBatch` of B clouds.
        - ``forward(points (B, N, D), mask (B, N))``: a :class:`~em_lightning.Mixture`.

    Example:
        >>> from em_lightning.data import ProceduralSurfaces
        >>> batch = next(iter(ProceduralSurfaces(num_points=64, batch_size=4).val_dataloader()))
        >>> module = PointCloudGMM(num_components=4)
        >>> module(batch.points, batch.mask).means.shape
        torch.Size([4, 4, 3])
        >>> module.sample(batch.points, 10, batch.mask).shape
        torch.Size([4, 10, 3])
    """

    def __init__(
        self,
        num_components: int = 16,
        num_features: int = 3,
        num_iters: int = 5,
        covariance: Literal["full", "diag", "spherical", "tied"] = "full",
        init: Literal["farthest", "kmeans++", "random", "learned"] = "farthest",
        num_starts: int = 1,
        covariance_floor: float = 1e-6,
        target: Literal["held_out", "fitted"] = "held_out",
        lr: float = 1e-3,
        schedule: Literal["one_cycle", "constant"] = "one_cycle",
        weight_decay: float = 0.0,
        skip_gradients_above: float | None = 5.0,
    ) -> None:
        super().__init__(lr, schedule, weight_decay, skip_gradients_above)
        if target not in ("held_out", "fitted"):
            raise ValueError(f"target={target!r} is unknown; choose 'held_out' or 'fitted'")
        self.save_hyperparameters()
        self.target = target
        self.operator = EMOperator(
            num_components,
            num_features,
            num_iters=num_iters,
            covariance=covariance,
            init=init,
            num_starts=num_starts,
            covariance_floor=covariance_floor,
        )
        self.val_metrics, self.test_metrics = _Metrics(), _Metrics()

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Mixture:
        """Return the mixtures of clouds (B, N, D)."""
        return self.operator(points, mask)

    def step(self, batch: PointCloudBatch, stage: str) -> dict[str, Tensor]:
        """Return the loss, and log what the mixtures look like outside training."""
        mixture = self(batch.points, batch.mask)
        held_out = self.target == "held_out" or stage != "train"
        x, mask = (batch.held_out, batch.held_out_mask) if held_out else (batch.points, batch.mask)
        log_prob = mixture.log_prob(x, mask)
        log_likelihood = log_prob.sum() / mask.sum().clamp(min=1)
        if stage != "train":
            metrics = self.test_metrics if stage == "test" else self.val_metrics
            metrics.update(mixture, x, mask, log_prob)
            metrics.log(self, stage, len(x))
            return {"loss": -log_likelihood}
        return {"loss": -log_likelihood, "log_likelihood": log_likelihood}

    def predict_step(self, batch: PointCloudBatch, batch_idx: int) -> Mixture:
        """Return the mixtures of a batch of clouds, in the data's own units."""
        return self(batch.points, batch.mask).affine(batch.scale, batch.center)

    @torch.no_grad()
    def sample(self, points: Tensor, n: int, mask: Tensor | None = None) -> Tensor:
        """Return ``n`` new points (B, n, D) of each cloud (B, N, D), drawn from its mixture."""
        return self(points, mask).sample(n)


class _Metrics(torch.nn.Module):
    """The metrics of one stage: torchmetrics wants its own objects for each."""

    def __init__(self) -> None:
        super().__init__()
        self.log_likelihood = MixtureLogLikelihood()
        self.weights = MetricCollection(
            {"effective_components": EffectiveComponents(), "dead_components": DeadComponents()}
        )
        self.responsibility_entropy = ResponsibilityEntropy()

    def update(self, mixture: Mixture, x: Tensor, mask: Tensor, log_prob: Tensor) -> None:
        self.log_likelihood.update(log_prob, mask)
        self.weights.update(mixture.log_weights)
        self.responsibility_entropy.update(mixture.posterior(x).responsibilities, mask)

    def log(self, module: Any, stage: str, batch_size: int) -> None:
        named = {
            "log_likelihood": self.log_likelihood,
            "responsibility_entropy": self.responsibility_entropy,
            **dict(self.weights.items()),
        }
        for name, metric in named.items():
            module.log(f"{stage}/{name}", metric, on_epoch=True, on_step=False, batch_size=batch_size)
