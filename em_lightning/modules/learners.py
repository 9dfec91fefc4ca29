"""Learners of one mixture from blocks of rows: full-batch EM, stochastic EM, gradient ascent."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.data import TableBatch
from em_lightning.distributed import global_sum
from em_lightning.mixture import Mixture, MixturePrior, StreamedEM, SufficientStatistics
from em_lightning.modules.parameters import PlainMixture, UnconstrainedMixture


class MixtureLearner(nn.Module):
    """Base class: a mixture and the sums of a pass over the rows; a subclass defines :meth:`learn`.

    All ranks end a pass with the same mixture. ``floor`` is added to every variance.
    """

    center: Tensor
    variance: Tensor
    log_likelihood: Tensor
    change: Tensor
    iterations: Tensor
    started: Tensor
    sums: Tensor

    def __init__(
        self, parametrization: PlainMixture | UnconstrainedMixture, floor: float, prior: MixturePrior | None
    ) -> None:
        super().__init__()
        self.parametrization = parametrization
        self.floor = floor
        self.prior = prior
        features, wide = self.mixture.features, torch.float64
        self.register_buffer("center", torch.zeros(1, features, dtype=wide))
        self.register_buffer("variance", torch.ones(1, features, dtype=wide))
        self.register_buffer("log_likelihood", torch.tensor(-math.inf, dtype=wide))
        self.register_buffer("change", torch.tensor(math.inf, dtype=wide))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.long))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        # This rank's sums in this pass. Not persistent: a checkpoint has those of all ranks.
        self.register_buffer("sums", torch.zeros(self.num_sums(), dtype=wide), persistent=False)

    def num_sums(self) -> int:
        """Return the number of sums: by default the log-likelihood and the weights of the rows."""
        return 2

    @property
    def mixture(self) -> Mixture:
        """The mixture of one set, in float64."""
        return self.parametrization()

    def learn(self, rows: TableBatch, num_blocks: float) -> Tensor:
        """Learn from one of ``num_blocks`` blocks of a pass, and return its negative log-likelihood per row."""
        raise NotImplementedError(f"{type(self).__name__} must define learn(rows, num_blocks)")

    @torch.no_grad()
    def start_from(self, mixture: Mixture, center: Tensor | None = None, variance: Tensor | None = None) -> None:
        """Reset, and set the mixture and the mean and variances (1, D) of the data, by default those of the mixture."""
        mixture = mixture.map(lambda part: part.detach().to(self.center))
        self.parametrization.assign(mixture)
        self.center.copy_(mixture.mean if center is None else center)
        self.variance.copy_(mixture.variance if variance is None else variance)
        self.log_likelihood.fill_(-math.inf)
        self.change.fill_(math.inf)
        self.started.fill_(True)
        self.sums.zero_()

    @torch.no_grad()
    def end_pass(self) -> None:
        """End a pass: set its log-likelihood per row, over all ranks, and the change since the last pass."""
        mean = self.summarize(global_sum(self.sums))
        if not torch.isfinite(mean):
            raise ValueError(
                f"the log-likelihood is {float(mean)}: the data contain NaN, infinity or only weights of 0"
            )
        self.change.copy_((mean - self.log_likelihood).abs())
        self.log_likelihood.copy_(mean)
        self.iterations += 1
        self.sums.zero_()

    def summarize(self, total: Tensor) -> Tensor:
        """Return the log-likelihood per row from the sums of all ranks."""
        return total[0] / total[1]

    @property
    def streamed(self) -> StreamedEM:
        """EM in coordinates about the mean of the data."""
        return StreamedEM.about(self.mixture, self.center, self.variance)

    @property
    def no_rows(self) -> SufficientStatistics:
        """The sufficient statistics of no rows."""
        mixture = self.mixture
        return StreamedEM.about(mixture).zeros(mixture.components)

    def maximize(self, statistics: SufficientStatistics) -> None:
        """Run the M-step."""
        after = self.streamed.m_step(statistics, self.mixture, self.floor, self.prior, self.variance)
        self.parametrization.assign(after)


class FullBatchEM(MixtureLearner):
    """Exact EM: a pass sums the sufficient statistics of its blocks and ends with an M-step."""

    def num_sums(self) -> int:
        return self.no_rows.flatten().numel()

    @torch.no_grad()
    def learn(self, rows: TableBatch, num_blocks: float) -> Tensor:
        block = self.streamed.e_step(rows.points, self.mixture, rows.weights)
        self.sums += block.flatten()
        return loss_of(block.log_likelihood[0], block.mass.sum())

    def summarize(self, total: Tensor) -> Tensor:
        """Maximize, and return the log-likelihood per row before that."""
        statistics = self.no_rows.unflatten(total)
        self.maximize(statistics)
        return statistics.log_likelihood[0] / statistics.mass.sum()


class StochasticEM(MixtureLearner):
    r"""EM on running statistics :math:`s \leftarrow (1 - \gamma_t) s + \gamma_t \hat s_t`, one M-step per block.

    :math:`\gamma_t = (t + t_0)^{-\alpha}` with the exponent :math:`\alpha` and the offset :math:`t_0`.
    """

    running: Tensor
    blocks_seen: Tensor

    def __init__(self, *common: Any, exponent: float, offset: float) -> None:
        super().__init__(*common)
        self.exponent = exponent
        self.offset = offset
        self.register_buffer("running", torch.zeros_like(self.no_rows.flatten()))
        self.register_buffer("blocks_seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def learn(self, rows: TableBatch, num_blocks: float) -> Tensor:
        block = self.streamed.e_step(rows.points, self.mixture, rows.weights)
        self.sums += torch.stack([block.log_likelihood[0], block.mass.sum()])
        flat = global_sum(block.flatten())
        total = block.unflatten(flat)
        mass = total.mass.sum()
        if mass > 0:  # a block whose rows all have weight zero changes nothing
            share = 1.0 if self.blocks_seen == 0 else float(self.blocks_seen + self.offset) ** -self.exponent
            # A prior's strength is relative to the mass of the whole data set.
            self.running.lerp_(flat * num_blocks, share)
            self.blocks_seen += 1
            self.maximize(total.unflatten(self.running))
        return loss_of(total.log_likelihood[0], mass)


class GradientAscent(MixtureLearner):
    r"""An objective for an optimizer: the log-likelihood per row, over all ranks, plus a share of the log-prior.

    The mean over the blocks of a pass is :math:`(\log p(X | \theta) + \log p(\theta)) / N`, if blocks have equal
    weight; EM with the same prior has the same maximum.
    """

    def learn(self, rows: TableBatch, num_blocks: float) -> Tensor:
        points, weights = rows
        mixture = self.mixture
        log_prob = mixture.log_prob(points.unsqueeze(0)).squeeze(0).to(self.sums)
        counts = torch.ones_like(log_prob) if weights is None else weights.to(log_prob)
        block = torch.stack([counts @ log_prob, counts.sum(), (counts > 0).sum()])
        self.sums += block[:2].detach()
        total, mass, number = global_sum(block)
        if self.prior is not None:  # relative to the number of rows, as in EM: a common factor of weights has no effect
            share = self.prior.log_density(mixture, self.center, self.variance)[0] / num_blocks
            total = total + share * mass / number.clamp(min=1)
        return loss_of(total, mass)


def loss_of(log_likelihood: Tensor, mass: Tensor) -> Tensor:
    """Return the negative log-likelihood per row, 0 if all weights are 0."""
    return -log_likelihood / torch.where(mass > 0, mass, 1.0)


def rows_of(batch: Any) -> TableBatch:
    """Return the points and weights of a batch: a tensor of points, or a sequence of points and optional weights."""
    if isinstance(batch, Tensor):
        return TableBatch(batch, None)
    return TableBatch(batch[0], batch[1] if len(batch) > 1 else None)


def sample_of(loader: Any, size: int, seed: int) -> TableBatch:
    """Return rows of a loader, from its ``sample`` method if it has one, else the first rows."""
    if hasattr(loader, "sample"):
        return loader.sample(size, seed)
    blocks: list[TableBatch] = []
    for batch in loader:
        blocks.append(rows_of(batch))
        if sum(len(block.points) for block in blocks) >= size:
            break
    points, weights = zip(*blocks, strict=True)
    return TableBatch(torch.cat(points)[:size], None if weights[0] is None else torch.cat(weights)[:size])


@torch.no_grad()
def initial_mixture(rows: TableBatch, operator: nn.Module) -> tuple[Mixture, Tensor, Tensor]:
    """Return the initial mixture of an operator for rows, and their mean and variances (1, D), in float64."""
    points = rows.points.cpu().double().unsqueeze(0)
    weights = torch.ones_like(points[..., 0]) if rows.weights is None else rows.weights.cpu().double().unsqueeze(0)
    mixture = operator.double().eval()(points, weights=None if rows.weights is None else weights, num_iters=0)
    share = (weights / weights.sum()).unsqueeze(-1)
    center = (share * points).sum(1)
    return mixture, center, (share * (points - center).square()).sum(1)
