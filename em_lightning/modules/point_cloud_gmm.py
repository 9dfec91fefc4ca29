"""PointCloudGMM: an EM operator trained to fit Gaussian mixtures to point clouds."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from em_lightning.checks import check_choice
from em_lightning.data import PointCloudBatch
from em_lightning.metrics import DeadComponents, EffectiveComponents, MixtureLogLikelihood, ResponsibilityEntropy
from em_lightning.mixture import Mixture
from em_lightning.modules.base import EMModule
from em_lightning.operators import EMOperator


class PointCloudGMM(EMModule):
    r"""Train an :class:`~em_lightning.EMOperator` to fit Gaussian mixtures to point clouds.

    The loss is the negative mean log-likelihood per point, :math:`-\log \sum_k \pi_k N(x | \mu_k, \Sigma_k)`. By
    default it is taken at held-out points of the same shape, so that the operator learns densities of shapes and does
    not overfit the points that it is given.

    Args:
        num_components: K.
        num_features: D.
        num_iters: T, EM iterations per cloud.
        covariance: ``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``.
        init: ``"farthest"``, ``"kmeans++"``, ``"random"`` or ``"learned"``.
        num_starts: number of random starts outside training, of which the best is kept for each cloud.
        covariance_floor: added to every variance, in squared normalized units.
        target: the points at which the loss is taken: ``"held_out"`` or ``"fitted"``.
        lr: largest learning rate.
        schedule: ``"one_cycle"`` or ``"constant"``.
        weight_decay: decoupled weight decay.
        skip_gradients_above: norm of the gradient above which a step is skipped; a single cloud with a very thin
            component would otherwise dominate the training.

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
        check_choice("target", target, ("held_out", "fitted"))
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
        self.add_metrics(
            ("val", "test"),
            log_likelihood=MixtureLogLikelihood(),
            effective_components=EffectiveComponents(),
            dead_components=DeadComponents(),
            responsibility_entropy=ResponsibilityEntropy(),
        )

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Mixture:
        """Return the mixtures of clouds (B, N, D)."""
        return self.operator(points, mask)

    def step(self, batch: PointCloudBatch, stage: str) -> dict[str, Tensor]:
        """Return the loss; outside training, update the metrics of the mixtures."""
        mixture = self(batch.points, batch.mask)
        held_out = self.target == "held_out" or stage != "train"
        x, mask = (batch.held_out, batch.held_out_mask) if held_out else (batch.points, batch.mask)
        log_prob = mixture.log_prob(x, mask)
        log_likelihood = log_prob.sum() / mask.sum().clamp(min=1)
        if stage == "train":
            return {"loss": -log_likelihood, "log_likelihood": log_likelihood}
        metrics = self.metrics_of(stage)
        metrics["log_likelihood"].update(log_prob, mask)
        metrics["effective_components"].update(mixture.log_weights)
        metrics["dead_components"].update(mixture.log_weights)
        metrics["responsibility_entropy"].update(mixture.posterior(x).responsibilities, mask)
        return {"loss": -log_likelihood}

    def predict_step(self, batch: PointCloudBatch, batch_idx: int) -> Mixture:
        """Return the mixtures of a batch of clouds, in the data's own units."""
        return self(batch.points, batch.mask).affine(batch.scale, batch.center)

    @torch.no_grad()
    def sample(self, points: Tensor, n: int, mask: Tensor | None = None) -> Tensor:
        """Draw ``n`` new points (B, n, D) from the mixture of each cloud (B, N, D)."""
        return self(points, mask).sample(n)
