"""Metrics of mixtures and posteriors: log-likelihood, entropy, maximum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from em_lightning.metrics.base import MeanOfItems


class MixtureLogLikelihood(MeanOfItems):
    r"""Weighted mean log-likelihood per point, :math:`\sum_{bn} w_{bn} \log p(x_{bn}) / \sum_{bn} w_{bn}`, in nats.

    Example:
        >>> metric = MixtureLogLikelihood()
        >>> metric.update(torch.tensor([[-1.0, -3.0, 0.0]]), mask=torch.tensor([[True, True, False]]))
        >>> metric.compute().item()
        -2.0
    """

    higher_is_better = True

    def update(self, log_prob: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add log-likelihoods, such as (B, N) from ``Mixture.log_prob``; mask and weights have the same shape."""
        self._add(log_prob, mask, weights)


class ResponsibilityEntropy(MeanOfItems):
    r"""Mean entropy of the responsibilities of an item, :math:`H(r) = -\sum_k r_k \log r_k`, in nats.

    Args:
        from_energies: whether ``update`` takes energies d instead of responsibilities, which are then softmax(-d).

    Example:
        >>> metric = ResponsibilityEntropy()
        >>> metric.update(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        >>> round(metric.compute().item(), 4)
        0.3466
    """

    def __init__(self, from_energies: bool = False, dim: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.from_energies = from_energies
        self.dim = dim

    def update(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Add items: responsibilities or energies with K components along ``dim``, and a mask of the other axes."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        self._add(self._statistic(torch.softmax(-values, self.dim) if self.from_energies else values), mask)

    def _statistic(self, responsibilities: Tensor) -> Tensor:
        logarithms = responsibilities.clamp_min(torch.finfo(responsibilities.dtype).tiny).log()
        return -(responsibilities * logarithms).sum(self.dim)  # takes a third of the time of entr()


class MaxResponsibility(ResponsibilityEntropy):
    r"""Mean largest responsibility of an item, :math:`\max_k r_k`: from 1/K (uniform) to 1 (a hard assignment).

    Arguments are those of :class:`ResponsibilityEntropy`.

    Example:
        >>> metric = MaxResponsibility(from_energies=True)
        >>> metric.update(torch.zeros(3, 4))
        >>> metric.compute().item()
        0.25
    """

    def _statistic(self, responsibilities: Tensor) -> Tensor:
        return responsibilities.amax(self.dim)
