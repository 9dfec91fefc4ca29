"""Metrics of the units of a layer: active and dead units, smallest variance, redundancy, effective rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from em_lightning.metrics.base import MeanOfItems, UnitMoments
from em_lightning.metrics.mixtures import MaxResponsibility, ResponsibilityEntropy


class L0(MeanOfItems):
    r"""Mean number per item of units j with activation :math:`a_j >` ``threshold``, which is 0.01 in arXiv 2601.06478.

    Example:
        >>> metric = L0()
        >>> metric.update(torch.tensor([[0.0, 0.5, 2.0], [0.0, 0.0, 0.001]]))
        >>> metric.compute().item()
        1.0
    """

    def __init__(self, threshold: float = 0.01, dim: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        self.dim = dim

    def update(self, activations: Tensor, mask: Tensor | None = None) -> None:
        """Add items: activations with D units along ``dim``, and a mask of the shape of the other axes."""
        self._add((activations > self.threshold).sum(self.dim), mask)


class DeadUnits(UnitMoments):
    r"""Number of units with :math:`\mathrm{Var}(a_j) <` ``threshold``, with the unbiased variance over all items.

    Args:
        threshold: the variance below which a unit is dead, 0.01 in arXiv 2601.06478; a constant unit is always dead.
        relative: whether the threshold is a fraction of the mean variance of the units, to compare different scales.

    Example:
        >>> metric = DeadUnits()
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
        >>> metric.compute().item()
        1.0
    """

    higher_is_better = False

    def __init__(self, threshold: float = 0.01, dim: int = -1, relative: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.threshold = threshold
        self.relative = relative

    def _statistic(self, covariance: Tensor) -> Tensor:
        variance = covariance.diagonal()
        threshold = self.threshold * variance.mean() if self.relative else self.threshold
        return ((variance < threshold) | (variance == 0)).sum().to(self.moments.dtype)


class MinVariance(UnitMoments):
    r"""Smallest variance of a unit, :math:`\min_j \mathrm{Var}(a_j)`, unbiased and over all items.

    Example:
        >>> metric = MinVariance()
        >>> metric.update(torch.tensor([[0.0, 1.0], [1.0, 3.0]]))
        >>> metric.compute().item()
        0.5
    """

    higher_is_better = True

    def _statistic(self, covariance: Tensor) -> Tensor:
        return covariance.diagonal().amin()


class Redundancy(UnitMoments):
    r"""Sum of squared correlations between units, :math:`\sum_{i \ne j} \mathrm{Corr}(a_i, a_j)^2`, over all items.

    1e-8 is added to the standard deviations in the denominator, so that constant units have correlation 0.

    Example:
        >>> metric = Redundancy()
        >>> metric.update(torch.tensor([[0.0, 1.0, 5.0], [1.0, 3.0, 5.0]]))
        >>> round(metric.compute().item(), 6)
        2.0
    """

    higher_is_better = False

    def _statistic(self, covariance: Tensor) -> Tensor:
        std = covariance.diagonal().sqrt() + 1e-8
        return (covariance / std / std[:, None]).square().fill_diagonal_(0.0).sum()


class EffectiveRank(UnitMoments):
    r"""Effective rank of the units' covariance, :math:`\exp H(p)`: from 1 to D, or 0 if all units are constant.

    H is the entropy, and p are the eigenvalues of the covariance divided by their sum.

    Example:
        >>> metric = EffectiveRank()
        >>> metric.update(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]))
        >>> round(metric.compute().item(), 6)
        2.0

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """

    higher_is_better = True

    def _statistic(self, covariance: Tensor) -> Tensor:
        spectrum = torch.linalg.eigvalsh(covariance).clamp_min(0.0)
        total = spectrum.sum()
        return torch.special.entr(spectrum / total).sum().exp() if total > 0 else torch.zeros_like(total)


def layer_metrics(dim: int = -1, **kwargs: Any) -> MetricCollection:
    """Return the metrics of a competitive layer, to be updated with its energies.

    ``l0`` counts units whose energy is above 0.01: the nonzero outputs of a ReLU, but not winners, whose energies are
    low. The metrics of moments share one state. Other arguments: see :class:`torchmetrics.MetricCollection`.

    Example:
        >>> metrics = layer_metrics()
        >>> metrics.update(torch.rand(20, 4))
        >>> sorted(metrics.compute())
        ['dead_units', 'effective_rank', 'entropy', 'l0', 'max_responsibility', 'min_variance', 'redundancy']
    """
    of_moments: dict[str, Any] = {
        "dead_units": DeadUnits(dim=dim),
        "min_variance": MinVariance(dim=dim),
        "redundancy": Redundancy(dim=dim),
        "effective_rank": EffectiveRank(dim=dim),
    }
    means: dict[str, Any] = {
        "entropy": ResponsibilityEntropy(from_energies=True, dim=dim),
        "max_responsibility": MaxResponsibility(from_energies=True, dim=dim),
        "l0": L0(dim=dim),
    }
    return MetricCollection(
        {**of_moments, **means}, compute_groups=[list(of_moments), *([name] for name in means)], **kwargs
    )
