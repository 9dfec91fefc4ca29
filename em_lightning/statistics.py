"""Posterior summaries: what flows forward from a competition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from em_lightning.competition import Posterior
from em_lightning.registry import Registry


class Statistic(nn.Module):
    """Base class of the summaries of a posterior: a subclass defines :meth:`forward`."""

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        """Summarize the posterior.

        Args:
            posterior: of K hypotheses on axis ``dim``.
            values: one number (K,) or one vector (..., K, V) a hypothesis, for the statistics that weigh values.
            dim: the hypothesis axis.
        """
        raise NotImplementedError


STATISTICS: Registry[Statistic] = Registry("statistic", "statistics", nn.Module)


def _given(values: Tensor | None, statistic: str) -> Tensor:
    if values is None:
        raise ValueError(f"values=None: the {statistic} weighs values; give one number (K,) or vector (..., K, V) each")
    return values


@STATISTICS.register("responsibilities")
class Responsibilities(Statistic):
    """The responsibilities r themselves, shape (..., K).

    Example:
        >>> from em_lightning.competition import softmin
        >>> Responsibilities()(softmin(torch.tensor([1.0, 1.0])))
        tensor([0.5000, 0.5000])
    """

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        """Return r; ``values`` are not used."""
        return posterior.responsibilities


@STATISTICS.register("mean")
class Mean(Statistic):
    """The posterior mean sum_k r_k v_k: values (K,) give (...), values (..., K, V) give (..., V).

    Raises:
        ValueError: ``values`` are left out or have another number of hypotheses.

    Example:
        >>> from em_lightning.competition import softmin
        >>> Mean()(softmin(torch.tensor([1.0, 1.0])), torch.tensor([2.0, 4.0]))
        tensor(3.)
    """

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        """Return the mean of the values."""
        return posterior.mean(_given(values, "mean"), dim)


@STATISTICS.register("variance")
class Variance(Statistic):
    """The posterior variance sum_k r_k (v_k - mean)^2; shapes as in :class:`Mean`.

    Raises:
        ValueError: ``values`` are left out or have another number of hypotheses.

    Example:
        >>> from em_lightning.competition import softmin
        >>> Variance()(softmin(torch.tensor([1.0, 1.0])), torch.tensor([2.0, 4.0]))
        tensor(1.)
    """

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        """Return the variance of the values."""
        return posterior.variance(_given(values, "variance"), dim)


@STATISTICS.register("entropy")
class Entropy(Statistic):
    """The entropy -sum_k r_k log r_k in nats, shape (...).

    Example:
        >>> from em_lightning.competition import softmin
        >>> Entropy()(softmin(torch.tensor([1.0, 1.0])))
        tensor(0.6931)
    """

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        """Return the entropy; ``values`` are not used."""
        return posterior.entropy(dim)


@STATISTICS.register("mode")
class Mode(Statistic):
    """The index of the most responsible hypothesis, shape (...), or its value: no gradient flows to the energies.

    Example:
        >>> from em_lightning.competition import softmin
        >>> posterior = softmin(torch.tensor([3.0, 1.0]))
        >>> Mode()(posterior), Mode()(posterior, torch.tensor([-1.0, 7.0]))
        (tensor(1), tensor(7.))
    """

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        """Return the index, or the value there where ``values`` are given."""
        if values is None:
            return posterior.mode(dim)
        hard = torch.zeros_like(posterior.responsibilities.detach())
        hard = hard.scatter(dim, posterior.mode(dim).unsqueeze(dim), 1.0)
        return posterior._replace(responsibilities=hard).mean(values, dim)


@STATISTICS.register("log_responsibilities")
class LogResponsibilities(Statistic):
    """The logarithm log r_k, shape (..., K), not below that of the smallest normal number (-87.3 in float32).

    Example:
        >>> from em_lightning.competition import softmin
        >>> LogResponsibilities()(softmin(torch.tensor([1.0, 1.0, torch.inf])))
        tensor([ -0.6931,  -0.6931, -87.3365])
    """

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        """Return log r; ``values`` are not used."""
        r = posterior.responsibilities
        return r.clamp_min(torch.finfo(r.dtype).tiny).log()


@STATISTICS.register("neg_log_responsibilities")
class NegLogResponsibilities(Statistic):
    """The excess energy d_k - F, shape (..., K): by softmin d + logsumexp(-d), which is -log r at temperature 1.

    In general -T log r_k + T log pi_k by softmin, exact at any size, and positive for every operator without a prior
    whose free energy lies below its lowest energy.

    Example:
        >>> from em_lightning.competition import softmin
        >>> NegLogResponsibilities()(softmin(torch.tensor([1.0, 1.0, 900.0])))
        tensor([6.9315e-01, 6.9315e-01, 8.9969e+02])

    Source: Oursland, the neg-log-softmin activation of the supervised study of implicit EM.
    """

    def forward(self, posterior: Posterior, values: Tensor | None = None, dim: int = -1) -> Tensor:
        """Return d - F; ``values`` are not used."""
        energies, free = posterior.energies, posterior.free_energy
        if free.ndim < energies.ndim:
            return energies - free.unsqueeze(dim)
        # One free energy a group of neighbours.
        return energies - free.repeat_interleave(energies.shape[dim] // free.shape[dim], dim)
