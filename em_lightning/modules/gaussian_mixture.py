"""One Gaussian mixture of one large data set: EM by streamed statistics, stochastic EM, or gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from em_lightning.distributed import global_sum
from em_lightning.mixture import Mixture, MixturePrior
from em_lightning.mixture.fit import criteria
from em_lightning.modules.base import EMModule
from em_lightning.modules.learners import (
    FullBatchEM,
    GradientAscent,
    MixtureLearner,
    StochasticEM,
    rows_of,
    sample_of,
    start_in,
    sums_of,
)
from em_lightning.operators import EMOperator
from em_lightning.registry import from_options

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
    - ``"gradient"``: an optimizer, on parameters without constraints; with a prior its maximum is that of EM.

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
        prior: arguments of :class:`~em_lightning.mixture.MixturePrior`, whose density is maximized with the likelihood;
            a mean or covariance that is not given is that of the sample.
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

    _held_out: Tensor

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
        if prior is not None and prior.get("learnable"):
            raise ValueError("prior={'learnable': True, ...} is for many data sets; of one give the pseudo-counts")
        self.save_hyperparameters()
        self.method = method
        self.covariance = covariance
        self.sample_size = sample_size
        self.covariance_floor = covariance_floor
        self.tol = tol
        self.seed = seed
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
        counts = None if prior is None else from_options("prior", MixturePrior, prior)
        common = (num_components, num_features, covariance, covariance_floor, counts)
        self.learner: MixtureLearner
        if method == "stochastic":
            self.learner = StochasticEM(*common, exponent=step_exponent, offset=step_offset)
        else:
            self.learner = (FullBatchEM if method == "em" else GradientAscent)(*common)
        self.register_buffer("_held_out", torch.zeros(2, dtype=torch.float64), persistent=False)
        # Ranks agree on buffers, or hold their own; data-parallel training would copy them before every block.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._restored: Tensor | None = None

    # The mixture, and where it starts.

    @property
    def mixture(self) -> Mixture:
        """The mixture, of one set and in double precision."""
        return self.learner.mixture

    @property
    def level(self) -> Tensor:
        """The log-likelihood a row in the last epoch: in EM of the mixture before its M-step."""
        return self.learner.level

    @property
    def iterations(self) -> Tensor:
        """The number of epochs so far."""
        return self.learner.iterations

    @property
    def converged(self) -> bool:
        """Whether the last epoch changed the log-likelihood a point by less than ``tol``."""
        return bool(self.learner.change < self.tol)

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
        self.learner.start_from(mixture, center, variance)

    def on_fit_start(self) -> None:
        """Let a run that has converged, and is resumed, end at once."""
        if self.converged:
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        """Draw the start on one rank for all, and take up the statistics of a checkpoint within an epoch."""
        if not self.learner.started:
            found: Any = None
            if self.trainer.is_global_zero:
                rows = sample_of(self.trainer.train_dataloader, self.sample_size, self.seed)
                mixture, *moments = start_in(rows, self._start())
                found = (tuple(mixture), *moments)
            parts, center, variance = self.trainer.strategy.broadcast(found)
            self.start_from(Mixture(*parts), center, variance)
        self.learner.own.zero_()
        if self._restored is not None and self.trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            self.learner.resume(self._restored)
        self._restored = None

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

    def step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        """Learn from a block of rows, and return the loss: without a gradient where there is nothing left to learn."""
        blocks = self.trainer.num_training_batches
        return {"loss": self.learner.learn(rows_of(batch), blocks if math.isfinite(blocks) else 1)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Learn from a block of rows, and end the iteration after the last block of the epoch."""
        loss = super().training_step(batch, batch_idx)
        if self.trainer.is_last_batch:
            self._end_epoch()
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Propagate the loss of gradient training; EM has learned already."""
        if self.method == "gradient":
            super().backward(loss, *args, **kwargs)

    def _end_epoch(self) -> None:
        """Log the log-likelihood of an epoch and stop where it changes no more."""
        self.learner.end_pass()
        # The same on all ranks; Lightning advises to say so.
        alike: Any = {"on_step": False, "on_epoch": True, "batch_size": 1, "sync_dist": True}
        self.log("train/log_likelihood", self.level, prog_bar=True, **alike)
        if self.iterations > 1:
            self.log("train/change", self.learner.change, **alike)
        if self.trainer.strategy.reduce_boolean_decision(self.converged):
            self.trainer.should_stop = True

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

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a block of held-out rows."""
        points, weights = rows_of(batch)
        self._held_out += sums_of(self.log_prob(points).to(self._held_out), weights)

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
        self._held_out.zero_()
        level = total / mass if mass else math.nan
        self.log_dict({f"{stage}/log_likelihood": level, f"{stage}/loss": -level}, sync_dist=True)
        return total, mass

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the responsibilities (n, K) of a block of rows."""
        return self(rows_of(batch).points).responsibilities

    # Checkpoints within an epoch.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the statistics that each rank has gathered in this epoch; all ranks take part."""
        checkpoint["em_pending"] = self.learner.pending()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the statistics of an epoch that was left off in its middle."""
        self._restored = checkpoint.get("em_pending")


class _Iteration(torch.optim.Optimizer):
    """What Lightning counts steps by: all is done in the closure, the training step.

    Manual optimization would count too, but there Lightning's ``ModelCheckpoint`` does without ``train_time_interval``.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()
