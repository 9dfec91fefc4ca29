"""How one mixture learns from blocks of rows: by EM, by stochastic EM, or through an objective with gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from em_lightning.data import TableBatch
from em_lightning.distributed import global_sum
from em_lightning.mixture import COVARIANCES, Mixture, MixturePrior, Statistics, collect, maximize, no_statistics
from em_lightning.mixture.fit import marginal
from em_lightning.modules.parameters import PlainMixture, UnconstrainedMixture


class MixtureLearner(nn.Module):
    """A mixture, and what it has learned in a pass over the rows; a subclass says how it learns.

    All ranks end a pass with the same mixture. What a rank has gathered within a pass is :meth:`pending`, for a
    checkpoint.

    Args:
        num_components: K.
        num_features: D.
        covariance: a key of ``COVARIANCES``.
        floor: added to every variance.
        prior: of the parameters.
    """

    center: Tensor
    variance: Tensor
    level: Tensor
    change: Tensor
    iterations: Tensor
    started: Tensor
    own: Tensor

    parametrization: PlainMixture | UnconstrainedMixture

    def __init__(
        self, num_components: int, num_features: int, covariance: str, floor: float, prior: MixturePrior | None
    ) -> None:
        super().__init__()
        self.parametrization = PlainMixture(num_components, num_features, covariance)
        self.covariance = covariance
        self.floor = floor
        self.prior = prior
        self.shape = (1, num_components, COVARIANCES[covariance].num_moments(num_features))
        wide = torch.float64
        self.register_buffer("center", torch.zeros(1, num_features, dtype=wide))
        self.register_buffer("variance", torch.ones(1, num_features, dtype=wide))
        self.register_buffer("level", torch.tensor(-math.inf, dtype=wide))
        self.register_buffer("change", torch.tensor(math.inf, dtype=wide))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.long))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        # This rank's sums in this pass: the log-likelihood, then what else is summed. A checkpoint has those of all.
        self.register_buffer("own", torch.zeros(1 + self.num_sums(), dtype=wide), persistent=False)

    def num_sums(self) -> int:
        """Return how many sums a pass takes beside the log-likelihood: the mass of the rows."""
        return 1

    @property
    def mixture(self) -> Mixture:
        """The mixture, of one set and in double precision."""
        return self.parametrization()

    def learn(self, rows: TableBatch, blocks: float) -> Tensor:
        """Learn from a block of rows, one of so many in a pass, and return the loss: no gradient where none is needed.

        The loss is the negative log-likelihood a row of the block, or of the pass so far.
        """
        raise NotImplementedError(f"{type(self).__name__} must define learn(rows, blocks)")

    @torch.no_grad()
    def start_from(self, mixture: Mixture, center: Tensor | None = None, variance: Tensor | None = None) -> None:
        """Forget what was learned, and start from a mixture of data with this mean and these variances (1, D)."""
        mixture = Mixture(*(part.detach().to(self.center) for part in mixture))
        mean, spread = marginal(mixture)
        self.parametrization.assign(mixture)
        self.center.copy_(mean if center is None else center)
        self.variance.copy_(spread if variance is None else variance)
        self.level.fill_(-math.inf)
        self.change.fill_(math.inf)
        self.started.fill_(True)
        self.own.zero_()

    @torch.no_grad()
    def end_pass(self) -> None:
        """Take stock of a pass: its log-likelihood a row, of all ranks, and by how much that has changed."""
        level = self.summarize(global_sum(self.own))
        if not torch.isfinite(level):
            raise ValueError(f"the log-likelihood is {float(level)}: the data hold NaN or infinity, or no row counts")
        self.change.copy_((level - self.level).abs())
        self.level.copy_(level)
        self.iterations += 1
        self.own.zero_()

    def summarize(self, total: Tensor) -> Tensor:
        """Return the log-likelihood a row from the sums of all ranks."""
        return total[0] / total[1]

    def pending(self) -> Tensor:
        """Return the sums of all ranks within this pass, (ranks, sums); all of them take part."""
        rank, world = _place()
        pending = self.own.new_zeros(world, len(self.own))
        pending[rank] = self.own
        return global_sum(pending).cpu()

    def resume(self, pending: Tensor) -> None:
        """Go on within a pass whose sums so far were :meth:`pending`."""
        rank, world = _place()
        if len(pending) == world:
            self.own.copy_(pending[rank])
        elif bool(pending.any()):
            raise ValueError(
                f"the checkpoint was made within an epoch by {len(pending)} processes and this run has {world}; "
                f"resume with as many, or from the end of an epoch"
            )

    def _collect(self, rows: TableBatch, before: Statistics) -> Statistics:
        weights = None if rows.weights is None else rows.weights.to(rows.points.dtype).unsqueeze(0)
        return collect(rows.points.unsqueeze(0), self.mixture, before, weights=weights)

    def _maximize(self, statistics: Statistics) -> None:
        self.parametrization.assign(maximize(statistics, self.covariance, self.floor, self.prior, self.variance))


class FullBatchEM(MixtureLearner):
    """Exact EM: a pass sums the statistics of its blocks, and its end maximizes."""

    def num_sums(self) -> int:
        """Return the number of moments, the masses of the components among them."""
        return math.prod(self.shape)

    @torch.no_grad()
    def learn(self, rows: TableBatch, blocks: float) -> Tensor:
        """Add the statistics of a block."""
        found = self._collect(rows, self._statistics(self.own))
        torch.cat([found.log_likelihood, found.moments.flatten()], out=self.own)
        return loss_of(found.log_likelihood[0], found.moments[..., 0].sum())

    def summarize(self, total: Tensor) -> Tensor:
        """Maximize, and return the log-likelihood a row before that."""
        statistics = self._statistics(total)
        self._maximize(statistics)
        return total[0] / statistics.moments[..., 0].sum()

    def _statistics(self, sums: Tensor) -> Statistics:
        """Return the sums of a pass as statistics under the mixture, which stays as it is until the end of the pass."""
        none = no_statistics(self.mixture, self.center)
        return none._replace(log_likelihood=sums[:1], moments=sums[1:].view(self.shape))


class StochasticEM(MixtureLearner):
    r"""EM on running statistics :math:`s \leftarrow (1 - \gamma_t) s + \gamma_t \hat s_t`, a maximization a block.

    They are about one center, so components 1e6 of their widths from it are lost in double precision.

    Args:
        *common: as of :class:`MixtureLearner`.
        exponent: :math:`\alpha` of :math:`\gamma_t = (t + t_0)^{-\alpha}`.
        offset: :math:`t_0`.
    """

    running: Tensor
    blocks_seen: Tensor

    def __init__(self, *common: Any, exponent: float, offset: float) -> None:
        super().__init__(*common)
        self.exponent = exponent
        self.offset = offset
        self.register_buffer("running", torch.zeros(self.shape, dtype=torch.float64))
        self.register_buffer("blocks_seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def learn(self, rows: TableBatch, blocks: float) -> Tensor:
        """Mix the statistics of a block, of all ranks, into the running ones, and maximize."""
        found = self._collect(rows, Statistics(torch.zeros_like(self.running), self.own.new_zeros(1), self.center))
        self.own += torch.stack([found.log_likelihood[0], found.moments[..., 0].sum()])
        total = global_sum(torch.cat([found.log_likelihood, found.moments.flatten()]))
        moments = total[1:].view(self.shape)
        mass = moments[..., 0].sum()
        if mass > 0:  # a block of rows that do not count tells nothing
            share = 1.0 if self.blocks_seen == 0 else float(self.blocks_seen + self.offset) ** -self.exponent
            # In the mass of the whole data set, beside which a prior has its weight.
            self.running.lerp_(moments * blocks, share)
            self.blocks_seen += 1
            self._maximize(Statistics(self.running, self.own.new_zeros(1), self.center))
        return loss_of(total[0], mass)


class GradientAscent(MixtureLearner):
    r"""An objective for an optimizer: :math:`\log p(x)` a row, of all ranks, and the share of a row in the log-prior.

    Added up over the blocks of a pass, of equal mass, it is :math:`(\log p(X | \theta) + \log p(\theta)) / N`, whose
    maximum EM with the same prior finds.
    """

    def __init__(
        self, num_components: int, num_features: int, covariance: str, floor: float, prior: MixturePrior | None
    ) -> None:
        super().__init__(num_components, num_features, covariance, floor, prior)
        self.parametrization = UnconstrainedMixture(num_components, num_features, covariance, floor)

    def learn(self, rows: TableBatch, blocks: float) -> Tensor:
        """Return what an optimizer minimizes."""
        points, weights = rows
        with torch.autocast(points.device.type, enabled=False):
            mixture = self.mixture
            log_prob = mixture.log_prob(points.unsqueeze(0)).squeeze(0).to(self.own)
            found = sums_of(log_prob, weights)
            self.own += found.detach()
            total, mass = global_sum(found)
            if self.prior is not None:
                total = total + self.prior.log_density(mixture, self.center, self.variance)[0] / blocks
        return loss_of(total, mass)


def loss_of(log_likelihood: Tensor, mass: Tensor) -> Tensor:
    """Return the negative log-likelihood a row, 0 where no row counts."""
    return -log_likelihood / torch.where(mass > 0, mass, 1.0)


def rows_of(batch: Any) -> TableBatch:
    """Return points and weights of a batch: a tensor, or a sequence of points and perhaps weights."""
    if isinstance(batch, Tensor):
        return TableBatch(batch, None)
    return TableBatch(batch[0], batch[1] if len(batch) > 1 else None)


def sums_of(log_prob: Tensor, weights: Tensor | None) -> Tensor:
    """Return the log-likelihood and the mass of rows as one tensor (2,)."""
    if weights is None:
        return torch.stack([log_prob.sum(), log_prob.new_tensor(float(len(log_prob)))])
    weights = weights.to(log_prob)
    return torch.stack([(log_prob * weights).sum(), weights.sum()])


def sample_of(loader: Any, size: int, seed: int) -> TableBatch:
    """Return rows of a loader: those that it draws itself, or else the first."""
    if hasattr(loader, "sample"):
        return loader.sample(size, seed)
    found: list[TableBatch] = []
    for batch in loader:
        found.append(rows_of(batch))
        if sum(len(rows.points) for rows in found) >= size:
            break
    weights = [rows.weights[:size] for rows in found if rows.weights is not None]
    return TableBatch(torch.cat([rows.points for rows in found])[:size], torch.cat(weights)[:size] if weights else None)


@torch.no_grad()
def start_in(rows: TableBatch, operator: nn.Module) -> tuple[Mixture, Tensor, Tensor]:
    """Return where an operator starts in rows, and their mean and variances (1, D), in double precision."""
    points, weights = (None if part is None else part.cpu().double().unsqueeze(0) for part in rows)
    assert points is not None
    mixture = operator.double().eval()(points, weights=weights, num_iters=0)
    share = torch.ones_like(points[..., 0]) if weights is None else weights
    share = (share / share.sum()).unsqueeze(-1)
    center = (share * points).sum(1)
    return mixture, center, (share * (points - center).square()).sum(1)


def _place() -> tuple[int, int]:
    """Return the rank and the number of ranks."""
    spread = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
