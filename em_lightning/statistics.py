"""Statistics: summaries of a posterior that a layer returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from em_lightning.competition import Posterior
from em_lightning.registry import Registry


class Statistic(nn.Module):
    """Base class of the summaries of a posterior; a subclass defines :meth:`forward`.

    Example:
        >>> from em_lightning.competition import softmin
        >>> posterior, values = softmin(torch.tensor([1.0, 1.0])), torch.tensor([2.0, 4.0])
        >>> Responsibilities()(posterior), Mean()(posterior, values), Variance()(posterior, values)
        (tensor([0.5000, 0.5000]), tensor(3.), tensor(1.))
    """

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        """Return the statistic of a posterior.

        Args:
            posterior: posterior over K hypotheses on axis ``dim``.
            values: one number (K,), or one vector of length V (..., K, V), per hypothesis, for statistics of values.
            dim: axis of the hypotheses.

        Raises:
            ValueError: values are needed, but None, or their number differs from that of the hypotheses.
        """
        raise NotImplementedError


STATISTICS: Registry[Statistic] = Registry("statistic", "statistics", nn.Module)


def _required(values: Tensor | None, statistic: str) -> Tensor:
    if values is None:
        raise ValueError(f"values=None: the statistic {statistic!r} needs values of shape (K,) or (..., K, V)")
    return values


@STATISTICS.register("responsibilities")
class Responsibilities(Statistic):
    """The responsibilities r, shape (..., K)."""

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        return posterior.responsibilities


@STATISTICS.register("mean")
class Mean(Statistic):
    """The posterior mean sum_k r_k v_k of values v: values (K,) give (...), values (..., K, V) give (..., V)."""

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        return posterior.mean(_required(values, "mean"), dim)


@STATISTICS.register("variance")
class Variance(Statistic):
    """The posterior variance sum_k r_k (v_k - mean)^2; shapes as in :class:`Mean`."""

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        return posterior.variance(_required(values, "variance"), dim)


@STATISTICS.register("entropy")
class Entropy(Statistic):
    """The entropy -sum_k r_k log r_k in nats, shape (...)."""

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        return posterior.entropy(dim)


@STATISTICS.register("mode")
class Mode(Statistic):
    """Index of the most probable hypothesis, (...), or its value if values are given; energies get no gradient."""

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        if values is None:
            return posterior.mode(dim)
        hard = torch.zeros_like(posterior.responsibilities).scatter(dim, posterior.mode(dim).unsqueeze(dim), 1.0)
        return posterior._replace(responsibilities=hard).mean(values, dim)


@STATISTICS.register("log_responsibilities")
class LogResponsibilities(Statistic):
    """The log-responsibilities log r_k, shape (..., K), bounded below by the log of the smallest normal number."""

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        r = posterior.responsibilities
        return r.clamp_min(torch.finfo(r.dtype).tiny).log()


@STATISTICS.register("neg_log_responsibilities")
class NegLogResponsibilities(Statistic):
    """The energies d minus the free energy F, d_k - F (..., K).

    For softmin with temperature T and prior pi it is -T log r_k + T log pi_k. For T = 1 without prior this is -log r_k,
    computed as d_k + logsumexp(-d), exact for energies of any size. It is positive if F is below the lowest energy.

    Source: Oursland, 2026, github.com/alanoursland/implicit_em_in_neural_activations (supervised_study).
    """

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        energies, free = posterior.energies, posterior.free_energy
        if free.ndim < energies.ndim:
            return energies - free.unsqueeze(dim)
        # One free energy per group of neighbouring hypotheses.
        return energies - free.repeat_interleave(energies.shape[dim] // free.shape[dim], dim)
