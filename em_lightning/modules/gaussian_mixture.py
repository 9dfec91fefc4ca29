"""One Gaussian mixture of one large data set: EM by streamed statistics, stochastic EM, or gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from em_lightning.data import TableBatch
from em_lightning.distributed import batch_mean, global_sum
from em_lightning.mixture import COVARIANCES, Mixture, MixturePrior, Statistics, collect, maximize, no_statistics
from em_lightning.mixture.fit import criteria, marginal
from em_lightning.modules.base import EMModule
from em_lightning.modules.parameters import PlainMixture, UnconstrainedMixture
from em_lightning.operators import EMOperator

METHODS = ("em", "stochastic", "gradient")
# Iterations after which one of several starts is told from another.
_TRIAL = 5


class GaussianMixtureModule(EMModule):
    r"""Fit one Gaussian mixture to a data set of any size, on any number of processes.

    Three ways to the maximum of :math:`\sum_n w_n \log \sum_k \pi_k N(x_n | \mu_k, \Sigma_k)`:

    - ``"em"``: an epoch is an exact EM iteration. Each block of rows adds its sufficient statistics
      :math:`\sum_n w_n r_{nk} [1, x_n, x_n x_n^\top]`, the last block of the epoch sums them over ranks and maximizes.
      It stops when the log-likelihood a point changes by less than ``tol``, as scikit-learn's does.
    - ``"stochastic"``: every block maximizes, after :math:`s \leftarrow (1 - \gamma_t) s + \gamma_t \hat s_t` with
      :math:`\gamma_t = (t + t_0)^{-\alpha}`, for data that should not be seen whole before something is learned.
    - ``"gradient"``: an optimizer, on parameters without constraints.

    No responsibilities are kept, so memory beyond a block does not depend on the rows. Ranks end an epoch with the
    same mixture, whatever their number. A checkpoint in the middle of an epoch holds the statistics so far: with a
    loader that can go on where it was (:class:`~em_lightning.data.TableBlocks`) and as many ranks, the resumed run ends
    where the uninterrupted one does, bit for bit. ``trainer.global_step`` counts blocks.

    Args:
        num_components: K.
        num_features: D.
        covariance: ``"full"``, ``"diag"``, ``"spherical"`` or ``"tied"``.
        method: see above.
        init: centers of the start, drawn in a sample: ``"kmeans++"``, ``"farthest"`` or ``"random"``.
        sample_size: rows of that sample.
        lloyd_steps: steps of k-means that the centers take in it.
        num_starts: starts in the sample of which the best after five iterations is kept.
        covariance_floor: added to every variance, in squared units of the data.
        tol: the run stops when the log-likelihood a point changes by less over an epoch; 0 makes all epochs.
        prior: arguments of :class:`~em_lightning.mixture.MixturePrior`; a mean or covariance that is not given is that
            of the sample.
        step_exponent: :math:`\alpha`, above 1/2 and up to 1, of stochastic EM.
        step_offset: :math:`t_0`, at least 1; the first block counts whole in any case.
        seed: of the sample and the start.
        lr: learning rate of gradient training.
        schedule: ``"one_cycle"`` or ``"constant"``, of gradient training.

    Shape:
        - batch: points (n, D), or a pair of them with how often each counts (n,).
        - ``forward(points (n, D))``: a :class:`~em_lightning.Posterior` over the K components.

    Raises:
        ValueError: an argument is out of range, or the data hold NaN.

    Example:
        >>> import lightning
        >>> from em_lightning.data import GaussianBlobs
        >>> data = GaussianBlobs(num_points=600, num_features=2, true_components=3, block_rows=256)
        >>> module = GaussianMixtureModule(num_components=3, num_features=2)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = lightning.Trainer(max_epochs=50, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(module, data)
        >>> module.mixture.means.shape, bool(module.converged)
        (torch.Size([1, 3, 2]), True)

        A subclass that logs the largest weight after each iteration:

        >>> class Watched(GaussianMixtureModule):
        ...     def on_train_epoch_end(self):
        ...         self.log("train/largest_weight", self.mixture.weights.max())
        >>> trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(Watched(num_components=3, num_features=2), data)
        >>> "train/largest_weight" in trainer.callback_metrics
        True

    Source: Cappé and Moulines, On-line Expectation-Maximization Algorithm for Latent Data Models, 2009.
    """

    center: Tensor
    variance: Tensor
    level: Tensor
    change: Tensor
    iterations: Tensor
    started: Tensor
    running: Tensor
    blocks_seen: Tensor
    _moments: Tensor
    _totals: Tensor

    def __init__(
        self,
        num_components: int = 8,
        num_features: int = 2,
        covariance: Literal["full", "diag", "spherical", "tied"] = "full",
        method: Literal["em", "stochastic", "gradient"] = "em",
        init: Literal["kmeans++", "farthest", "random"] = "kmeans++",
        sample_size: int = 2**14,
        lloyd_steps: int = 0,
        num_starts: int = 1,
        covariance_floor: float = 1e-6,
        tol: float = 1e-3,
        prior: Mapping[str, Any] | None = None,
        step_exponent: float = 0.7,
        step_offset: float = 1.0,
        seed: int = 0,
        lr: float = 1e-2,
        schedule: Literal["one_cycle", "constant"] = "constant",
    ) -> None:
        super().__init__(lr, schedule)
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown; choose from {', '.join(METHODS)}")
        if sample_size < 1:
            raise ValueError(f"sample_size={sample_size} must be at least 1; 16384 is plenty for most mixtures")
        if not tol >= 0:
            raise ValueError(f"tol={tol} must not be negative; 0 makes all epochs")
        if not (0.5 < step_exponent <= 1 and step_offset >= 1):
            raise ValueError(
                f"step_exponent={step_exponent} and step_offset={step_offset}: an exponent above 1/2 and up to 1, and "
                f"an offset of at least 1, let stochastic EM converge"
            )
        if prior is not None and method == "gradient":
            raise ValueError("method='gradient' maximizes the likelihood alone; use 'em' or 'stochastic' with a prior")
        self.save_hyperparameters()
        self.method = method
        self.covariance = covariance
        self.sample_size = sample_size
        self.covariance_floor = covariance_floor
        self.tol = tol
        self.step_exponent = step_exponent
        self.step_offset = step_offset
        self.seed = seed
        self.prior = None if prior is None else MixturePrior(**prior)
        self._start = functools.partial(
            EMOperator,
            num_components,
            num_features,
            num_iters=_TRIAL,
            covariance=covariance,
            init=init,
            seed=None if init == "farthest" else seed,
            residual=False,
            lloyd_steps=lloyd_steps,
            num_starts=num_starts,
            covariance_floor=covariance_floor,
        )
        self._start()  # which checks the arguments
        self.parametrization = (
            UnconstrainedMixture(num_components, num_features, covariance, covariance_floor)
            if method == "gradient"
            else PlainMixture(num_components, num_features, covariance)
        )
        wide = torch.float64
        self.register_buffer("center", torch.zeros(1, num_features, dtype=wide))
        self.register_buffer("variance", torch.ones(1, num_features, dtype=wide))
        self.register_buffer("level", torch.tensor(-math.inf, dtype=wide))
        self.register_buffer("change", torch.tensor(math.inf, dtype=wide))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.long))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        if method == "stochastic":
            size = COVARIANCES[covariance].num_moments(num_features)
            self.register_buffer("running", torch.zeros(1, num_components, size, dtype=wide))
            self.register_buffer("blocks_seen", torch.zeros((), dtype=torch.long))
        # Of this rank alone, so no buffers, which data-parallel training copies from rank 0.
        self._clear()
        self._held_out = torch.zeros(2, dtype=wide)
        self._restored: Tensor | None = None

    # The mixture, and where it starts.

    @property
    def mixture(self) -> Mixture:
        """The mixture, of one set and in double precision."""
        return self.parametrization()

    @property
    def converged(self) -> bool:
        """Whether the last epoch changed the log-likelihood a point by less than ``tol``."""
        return bool(self.change < self.tol)

    def configure_model(self) -> None:
        """Use single precision where the device has no other."""
        if self._trainer is not None and self._trainer.strategy.root_device.type == "mps":
            self.float()

    def start_from(self, mixture: Mixture, center: Tensor | None = None, variance: Tensor | None = None) -> None:
        """Start from a mixture of one set instead of a drawn one.

        Args:
            mixture: the start.
            center: (1, D), near the mean of the data; the mean of the mixture unless given.
            variance: (1, D), of the data, for a prior; that of the mixture unless given.
        """
        mixture = Mixture(*(part.detach().to(self.center) for part in mixture))
        mean, spread = marginal(mixture)
        self.parametrization.assign(mixture)
        self.center.copy_(mean if center is None else center)
        self.variance.copy_(spread if variance is None else variance)
        self.level.fill_(-math.inf)
        self.change.fill_(math.inf)
        self.started.fill_(True)

    def on_fit_start(self) -> None:
        """Let a run that has converged, and is resumed, end at once."""
        if self.converged:
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        """Draw the start on one rank for all, and take up the statistics of a checkpoint within an epoch."""
        if not self.started:
            found: Any = self._drawn() if self.trainer.is_global_zero else None
            mixture, center, variance = self.trainer.strategy.broadcast(found)
            self.start_from(Mixture(*mixture), center, variance)
        self._clear()
        if self._restored is not None and self.trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            self._resume(self._restored)
        self._restored = None

    @torch.no_grad()
    def _drawn(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        points, weights = self._sample()
        points = points.to(self.device, self.center.dtype).unsqueeze(0)
        counts = None if weights is None else weights.to(points).unsqueeze(0)
        mixture = self._start().to(points).eval()(points, weights=counts, num_iters=0)
        share = torch.ones_like(points[..., :1]) if counts is None else counts.unsqueeze(-1)
        share = share / share.sum(1, keepdim=True)
        center = (share * points).sum(1)
        variance = (share * (points - center.unsqueeze(1)).square()).sum(1)
        return tuple(part.cpu() for part in mixture), center.cpu(), variance.cpu()

    def _sample(self) -> TableBatch:
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "sample"):
            return loader.sample(self.sample_size, self.seed)
        found: list[TableBatch] = []
        for batch in loader:
            found.append(rows_of(batch))
            if sum(len(rows.points) for rows in found) >= self.sample_size:
                break
        points = torch.cat([rows.points for rows in found])[: self.sample_size]
        if found[0].weights is None:
            return TableBatch(points, None)
        return TableBatch(points, torch.cat([rows.weights for rows in found])[: self.sample_size])  # type: ignore[misc]

    # Training.

    def configure_optimizers(self) -> Any:
        """Return the optimizer of gradient training, or what stands for one in EM."""
        return super().configure_optimizers() if self.method == "gradient" else _Iteration(self.parameters())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Count the epoch, where Lightning has not."""
        # A run that is resumed from a checkpoint of an epoch's last batch leaves the next epoch uncounted, and then
        # checkpoints within that epoch or later ones are taken for those of an epoch's end.
        progress: Any = self.trainer.fit_loop.epoch_progress
        if progress.total.ready == progress.total.processed:
            progress.increment_ready()
            progress.increment_started()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Learn from a block of rows, and end the iteration after the last block of the epoch."""
        if self.method == "gradient":
            loss = super().training_step(batch, batch_idx)
            if self.trainer.is_last_batch:
                self._end_epoch(global_sum(self._totals))
            return loss
        return self._learn(rows_of(batch)) if self.method == "em" else self._learn_by_steps(rows_of(batch))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Propagate the loss of gradient training; EM has learned already."""
        if self.method == "gradient":
            super().backward(loss, *args, **kwargs)

    @torch.no_grad()
    def _learn(self, rows: TableBatch) -> Tensor:
        found = self._collect(rows, Statistics(self._moments, self._totals[:1], self.center))
        self._moments, self._totals[0] = found.moments, found.log_likelihood[0]
        if self.trainer.is_last_batch:
            moments, level = _over_ranks(found)
            self._end_epoch(torch.stack([level, moments[..., 0].sum()]))
            self._maximize(moments)
        return -found.log_likelihood[0] / found.moments[..., 0].sum()

    @torch.no_grad()
    def _learn_by_steps(self, rows: TableBatch) -> Tensor:
        moments, level = _over_ranks(self._collect(rows, no_statistics(self.mixture, self.center)))
        self._totals += torch.stack([level, moments[..., 0].sum()])
        share = 1.0 if self.blocks_seen == 0 else float(self.blocks_seen + self.step_offset) ** -self.step_exponent
        blocks = self.trainer.num_training_batches
        # In the mass of the whole data set, beside which a prior has its weight.
        self.running.lerp_(moments * (blocks if math.isfinite(blocks) else 1), share)
        self.blocks_seen += 1
        self._maximize(self.running)
        if self.trainer.is_last_batch:
            self._end_epoch(self._totals)
        return -level / moments[..., 0].sum()

    def _collect(self, rows: TableBatch, before: Statistics) -> Statistics:
        weights = None if rows.weights is None else rows.weights.to(rows.points.dtype).unsqueeze(0)
        return collect(rows.points.unsqueeze(0), self.mixture, before, weights=weights)

    def _maximize(self, moments: Tensor) -> None:
        statistics = Statistics(moments, moments.new_zeros(1), self.center)
        found = maximize(statistics, self.covariance, self.covariance_floor, self.prior, self.variance)
        self.parametrization.assign(found)

    @torch.no_grad()
    def _end_epoch(self, totals: Tensor) -> None:
        """Log the log-likelihood of an epoch and stop where it changes no more."""
        level = totals[0] / totals[1]
        if not torch.isfinite(level):
            raise ValueError(f"the log-likelihood is {float(level)}: the data hold NaN or infinity, or no row counts")
        self.change.copy_((level - self.level).abs())
        self.level.copy_(level)
        self.iterations += 1
        self._clear()
        # The same on all ranks; Lightning advises to say so.
        alike: Any = {"on_step": False, "on_epoch": True, "batch_size": 1, "sync_dist": True}
        self.log("train/log_likelihood", level, prog_bar=True, **alike)
        if self.iterations > 1:
            self.log("train/change", self.change, **alike)
        if self.trainer.strategy.reduce_boolean_decision(self.converged):
            self.trainer.should_stop = True

    def _clear(self) -> None:
        """Begin an epoch's sums: moments of EM, and the log-likelihood and the mass of the rows."""
        empty = no_statistics(self.mixture, self.center)
        self._moments = empty.moments if self.method == "em" else empty.moments[:0]
        self._totals = torch.zeros(2, dtype=self.center.dtype, device=self.center.device)

    # Evaluation.

    def forward(self, points: Tensor) -> Any:
        """Return the posterior of points (n, D): energies and responsibilities (n, K), free energy (n,)."""
        with torch.autocast(points.device.type, enabled=False):
            posterior = self.mixture.posterior(points.unsqueeze(0))
        return type(posterior)(*(part.squeeze(0) for part in posterior))

    def log_prob(self, points: Tensor) -> Tensor:
        """Return the log-density (n,) of points (n, D)."""
        with torch.autocast(points.device.type, enabled=False):
            return self.mixture.log_prob(points.unsqueeze(0)).squeeze(0)

    def step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        """Return the mean negative log-likelihood of a block of rows, the mean taken over ranks."""
        points, weights = rows_of(batch)
        log_prob = self.log_prob(points)
        self._totals += _totals_of(log_prob, weights, self._totals)
        return {"loss": -batch_mean(log_prob, weights)}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a block of held-out rows."""
        points, weights = rows_of(batch)
        self._held_out = self._held_out.to(self.center.device)
        self._held_out += _totals_of(self.log_prob(points), weights, self._held_out)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the log-likelihood of all held-out rows."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log the log-likelihood of all rows, and BIC and AIC as if the mixture had been fitted to them."""
        total, mass = self._log_held_out("test")
        found = criteria(self.mixture, total, mass)
        self.log_dict({"test/bic": found.bic, "test/aic": found.aic}, sync_dist=True)

    def _log_held_out(self, stage: str) -> tuple[float, float]:
        total, mass = global_sum(self._held_out).tolist()
        self._held_out = torch.zeros_like(self._held_out)
        level = total / mass if mass else math.nan
        self.log_dict({f"{stage}/log_likelihood": level, f"{stage}/loss": -level}, sync_dist=True)
        return total, mass

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the responsibilities (n, K) of a block of rows."""
        return self(rows_of(batch).points).responsibilities

    # Checkpoints within an epoch.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the statistics that each rank has gathered in this epoch; all ranks take part."""
        own = torch.cat([self._totals, self._moments.flatten()])
        rank, world = _place()
        pending = own.new_zeros(world, len(own))
        pending[rank] = own
        checkpoint["em_pending"] = global_sum(pending).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the statistics of an epoch that was left off in its middle."""
        self._restored = checkpoint.get("em_pending")

    def _resume(self, pending: Tensor) -> None:
        rank, world = _place()
        if len(pending) != world:
            if bool(pending.any()):
                raise ValueError(
                    f"the checkpoint was made within an epoch by {len(pending)} processes and this run has {world}; "
                    f"resume with as many, or from the end of an epoch"
                )
            return
        own = pending[rank].to(self.center.device)
        self._totals, self._moments = own[:2].clone(), own[2:].reshape(self._moments.shape).clone()


class _Iteration(torch.optim.Optimizer):
    """What Lightning counts steps by: all is done in the closure, the training step.

    Manual optimization would count too, but there Lightning's ``ModelCheckpoint`` does without ``train_time_interval``.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()


def rows_of(batch: Any) -> TableBatch:
    """Return points and weights of a batch: a tensor, or a sequence of points and perhaps weights."""
    if isinstance(batch, Tensor):
        return TableBatch(batch, None)
    return TableBatch(batch[0], batch[1] if len(batch) > 1 else None)


def _over_ranks(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Return moments and log-likelihood summed over ranks, by one message."""
    moments = statistics.moments
    total = global_sum(torch.cat([moments.flatten(), statistics.log_likelihood]))
    return total[:-1].reshape(moments.shape), total[-1]


def _totals_of(log_prob: Tensor, weights: Tensor | None, like: Tensor) -> Tensor:
    log_prob = log_prob.detach().to(like)
    if weights is None:
        return torch.stack([log_prob.sum(), log_prob.new_tensor(float(len(log_prob)))])
    return torch.stack([(log_prob * weights).sum(), weights.to(like).sum()])


def _place() -> tuple[int, int]:
    """Return the rank and the number of ranks."""
    spread = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
