"""GaussianMixtureModule: one Gaussian mixture of one large data set, by streamed EM, stochastic EM or gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from em_lightning.checks import check_at_least, check_choice
from em_lightning.distributed import global_sum
from em_lightning.metrics import MixtureLogLikelihood
from em_lightning.mixture import Mixture, MixturePrior, information_criteria
from em_lightning.modules.base import EMModule
from em_lightning.modules.learners import (
    FullBatchEM,
    GradientAscent,
    MixtureLearner,
    StochasticEM,
    initial_mixture,
    loss_of,
    rows_of,
    sample_of,
)
from em_lightning.modules.parameters import PlainMixture, UnconstrainedMixture
from em_lightning.operators import EMOperator
from em_lightning.operators.checks import build


class GaussianMixtureModule(EMModule):
    r"""Fit one Gaussian mixture to a data set of any size, on any number of processes.

    Three methods maximize :math:`\sum_n w_n \log \sum_k \pi_k N(x_n | \mu_k, \Sigma_k)`:

    - ``"em"``: an epoch is an exact EM iteration. Each block of rows adds its sufficient statistics
      :math:`\sum_n w_n r_{nk} [1, x_n, x_n x_n^\top]`; after the last block of the epoch they are summed over ranks,
      and the M-step follows. The run stops when the log-likelihood per point changes by less than ``tol``, as in
      scikit-learn.
    - ``"stochastic"``: an M-step after every block, on running statistics
      :math:`s \leftarrow (1 - \gamma_t) s + \gamma_t \hat s_t` with :math:`\gamma_t = (t + t_0)^{-\alpha}`, for data
      of which a part is enough to learn from.
    - ``"gradient"``: an optimizer on unconstrained parameters; with a prior its maximum is that of EM.

    Responsibilities are not stored, so memory beyond a block does not depend on the number of rows. All ranks end an
    epoch with the same mixture, which does not depend on their number. A checkpoint within an epoch holds the
    statistics so far: with a loader that resumes within an epoch (:class:`~em_lightning.data.TableBlocks`) and the same
    number of ranks, a resumed run equals the uninterrupted one bitwise. ``trainer.global_step`` counts blocks.

    Args:
        num_components: K.
        num_features: D.
        covariance: type of the covariances.
        method: see above.
        init: initialization of the centers from a sample of the rows.
        sample_size: number of rows in the sample.
        lloyd_steps: steps of k-means on the sample after the initialization.
        num_starts: number of starts, of which the best after five iterations on the sample is kept.
        covariance_floor: added to every variance, in squared units of the data.
        tol: the run stops when the log-likelihood per point changes by less in an epoch; 0 runs all epochs.
        prior: arguments of :class:`~em_lightning.mixture.MixturePrior`, whose density is maximized with the likelihood;
            its mean and covariance default to those of the sample.
        step_exponent: :math:`\alpha` of stochastic EM, above 1/2 and at most 1.
        step_offset: :math:`t_0` of stochastic EM, at least 1; :math:`\gamma_0` is 1 in any case.
        seed: seed of the sample and the initialization.
        lr, schedule: as in :class:`EMModule`, for the gradient method.

    Shape:
        - batch: points (n, D), or a pair of points and weights (n,).
        - ``forward(points (n, D))``: a :class:`~em_lightning.Posterior` over the K components.

    Raises:
        ValueError: an argument is out of range, or the data contain NaN.

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

    Source: Cappé and Moulines, On-line Expectation-Maximization Algorithm for Latent Data Models, 2009.
    """

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
        check_choice("method", method, ("em", "stochastic", "gradient"))
        check_at_least(1, sample_size=sample_size)
        check_at_least(0, tol=tol)
        if not (0.5 < step_exponent <= 1 and step_offset >= 1):
            raise ValueError(
                f"step_exponent={step_exponent} must be above 0.5 and at most 1, step_offset={step_offset} at least 1"
            )
        if prior is not None and prior.get("learnable"):
            raise ValueError("prior={'learnable': True, ...} needs many data sets; give fixed pseudo-counts")
        self.save_hyperparameters()
        self.method = method
        self.covariance = covariance
        self.sample_size = sample_size
        self.covariance_floor = covariance_floor
        self.tol = tol
        self.seed = seed
        self._make_operator = functools.partial(
            EMOperator,
            num_components,
            num_features,
            num_iters=5,  # after which the best of several starts is chosen
            covariance=covariance,
            init=init,
            seed=None if init == "farthest" else seed,
            residual=False,
            lloyd_steps=lloyd_steps,
            num_starts=num_starts,
            covariance_floor=covariance_floor,
        )
        self._make_operator()  # checks the arguments
        common = covariance_floor, build("prior", MixturePrior, prior)
        shape = (num_components, num_features, covariance)
        self.learner: MixtureLearner
        if method == "gradient":
            self.learner = GradientAscent(UnconstrainedMixture(*shape, covariance_floor), *common)
        elif method == "em":
            self.learner = FullBatchEM(PlainMixture(*shape), *common)
        else:
            self.learner = StochasticEM(PlainMixture(*shape), *common, exponent=step_exponent, offset=step_offset)
        self.add_metrics(("val", "test"), log_likelihood=MixtureLogLikelihood())
        # DDP would broadcast the buffers before every block; ranks agree on them already, or each has its own.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._restored: Tensor | None = None

    @property
    def mixture(self) -> Mixture:
        """The mixture of one set, in float64."""
        return self.learner.mixture

    @property
    def log_likelihood(self) -> Tensor:
        """The log-likelihood per row in the last epoch; for EM, of the mixture before the M-step."""
        return self.learner.log_likelihood

    @property
    def iterations(self) -> Tensor:
        """The number of epochs so far."""
        return self.learner.iterations

    @property
    def converged(self) -> bool:
        """Whether the last epoch changed the log-likelihood per point by less than ``tol``."""
        return bool(self.learner.change < self.tol)

    def setup(self, stage: str) -> None:
        """Use float32 on devices without float64."""
        if self.trainer.strategy.root_device.type == "mps":
            self.float()

    def start_from(self, mixture: Mixture, center: Tensor | None = None, variance: Tensor | None = None) -> None:
        """Set the initial mixture, and the mean and variance (1, D) of the data, by default those of the mixture."""
        self.learner.start_from(mixture, center, variance)

    def on_train_start(self) -> None:
        """Draw the initial mixture on rank 0 for all ranks; restore the statistics of a checkpoint within an epoch."""
        self.trainer.should_stop |= self.converged  # in an earlier run
        if not self.learner.started:
            start: Any = None
            if self.trainer.is_global_zero:
                rows = sample_of(self.trainer.train_dataloader, self.sample_size, self.seed)
                mixture, *moments = initial_mixture(rows, self._make_operator())
                start = (tuple(mixture.parameters()), *moments)
            parts, center, variance = self.trainer.strategy.broadcast(start)
            self.start_from(Mixture(*parts), center, variance)
        self.learner.sums.zero_()
        sums, self._restored = self._restored, None
        if sums is None or not self.trainer.ckpt_path or not sums.any():  # a new run, or one from the end of an epoch
            return
        if len(sums) != self.trainer.world_size:
            saved, size = f"saved within an epoch by {len(sums)} processes", self.trainer.world_size
            raise ValueError(f"the checkpoint was {saved}; resume with as many, not with {size}")
        self.learner.sums.copy_(sums[self.trainer.global_rank])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Count the epoch: Lightning 2.6 does not after a resume from a checkpoint of an epoch's last batch."""
        progress: Any = self.trainer.fit_loop.epoch_progress
        if progress.total.ready == progress.total.processed:
            progress.increment_ready()
            progress.increment_started()

    def step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        """Learn from a block of rows, or measure it; the loss has a gradient only for the gradient method in training.

        The optimizer of EM updates nothing, because the parameters have no gradient; with it Lightning counts steps,
        and ``ModelCheckpoint`` heeds ``train_time_interval``, which it ignores under manual optimization.
        """
        rows = rows_of(batch)
        if stage == "train":
            num_blocks = self.trainer.num_training_batches
            return {"loss": self.learner.learn(rows, num_blocks if math.isfinite(num_blocks) else 1)}
        log_prob = self.log_prob(rows.points)
        self.metrics_of(stage)["log_likelihood"].update(log_prob, weights=rows.weights)
        counts = torch.ones_like(log_prob) if rows.weights is None else rows.weights.to(log_prob)
        return {"loss": loss_of(counts @ log_prob, counts.sum())}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Learn from a block of rows, and end the iteration after the last block of an epoch."""
        loss = super().training_step(batch, batch_idx)
        if not self.trainer.is_last_batch:
            return loss
        self.learner.end_pass()
        # The values are equal on all ranks; without sync_dist Lightning would warn.
        options: Any = {"on_step": False, "on_epoch": True, "batch_size": 1, "sync_dist": True}
        self.log("train/log_likelihood", self.log_likelihood, prog_bar=True, **options)
        if self.iterations > 1:
            self.log("train/change", self.learner.change, **options)
        if self.trainer.strategy.reduce_boolean_decision(self.converged):
            self.trainer.should_stop = True
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate for the gradient method; EM needs no backward pass."""
        if self.method == "gradient":
            super().backward(loss, *args, **kwargs)
        elif self.trainer.scaler is not None:  # of 16-mixed precision, which fails without any gradient
            for parameter in self.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def forward(self, points: Tensor) -> Any:
        """Return the posterior of points (n, D): energies and responsibilities (n, K), free energy (n,)."""
        posterior = self.mixture.posterior(points.unsqueeze(0))
        return type(posterior)(*(part.squeeze(0) for part in posterior))

    def log_prob(self, points: Tensor) -> Tensor:
        """Return the log-density (n,) of points (n, D)."""
        return self.mixture.log_prob(points.unsqueeze(0)).squeeze(0)

    def on_test_epoch_end(self) -> None:
        """Log BIC and AIC of all rows."""
        total, mass, _ = global_sum(self.metrics_of("test")["log_likelihood"].sums).tolist()
        criteria = information_criteria(self.mixture, total, mass)
        self.log_dict({"test/bic": criteria.bic, "test/aic": criteria.aic}, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(rows_of(batch).points).responsibilities

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the sums of all ranks in this epoch, (ranks, sums); every rank must make the call."""
        sums: Any = self.all_gather(self.learner.sums)
        checkpoint["em_pending"] = sums.reshape(-1, len(self.learner.sums)).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of an unfinished epoch for :meth:`on_train_start`."""
        self._restored = checkpoint.get("em_pending")
