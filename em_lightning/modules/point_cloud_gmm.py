"""PointCloudGMM: an EM operator trained to fit Gaussian mixtures to point clouds of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from em_lightning.checks import check_at_least, check_choice
from em_lightning.data import PointCloudBatch
from em_lightning.metrics import MixtureLogLikelihood
from em_lightning.mixture import COVARIANCES, Mixture
from em_lightning.mixture.points import power_of_two
from em_lightning.modules.base import EMModule
from em_lightning.operators import EMOperator, ResidualCorrection
from em_lightning.operators.base import check_sets

# A weak prior (chosen, not measured): it matters only after the correction multiplies its pseudo-counts by factors.
_PRIOR = {"weight_concentration": 1.1, "mean_strength": 0.0, "covariance_strength": 0.1, "covariance": 1e-5}
# Below this log-density, in nats, the training loss of a point grows only logarithmically, so that a few far points do
# not dominate the gradient. With the pretrained model, 0.7 % of points (clouds of 64) or 0.05 % (1,024) lie below it.
_LOG_DENSITY_LIMIT = -6.0
# Limits of time and memory if training batches are cut: pieces per batch, and held-out points per piece.
_MAX_PIECES, _MAX_HELD_OUT = 64, 256  # chosen, not measured
# With n < 256 points in the largest cloud of a batch, EM converges sooner: classical iterations are in proportion to n.
_FULL_SIZE, _MIN_EXACT_ITERS = 256, 20  # chosen, not measured
# Clouds are rescaled if half of their longest side, rounded up to a power of two, is outside of these limits. Unscaled,
# clouds of radius 1/4, 1/2, 8 and 32 lost up to .1, .03, .02 and .05 nats per point against radius 1 (noise .02).
_LEAST_SCALE, _MOST_SCALE = 0.5, 8.0  # chosen


class PointCloudGMM(EMModule):
    r"""Train an :class:`~em_lightning.EMOperator` to fit Gaussian mixtures to point clouds.

    Classical EM iterations without gradient are followed by a few learned ones. The loss is the negative mean
    log-likelihood per point, :math:`-\log \sum_k \pi_k N(x | \mu_k, \Sigma_k)`, at held-out points of the same shape
    (in training, log-densities below -6 count less), so that the operator learns the density of a shape and does not
    overfit the points that it is given. Before training, the learned iterations are those of classical EM under
    ``prior``. Clouds whose largest coordinate range is at most .5 or above 16 are scaled for the fit to a range between
    1 and 2. ``torch.manual_seed`` seeds the starts.

    Args:
        num_components: K; ``load_from_checkpoint(path, num_components=...)`` changes it, unless ``init="learned"``.
        num_features: D.
        num_iters: T, learned iterations per cloud.
        exact_iters: E, classical iterations before them; max(20, E n / 256), at most E, for clouds of n < 256 points.
        covariance, init: as in :class:`~em_lightning.EMOperator`.
        num_starts: number of random starts outside training, of which the best is kept for each cloud.
        covariance_floor: added to every variance, in squared normalized units.
        prior: arguments of the :class:`~em_lightning.mixture.MixturePrior` whose pseudo-counts the learned iterations
            multiply by factors between :math:`e^{-12}` and :math:`e^{12}`, the limits of ``ResidualCorrection``.
        width: width of the networks of the correction.
        least_points: cut the clouds of each training batch into pieces of one size. It is drawn between
            ``least_points`` and the size of the clouds, large sizes more often than log-uniform. A batch has at most 64
            pieces, or one per cloud. Each is scored at its cloud's first 256 held-out points. ``None`` does not cut.
        lr, schedule, skip_gradients_above: as in :class:`EMModule`.

    Shape:
        - batch: a :class:`~em_lightning.data.PointCloudBatch` of B clouds.
        - ``forward(points (B, N, D), mask (B, N))``: a :class:`~em_lightning.Mixture`.

    Example:
        >>> from em_lightning.studies import ProceduralSurfaces
        >>> batch = next(iter(ProceduralSurfaces(num_points=64, batch_size=4).val_dataloader()))
        >>> module = PointCloudGMM(num_components=4)
        >>> module(batch.points, batch.mask).means.shape
        torch.Size([4, 4, 3])
    """

    def __init__(
        self,
        num_components: int = 16,
        num_features: int = 3,
        num_iters: int = 3,
        exact_iters: int = 20,
        covariance: Literal["full", "diag", "spherical", "tied"] = "full",
        init: Literal["farthest", "kmeans++", "random", "learned"] = "kmeans++",
        num_starts: int = 1,
        covariance_floor: float = 1e-6,
        prior: dict[str, Any] | None = None,
        width: int = 96,
        least_points: int | None = None,
        lr: float = 3e-3,
        schedule: Literal["one_cycle", "constant"] = "one_cycle",
        skip_gradients_above: float | None = None,
    ) -> None:
        super().__init__(lr, schedule, skip_gradients_above=skip_gradients_above)
        check_choice("covariance", covariance, COVARIANCES)
        check_at_least(0, exact_iters=exact_iters)
        if least_points is not None:
            check_at_least(1, least_points=least_points)
        self.save_hyperparameters()
        self.exact_iters = exact_iters
        self.least_points = least_points
        options: Any = {"num_iters": num_iters, "covariance": covariance, "init": init, "num_starts": num_starts}
        residual = ResidualCorrection(num_features, covariance, width)
        options |= {"prior": _PRIOR if prior is None else prior, "covariance_floor": covariance_floor}
        self.operator = EMOperator(num_components, num_features, residual=residual, **options)
        self.add_metrics(("val", "test"), log_likelihood=MixtureLogLikelihood())

    @classmethod
    def pretrained(cls, **arguments: Any) -> PointCloudGMM:
        """Return the trained model that ships with the package, for D = 3 and any K.

        It was trained on procedural surfaces of 32 to 1,024 points with noise and missing regions.

        Args:
            **arguments: constructor arguments that replace those of the trained model, such as ``num_components=8``;
                a different ``num_features`` or ``width`` raises a ValueError.

        Example:
            >>> module = PointCloudGMM.pretrained(num_components=8)
            >>> module(torch.randn(2, 50, 3)).means.shape
            torch.Size([2, 8, 3])
        """
        stored = torch.load(Path(__file__).with_name("point_cloud_gmm.pt"), map_location="cpu", weights_only=True)
        for name in {"num_features", "width"} & arguments.keys():
            check_choice(name, arguments[name], [stored["arguments"][name]])
        module = cls(**{**stored["arguments"], **arguments})
        module.load_state_dict(stored["state_dict"])
        return module.eval()

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Mixture:
        """Return the mixtures of clouds (B, N, D)."""
        points, unscale = self._scaled(points, mask)
        with torch.no_grad():
            start = self._classical()(points, mask, num_iters=self._exact_iters(points, mask))
        return unscale(self.operator(points, mask, init=start))

    def iterate(self, points: Tensor, mask: Tensor | None = None) -> Iterator[Mixture]:
        """Yield the start and the mixtures after each classical and each learned iteration."""
        points, unscale = self._scaled(points, mask)
        for mixture in self._classical().iterate(points, mask, num_iters=self._exact_iters(points, mask)):
            yield unscale(mixture)
        yield from map(unscale, list(self.operator.iterate(points, mask, init=mixture))[1:])  # without their start

    def _classical(self) -> EMOperator:
        """Return the operator of the classical iterations, with a single start in training."""
        operator = self.operator.classical()
        operator.num_starts = 1 if self.training else operator.num_starts
        return operator

    def _scaled(self, points: Tensor, mask: Tensor | None) -> tuple[Tensor, Callable[[Mixture], Mixture]]:
        """Divide clouds of unusual extent by a power of two near it; also return the function that undoes this."""
        check_sets(points, mask, None, self.operator.num_features)
        hidden = torch.zeros_like(points[..., :1], dtype=torch.bool) if mask is None else ~mask.unsqueeze(-1)
        extent = points.masked_fill(hidden, -math.inf).amax(1) - points.masked_fill(hidden, math.inf).amin(1)
        scale = power_of_two(extent.detach().amax(-1) / 2)
        scale = scale.where(((scale < _LEAST_SCALE) | (scale > _MOST_SCALE)) & scale.isfinite(), 1.0)
        return points / scale[:, None, None], partial(Mixture.affine, scale=scale, shift=torch.zeros_like(extent))

    def _exact_iters(self, points: Tensor, mask: Tensor | None) -> int:
        size = points.shape[1] if mask is None else int(mask.any(0).sum())
        return min(self.exact_iters, max(_MIN_EXACT_ITERS, self.exact_iters * size // _FULL_SIZE))

    def step(self, batch: PointCloudBatch, stage: str) -> dict[str, Tensor]:
        """Return the loss; outside training, update the metrics of the mixtures."""
        if stage == "train" and self.least_points is not None:
            batch = self._cut(batch, self.least_points)
        mixture = self(batch.points, batch.mask)
        log_prob = mixture.log_prob(batch.held_out, batch.held_out_mask)
        total = batch.held_out_mask.sum().clamp(min=1)
        log_likelihood = log_prob.sum() / total
        if stage == "train":
            below = (_LOG_DENSITY_LIMIT - log_prob).clamp(min=0.0)
            loss = -(log_prob + below - below.log1p()).sum() / total
            return {"loss": loss, "log_likelihood": log_likelihood}
        self.metrics_of(stage)["log_likelihood"].update(log_prob, batch.held_out_mask)
        return {"loss": -log_likelihood}

    def _cut(self, batch: PointCloudBatch, least_points: int) -> PointCloudBatch:
        """Cut each cloud into equally many disjoint clouds of one random size; further points are left out."""
        num_clouds, most_points = batch.mask.shape
        least_points = min(least_points, most_points)
        # The exponent 1 would be log-uniform; less (0.75 is chosen) draws large sizes, of few pieces each, more often.
        size = round(least_points * (most_points / least_points) ** float(torch.rand(()) ** 0.75))
        pieces = max(min(most_points // size, _MAX_PIECES // num_clouds), 1)  # of each cloud
        to_fit, to_score = (batch.points, batch.mask), (batch.held_out, batch.held_out_mask)
        points, mask = (part[:, : pieces * size].unflatten(1, (pieces, size)).flatten(0, 1) for part in to_fit)
        held_out, held_out_mask = (part[:, :_MAX_HELD_OUT].repeat_interleave(pieces, 0) for part in to_score)
        return batch._replace(points=points, mask=mask, held_out=held_out, held_out_mask=held_out_mask)

    def predict_step(self, batch: PointCloudBatch, batch_idx: int) -> Mixture:
        """Return the mixtures of a batch of clouds in the units of the data, in the dtype of the normalization."""
        return self(batch.points, batch.mask).to(batch.center.dtype).affine(batch.scale, batch.center)
