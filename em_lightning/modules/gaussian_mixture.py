"""GaussianMixtureModule: one Gaussian mixture of one large data set, by streamed or stochastic EM."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from em_lightning.checks import check_at_least, check_choice
from em_lightning.data import TableBatch
from em_lightning.distributed import global_sum
from em_lightning.metrics import MixtureLogLikelihood
from em_lightning.mixture import COVARIANCES, Mixture, MixturePrior, StreamedEM, information_criteria
from em_lightning.mixture.e_step import SufficientStatistics
from em_lightning.modules.base import EMModule
from em_lightning.operators import EMOperator
from em_lightning.operators.base import build


class GaussianMixtureModule(EMModule):
    r"""Fit one Gaussian mixture to a data set of any size, on any number of processes.

    Two methods maximize :math:`\sum_n w_n \log \sum_k \pi_k N(x_n | \mu_k, \Sigma_k)` for rows x with weights w:

    - ``"em"``: an epoch is an exact EM iteration. Each block of rows adds its sufficient statistics
      :math:`\sum_n w_n r_{nk} [1, x_n, x_n x_n^\top]` with responsibilities r. After the last block of the epoch they
      are summed over ranks, and the M-step follows.
    - ``"stochastic"``: an M-step after every block t = 0, 1, ... with statistics :math:`\hat s_t`, on running
      :math:`s \leftarrow (1 - \gamma_t) s + \gamma_t \hat s_t`, :math:`\gamma_t = (t + 1)^{-\alpha}`, for huge data.

    Responsibilities are not stored, so memory beyond a block does not depend on the number of rows. All ranks end an
    epoch with the same mixture; with ``"em"`` it does not depend on their number. A checkpoint within an epoch holds
    the statistics so far: with a loader that resumes within an epoch (:class:`~em_lightning.data.TableBlocks`) and the
    same number of ranks, a resumed run equals the uninterrupted one bitwise. ``trainer.global_step`` counts blocks.

    Args:
        num_components: K.
        num_features: D.
        covariance: type of the covariances.
        method: see above.
        init: initialization of the centers from a sample of the rows.
        sample_size: number of rows in the sample.
        num_starts: number of starts, of which the best after five iterations on the sample is kept.
        covariance_floor: added to every variance, in squared units of the data.
        tol: the run stops when the log-likelihood per point changes by less in an epoch; 0 runs all epochs.
        prior: arguments of :class:`~em_lightning.mixture.MixturePrior`, whose density is maximized with the likelihood;
            its mean and covariance default to those of the sample.
        step_exponent: :math:`\alpha` of stochastic EM, above 1/2 and at most 1.
        seed: seed of the sample and the initialization.

    Shape:
        - batch: points (n, D), or a pair of points and weights (n,).
        - ``forward(points (n, D))``: a :class:`~em_lightning.Posterior` over the K components.

    Raises:
        ValueError: an argument is out of range, or the data contain NaN, infinity or only weights of 0.

    Example:
        >>> import lightning
        >>> from em_lightning.studies import GaussianBlobs
        >>> data = GaussianBlobs(num_points=600, num_features=2, true_components=3, block_rows=256)
        >>> module = GaussianMixtureModule(num_components=3, num_features=2)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = lightning.Trainer(max_epochs=50, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(module, data)
        >>> module.mixture.means.shape, bool(module.converged)
        (torch.Size([1, 3, 2]), True)

    Source: Cappé and Moulines, On-line Expectation-Maximization Algorithm for Latent Data Models, 2009.
    """

    center: Tensor  # mean of the data, (1, D)
    variance: Tensor  # of the data, (1, D)
    log_likelihood: Tensor  # per point, of the last epoch
    change: Tensor  # of the log-likelihood, in the last epoch
    iterations: Tensor  # number of finished epochs
    started: Tensor  # whether there is an initial mixture
    sums: Tensor  # flattened statistics of this rank in this epoch
    running: Tensor  # flattened statistics s of stochastic EM
    blocks_seen: Tensor  # t of stochastic EM

    def __init__(
        self,
        num_components: int = 8,
        num_features: int = 2,
        covariance: Literal["full", "diag", "spherical", "tied"] = "full",
        method: Literal["em", "stochastic"] = "em",
        init: Literal["kmeans++", "farthest", "random"] = "kmeans++",
        sample_size: int = 2**14,
        num_starts: int = 1,
        covariance_floor: float = 1e-6,
        tol: float = 1e-3,
        prior: Mapping[str, Any] | None = None,
        step_exponent: float = 0.7,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("method", method, ("em", "stochastic"))
        check_choice("covariance", covariance, COVARIANCES)
        check_at_least(1, sample_size=sample_size)
        check_at_least(0, tol=tol)
        if not 0.5 < step_exponent <= 1:
            raise ValueError(f"step_exponent={step_exponent} must be above 0.5 and at most 1")
        if prior is not None and prior.get("learnable"):
            raise ValueError("prior={'learnable': True, ...} needs many data sets; give fixed pseudo-counts")
        self.save_hyperparameters()
        self.method = method
        self.covariance = covariance
        self.sample_size = sample_size
        self.covariance_floor = covariance_floor
        self.tol = tol
        self.step_exponent = step_exponent
        self.seed = seed
        options: dict[str, Any] = {"covariance": covariance, "covariance_floor": covariance_floor, "residual": False}
        options |= {"init": init, "seed": None if init == "farthest" else seed}  # farthest-point starts draw nothing
        options |= {"num_starts": num_starts, "num_iters": 5}  # before the best start is chosen; 5 was not measured
        self.make_operator = functools.partial(EMOperator, num_features=num_features, **options)
        self.make_operator(num_components=num_components)  # checks the arguments
        self.prior = build("prior", MixturePrior, prior)
        # Parameters, although they get no gradient: DDP refuses a module without parameters.
        ones = torch.ones(1, num_features, dtype=torch.float64)
        self.log_weights = nn.Parameter(torch.zeros(1, num_components, dtype=torch.float64).log_softmax(-1))
        self.means = nn.Parameter(ones.new_zeros(1, num_components, num_features))
        self.covariances = nn.Parameter(COVARIANCES[covariance].expand(ones, num_components).clone())
        self.register_buffer("center", torch.zeros_like(ones))
        self.register_buffer("variance", ones.clone())
        self.register_buffer("log_likelihood", ones.new_tensor(-math.inf))
        self.register_buffer("change", ones.new_tensor(math.inf))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.long))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        no_points = self._streamed.zeros(num_components).flatten()
        self.register_buffer("sums", no_points, persistent=False)  # a checkpoint has those of all ranks
        if method == "stochastic":
            self.register_buffer("running", no_points.clone())
            self.register_buffer("blocks_seen", torch.zeros((), dtype=torch.long))
        self.add_metrics(("val", "test"), log_likelihood=MixtureLogLikelihood())
        # DDP must not broadcast the buffers before every block: `sums` differ between ranks, and the others are equal.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        self._restored: Tensor | None = None  # sums of a checkpoint, until the training starts

    @property
    def mixture(self) -> Mixture:
        """The mixture of one set, in float64."""
        return Mixture(self.log_weights.detach(), self.means.detach(), self.covariances.detach())

    def _assign(self, mixture: Mixture) -> None:
        for parameter, value in zip(self.parameters(), mixture.parameters(), strict=True):
            parameter.detach().copy_(value)

    @property
    def converged(self) -> bool:
        """Whether the last epoch changed the log-likelihood per point by less than ``tol``."""
        return bool(self.change < self.tol)

    def setup(self, stage: str) -> None:
        """Use float32 on devices without float64."""
        if self.trainer.strategy.root_device.type == "mps":
            self.float()

    @torch.no_grad()
    def start_from(self, mixture: Mixture, center: Tensor | None = None, variance: Tensor | None = None) -> None:
        """Set the initial mixture, and the mean and variance (1, D) of the data, by default those of the mixture."""
        self._assign(mixture)
        self.center.copy_(mixture.mean if center is None else center)
        self.variance.copy_(mixture.variance if variance is None else variance)
        self.log_likelihood.fill_(-math.inf)
        self.change.fill_(math.inf)
        self.started.fill_(True)
        self.sums.zero_()

    def on_train_start(self) -> None:
        """Draw the initial mixture on rank 0 for all ranks; restore the statistics of a checkpoint within an epoch."""
        self.trainer.should_stop |= self.converged  # if an earlier run has converged
        if not self.started:
            start: Any = None
            if self.trainer.is_global_zero:
                rows = sample_of(self.trainer.train_dataloader, self.sample_size, self.seed, self.mixture.features)
                start = initial_mixture(rows, self.make_operator(num_components=self.mixture.components))
            self.start_from(*self.trainer.strategy.broadcast(start))
        self.sums.zero_()
        sums_of_ranks, self._restored = self._restored, None
        if sums_of_ranks is None or not self.trainer.ckpt_path or not sums_of_ranks.any():
            return  # a new run, or one from the end of an epoch
        if len(sums_of_ranks) != self.trainer.world_size:
            saved, size = f"written within an epoch by {len(sums_of_ranks)} processes", self.trainer.world_size
            raise ValueError(f"the checkpoint was {saved} and must be resumed by the same number, got {size}")
        self.sums.copy_(sums_of_ranks[self.trainer.global_rank])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Count the epoch after a resume from the last batch of an epoch, which Lightning 2.6 does not count itself."""
        progress: Any = self.trainer.fit_loop.epoch_progress
        if progress.total.ready == progress.total.processed:
            progress.increment_ready()
            progress.increment_started()

    def step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        """Learn from a block of rows, or measure it.

        The optimizer updates nothing, because the parameters have no gradient. Lightning needs it to count steps, and
        ``ModelCheckpoint`` to apply ``train_time_interval``, which it ignores under manual optimization.
        """
        rows = rows_of(batch, self.mixture.features)
        if stage == "train":
            num_blocks = self.trainer.num_training_batches  # inf if endless; a prior is then relative to a block
            return {"loss": self.learn(rows, num_blocks if math.isfinite(num_blocks) else 1)}
        log_prob = self.log_prob(rows.points)
        self.metrics_of(stage)["log_likelihood"].update(log_prob, weights=rows.weights)
        counts = torch.ones_like(log_prob) if rows.weights is None else rows.weights.to(log_prob)
        return {"loss": _loss(counts @ log_prob, counts.sum())}

    @torch.no_grad()
    def learn(self, rows: TableBatch, num_blocks: float) -> Tensor:
        """Learn from one of ``num_blocks`` blocks of an epoch, and return its negative log-likelihood per point."""
        statistics = self._streamed.e_step(rows.points, self.mixture, rows.weights)
        self.sums += statistics.flatten()
        if self.method == "stochastic":
            summed = global_sum(statistics.flatten())
            statistics = statistics.unflatten(summed)
            if statistics.mass.sum() > 0:  # skip blocks in which all rows have weight zero
                step_size = float(self.blocks_seen + 1) ** -self.step_exponent
                # The statistics of an epoch of such blocks: the prior's strength is relative to the whole data set.
                self.running.lerp_(summed * num_blocks, step_size)
                self.blocks_seen += 1
                self._maximize(statistics.unflatten(self.running))
        return _loss(statistics.log_likelihood.squeeze(0), statistics.mass.sum())

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Set the log-likelihood per point, over all ranks, and its change; for full-batch EM, run the M-step."""
        statistics = self._streamed.zeros(self.mixture.components).unflatten(global_sum(self.sums))
        mean = statistics.log_likelihood.squeeze(0) / statistics.mass.sum()
        if not torch.isfinite(mean):
            raise ValueError(f"the log-likelihood is {float(mean)}: the data have NaN, infinity or only weights of 0")
        if self.method == "em":
            self._maximize(statistics)
        self.change.copy_((mean - self.log_likelihood).abs())
        self.log_likelihood.copy_(mean)
        self.iterations += 1
        self.sums.zero_()

    @property
    def _streamed(self) -> StreamedEM:
        """EM in coordinates about the mean of the data."""
        return StreamedEM.about(self.mixture, self.center, self.variance)

    def _maximize(self, statistics: SufficientStatistics) -> None:
        options: Any = {"floor": self.covariance_floor, "prior": self.prior, "variance": self.variance}
        self._assign(self._streamed.m_step(statistics, self.mixture, **options))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Learn from a block of rows, and end the iteration after the last block of an epoch."""
        loss = super().training_step(batch, batch_idx)
        if not self.trainer.is_last_batch:
            return loss
        self.end_epoch()
        # The values are equal on all ranks; without sync_dist Lightning would warn.
        options: Any = {"on_step": False, "on_epoch": True, "batch_size": 1, "sync_dist": True}
        self.log("train/log_likelihood", self.log_likelihood, prog_bar=True, **options)
        if self.iterations > 1:  # the first change is infinite
            self.log("train/change", self.change, **options)
        self.trainer.should_stop |= self.trainer.strategy.reduce_boolean_decision(self.converged)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Do nothing: EM needs no backward pass."""
        if self.trainer.scaler is not None:  # 16-mixed precision fails if no parameter has a gradient
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
        sums = self.metrics_of("test")["log_likelihood"].sums  # of MeanOfItems: weighted sum, sum of weights, NaN
        log_likelihood, mass, _ = global_sum(sums).tolist()
        bic, aic = self.change.new_tensor(information_criteria(self.mixture, log_likelihood, mass))  # kept in float64
        self.log_dict({"test/bic": bic, "test/aic": aic}, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(rows_of(batch, self.mixture.features).points).responsibilities

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the sums of all ranks in this epoch, (ranks, sums); must be called on every rank."""
        sums: Any = self.all_gather(self.sums)
        checkpoint["em_pending"] = sums.reshape(-1, len(self.sums)).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of an unfinished epoch for :meth:`on_train_start`."""
        self._restored = checkpoint.get("em_pending")


def _loss(log_likelihood: Tensor, mass: Tensor) -> Tensor:
    """Return the negative log-likelihood per point, 0 if all weights are 0."""
    return -log_likelihood / torch.where(mass > 0, mass, 1.0)


def rows_of(batch: Any, num_features: int) -> TableBatch:
    """Return the points and weights of a batch: a tensor of points, or a sequence of points and optional weights."""
    points, weights = (batch, None) if isinstance(batch, Tensor) else (*batch, None)[:2]
    if points.shape[-1] != num_features:
        raise ValueError(f"the data have {points.shape[-1]} columns, but the module has num_features={num_features}")
    return TableBatch(points, weights)


def sample_of(loader: Any, size: int, seed: int, num_features: int) -> TableBatch:
    """Return rows of a loader, from its ``sample`` method if it has one, else the first rows."""
    if hasattr(loader, "sample"):
        return rows_of(loader.sample(size, seed), num_features)
    blocks: list[TableBatch] = []
    for batch in loader:
        blocks.append(rows_of(batch, num_features))
        if sum(len(block.points) for block in blocks) >= size:
            break
    points, weights = zip(*blocks, strict=True)
    return TableBatch(torch.cat(points)[:size], None if weights[0] is None else torch.cat(weights)[:size])


@torch.no_grad()
def initial_mixture(rows: TableBatch, operator: EMOperator) -> tuple[Mixture, Tensor, Tensor]:
    """Return the initial mixture of an operator for rows, and their mean and variances (1, D), in float64."""
    points = rows.points.cpu().double().unsqueeze(0)
    weights = torch.ones_like(points[..., 0]) if rows.weights is None else rows.weights.cpu().double().unsqueeze(0)
    mixture = operator.double().eval()(points, weights=None if rows.weights is None else weights, num_iters=0)
    share = (weights / weights.sum()).unsqueeze(-1)
    center = (share * points).sum(1)
    return mixture, center, (share * (points - center).square()).sum(1)
