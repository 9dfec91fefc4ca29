"""The loss terms: free energy and volume control, each a scalar function of a batch of energies or a weight matrix.

Letters: N items (all axes but that of the units), D units, d_nj the energy of item n and unit j. Energies are the
post-activation outputs of a layer: low energy wins. Batch statistics are those of the global batch under any
distributed strategy that averages gradients over its ranks, and gradients equal those of a single process; call losses
on every rank. Terms are computed in float32 or float64, even under autocast. A diverging run reports inf or NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from em_lightning.checks import check_choice, positive_number
from em_lightning.competition import softmin
from em_lightning.distributed import Moments, accumulation_dtype, batch_mean, batch_moments, flatten_units, global_sum
from em_lightning.kernels import unit_vectors
from em_lightning.registry import Registry

LOSSES: Registry[nn.Module] = Registry("loss", "losses", nn.Module)


class EnergyLoss(nn.Module):
    """Base class of scalar losses of energies with units on axis ``dim``; register a subclass in ``LOSSES``."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, energies: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the loss of the global batch: a scalar.

        Args:
            energies: any shape with D units along ``dim``.
            mask: booleans of that shape without ``dim``; False items do not count.
            weights: non-negative numbers of the same shape; an item of weight w counts w times.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        hidden = {"training"} if self.dim != -1 else {"training", "dim"}
        shown = {name: value for name, value in vars(self).items() if name[0] != "_" and name not in hidden}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class MomentLoss(EnergyLoss):
    """Base class of losses that depend on batch moments only; ``EMLoss`` computes the moments once for all of them."""

    def __init__(self, eps: float = 1e-6, dim: int = -1) -> None:
        super().__init__(dim)
        self.eps = positive_number("eps", eps)

    def forward(self, energies: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.from_moments(batch_moments(energies, self.dim, mask, weights))

    def from_moments(self, moments: Moments) -> Tensor:
        """Return the loss for the moments of the global batch: a scalar."""
        raise NotImplementedError


@LOSSES.register("free_energy")
class FreeEnergyLoss(EnergyLoss):
    r"""Free energy of the softmin over the units, :math:`\sum_n F_n`, :math:`F_n = -T \log \sum_j \exp(-d_{nj} / T)`.

    Its gradient with respect to the energies equals the responsibilities: backpropagation is the E-step. Without
    volume control, training collapses.

    ``reduction`` is "sum" or "mean" over the items of the global batch, ``temperature`` is T.

    Example:
        >>> FreeEnergyLoss()(torch.zeros(3, 4)) / 3 == -torch.tensor(4.0).log()
        tensor(True)

    Source: Oursland, arXiv 2601.06478.
    """

    def __init__(self, reduction: str = "sum", temperature: float = 1.0, dim: int = -1) -> None:
        super().__init__(dim)
        check_choice("reduction", reduction, ("sum", "mean"))
        self.reduction = reduction
        self.temperature = positive_number("temperature", temperature)

    def forward(self, energies: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        items, weights = flatten_units(energies, self.dim, mask, weights)
        free_energy = softmin(items, self.temperature).free_energy
        if self.reduction == "mean":
            return batch_mean(free_energy, weights)
        return global_sum((free_energy if weights is None else free_energy * weights).sum())


@LOSSES.register("variance")
class VarianceLoss(MomentLoss):
    r"""The term of arXiv 2601.06478 against dead units, :math:`-\sum_j \log(\mathrm{Var}(d_j) + \epsilon)`.

    The variance is unbiased; for fewer than two items it is 0 with gradient 0. ``eps`` :math:`\epsilon` keeps the
    logarithm of a constant unit finite. Scaling up the energies decreases the term without bound;
    ``BoundedVarianceLoss`` is bounded.

    Example:
        >>> VarianceLoss()(torch.tensor([[0.0], [2.0]])) == -torch.tensor(2.0 + 1e-6).log()
        tensor(True)
    """

    def from_moments(self, moments: Moments) -> Tensor:
        return -(moments.variance + self.eps).log().sum()


@LOSSES.register("bounded_variance")
class BoundedVarianceLoss(MomentLoss):
    r"""A non-negative term against dead units, :math:`\sum_j \log(1 + \tau / (\mathrm{Var}(d_j) + \epsilon))`.

    ``target`` :math:`\tau` is the variance above which the term becomes flat, such as the square of the temperature.
    Far below it, the gradient equals that of ``VarianceLoss``, and the value differs by the constant
    :math:`D \log \tau`. Far above, the gradient vanishes as :math:`\tau / \mathrm{Var}^2`: scaling up is useless.

    Example:
        >>> loss = BoundedVarianceLoss(target=2.0)
        >>> loss(torch.tensor([[0.0], [2.0]])), loss(torch.tensor([[0.0], [2e4]])) >= 0
        (tensor(0.6931), tensor(True))
    """

    def __init__(self, target: float = 1.0, eps: float = 1e-6, dim: int = -1) -> None:
        super().__init__(eps, dim)
        self.target = positive_number("target", target)

    def from_moments(self, moments: Moments) -> Tensor:
        return torch.log1p(self.target / (moments.variance + self.eps)).sum()


@LOSSES.register("decorrelation")
class DecorrelationLoss(MomentLoss):
    r"""The term of arXiv 2601.06478 against redundant units, :math:`\sum_{i \ne j} \mathrm{Corr}(d_i, d_j)^2`.

    The correlation is the unbiased covariance over :math:`(\sigma_i + \epsilon)(\sigma_j + \epsilon)`, with unbiased
    standard deviations :math:`\sigma` and ``eps`` :math:`\epsilon`, 1e-8 as published. A constant unit contributes 0.

    Example:
        >>> DecorrelationLoss()(torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 5.0]])).round(decimals=4)
        tensor(2.)
    """

    def __init__(self, eps: float = 1e-8, dim: int = -1) -> None:
        super().__init__(eps, dim)

    def from_moments(self, moments: Moments) -> Tensor:
        return moments.redundancy(self.eps)


@LOSSES.register("log_det")
class LogDetLoss(MomentLoss):
    r"""The full volume term, :math:`-\log\det(\mathrm{Cov}(d) + \epsilon I)`.

    With correlations R, :math:`-\log\det\mathrm{Cov} = -\sum_j \log\mathrm{Var}_j - \log\det R`. To second order,
    :math:`-\log\det R = \frac12 \sum_{i \ne j} R_{ij}^2`. The loss therefore combines variance and decorrelation.

    ``eps`` is added to the diagonal. With no more items than units the matrix is singular and eps determines the value.

    Example:
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> LogDetLoss()(corners)  # -2 log(4 / 3)
        tensor(-0.5754)
    """

    def from_moments(self, moments: Moments) -> Tensor:
        matrix = moments.covariance()
        # Eigenvalues, as Cholesky fails if round-off makes a matrix indefinite; float32 would make small ones inexact.
        spectrum = torch.linalg.eigvalsh(matrix.to(accumulation_dtype(matrix))).clamp_min(0.0)
        return -(spectrum + self.eps).log().sum().to(matrix.dtype)


@LOSSES.register("balance")
class BalanceLoss(EnergyLoss):
    r"""The term against unused units, :math:`\mathrm{KL}(\bar r \,\|\, \mathrm{uniform}) = \log D - H(\bar r)`.

    :math:`\bar r` is the mean over the global batch of the responsibilities of a softmin with ``temperature``, and H
    the entropy. The loss ranges from 0 (equal shares) to log D.

    Example:
        >>> BalanceLoss()(torch.tensor([[0.0, 50.0], [50.0, 0.0]])).abs() < 1e-6
        tensor(True)
    """

    def __init__(self, temperature: float = 1.0, dim: int = -1) -> None:
        super().__init__(dim)
        self.temperature = positive_number("temperature", temperature)

    def forward(self, energies: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        items, weights = flatten_units(energies, self.dim, mask, weights)
        mean = batch_mean(torch.softmax(-items / self.temperature, dim=-1), weights)
        # The derivative of the entropy is infinite at a share of 0.
        return math.log(items.shape[1]) - torch.special.entr(mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum()


@LOSSES.register("weight_redundancy")
class WeightRedundancyLoss(nn.Module):
    r"""The term against units with similar weights, :math:`\sum_{i \ne j} \cos^2(w_i, w_j)` over rows w of a matrix.

    Example:
        >>> WeightRedundancyLoss()(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        tensor(2.)
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum over ordered pairs of different rows of a weight (D, ...); the cosine with a zero row is 0."""
        if weight.dim() < 2:
            raise ValueError(f"weight of shape {tuple(weight.shape)} must be a matrix with one row per unit")
        with torch.autocast(weight.device.type, enabled=False):
            rows = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
            rows = unit_vectors(rows) if rows.numel() else rows  # an empty tensor has no largest entry
            return 2 * (rows @ rows.T).triu(1).square().sum()
