"""The terms: free energy and volume control, each a scalar of a batch of energies.

Letters: N items (every axis but that of the units), D units. The energies of a layer are its post-activation outputs:
low energy wins. Batch statistics are those of the global batch under any distributed strategy that averages gradients
over its ranks, and the gradients are those of a single process; every rank must make the call. All terms are computed
in float32 or better and returned so, under autocast too.

Where the square of a deviation from the mean is beyond the range of that dtype (in float32 from 1.8e19 on), a variance
is infinite and so is its logarithm, correlations and determinants are NaN: a training that diverges is not told a
finite loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from em_lightning.distributed import Moments, batch_mean, batch_moments, flatten_units, free_energy_of, global_sum
from em_lightning.registry import Registry

__all__ = [
    "LOSSES",
    "BalanceLoss",
    "BoundedVarianceLoss",
    "DecorrelationLoss",
    "EnergyLoss",
    "FreeEnergyLoss",
    "LogDetLoss",
    "MomentLoss",
    "VarianceLoss",
    "WeightRedundancyLoss",
    "weight_redundancy",
]

LOSSES: Registry[nn.Module] = Registry("loss", "losses", nn.Module)


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} is out of range; give a positive number such as 1.0")
    return float(value)


class EnergyLoss(nn.Module):
    """A scalar loss of a batch of energies: what a plug-in subclasses, and files under a key in ``LOSSES``.

    Args:
        dim: the axis of the units; every other axis counts items.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, energies: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the loss of the global batch: a scalar.

        Args:
            energies: any shape with D units along ``dim``.
            mask: booleans of that shape without ``dim``; items that are False do not count.
            weights: non-negative numbers of the same shape; a weight w counts an item w times.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Show the settings, and the axis where it is not the last."""
        return ", ".join([*self._shown(), *([] if self.dim == -1 else [f"dim={self.dim}"])])

    def _shown(self) -> list[str]:
        return []


class MomentLoss(EnergyLoss):
    """A loss of the batch moments alone; ``EMLoss`` computes these once for all such terms.

    Attributes:
        products: whether it reads covariance, correlation or redundancy, so that they are taken with the variance.
    """

    products = False

    def forward(self, energies: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the loss of the global batch: a scalar."""
        return self.from_moments(batch_moments(energies, self.dim, mask, weights, products=self.products))

    def from_moments(self, moments: Moments) -> Tensor:
        """Return the loss, given the moments of the global batch."""
        raise NotImplementedError


@LOSSES.register("free_energy")
class FreeEnergyLoss(EnergyLoss):
    r"""Free energy of the softmin over the units, :math:`\sum_n F_n`, :math:`F_n = -T \log \sum_j \exp(-d_{nj} / T)`.

    Its gradient in the energies is the responsibilities: backpropagation is the E-step. Alone it collapses.

    Args:
        reduction: "sum" over the items of the global batch, or their "mean". The two weigh the term differently against
            volume control, and are different experiments.
        temperature: T, positive.
        dim: the axis of the units.

    Raises:
        ValueError: ``reduction`` is neither "sum" nor "mean", or ``temperature`` is not positive.

    Example:
        >>> FreeEnergyLoss()(torch.zeros(3, 4)) / 3 == -torch.tensor(4.0).log()
        tensor(True)

    Oursland, arXiv 2601.06478.
    """

    def __init__(self, reduction: str = "sum", temperature: float = 1.0, dim: int = -1) -> None:
        super().__init__(dim)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} is unknown; give 'sum' or 'mean' (different experiments)")
        self.reduction = reduction
        self.temperature = _positive("temperature", temperature)

    def forward(self, energies: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the summed or mean free energy of the global batch: a scalar."""
        items, counts = flatten_units(energies, self.dim, mask, weights)
        return self.reduce(free_energy_of(items, self.temperature), counts)

    def reduce(self, free_energy: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the sum or mean over the global batch of free energies (N,), by their counts (N,)."""
        if self.reduction == "mean":
            return batch_mean(free_energy, counts)
        return global_sum((free_energy if counts is None else free_energy * counts).sum())

    def _shown(self) -> list[str]:
        return [f"reduction={self.reduction!r}, temperature={self.temperature}"]


@LOSSES.register("variance")
class VarianceLoss(MomentLoss):
    r"""The published term against dead units, :math:`-\sum_j \log(\mathrm{Var}(d_j) + \epsilon)`.

    The variance is unbiased; that of fewer than two items is 0, without a gradient. The term falls without limit when
    the energies are scaled: see ``BoundedVarianceLoss``.

    Args:
        eps: keeps the logarithm finite at a constant unit.
        dim: the axis of the units.

    Example:
        >>> VarianceLoss()(torch.tensor([[0.0], [2.0]])) == -torch.tensor(2.0 + 1e-6).log()
        tensor(True)

    Oursland, arXiv 2601.06478.
    """

    def __init__(self, eps: float = 1e-6, dim: int = -1) -> None:
        super().__init__(dim)
        self.eps = _positive("eps", eps)

    def from_moments(self, moments: Moments) -> Tensor:
        """Return the loss, given the moments of the global batch."""
        return -(moments.variance + self.eps).log().sum()


@LOSSES.register("bounded_variance")
class BoundedVarianceLoss(MomentLoss):
    r"""A term against dead units, never below 0: :math:`\sum_j \log(1 + \tau / (\mathrm{Var}(d_j) + \epsilon))`.

    It is the softplus of log target minus log variance. Far below the target, value and gradient are those of
    ``VarianceLoss`` (up to the constant :math:`D \log \tau`), so a dying unit is rescued as strongly; far above, the
    gradient vanishes as :math:`\tau / \mathrm{Var}^2`, so nothing is gained by scaling. A hinge on the standard
    deviation (VICReg) is bounded too, but its pull on a dying unit is finite and loses against a summed free energy.

    Args:
        target: the variance tau above which spread no longer pays. The softmin at temperature T tells energies apart
            that differ by about T, so T^2 is its natural unit; hence 1.
        eps: keeps the logarithm finite at a constant unit.
        dim: the axis of the units.

    Raises:
        ValueError: ``target`` or ``eps`` is not positive.

    Example:
        >>> loss = BoundedVarianceLoss(target=2.0)
        >>> loss(torch.tensor([[0.0], [2.0]])), loss(torch.tensor([[0.0], [2e4]])) >= 0
        (tensor(0.6931), tensor(True))
    """

    def __init__(self, target: float = 1.0, eps: float = 1e-6, dim: int = -1) -> None:
        super().__init__(dim)
        self.target = _positive("target", target)
        self.eps = _positive("eps", eps)

    def from_moments(self, moments: Moments) -> Tensor:
        """Return the loss, given the moments of the global batch."""
        return torch.log1p(self.target / (moments.variance + self.eps)).sum()

    def _shown(self) -> list[str]:
        return [f"target={self.target}"]


@LOSSES.register("decorrelation")
class DecorrelationLoss(MomentLoss):
    r"""The term against redundant units, :math:`\sum_{i \ne j} \mathrm{Corr}(d_i, d_j)^2`.

    The correlation is the unbiased covariance over :math:`(\sigma_i + \epsilon)(\sigma_j + \epsilon)`, with unbiased
    standard deviations, so a constant unit adds nothing.

    Args:
        eps: added to the standard deviations.
        dim: the axis of the units.

    Example:
        >>> DecorrelationLoss()(torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 5.0]])).round(decimals=4)
        tensor(2.)

    Oursland, arXiv 2601.06478.
    """

    products = True

    def __init__(self, eps: float = 1e-8, dim: int = -1) -> None:
        super().__init__(dim)
        self.eps = _positive("eps", eps)

    def from_moments(self, moments: Moments) -> Tensor:
        """Return the loss, given the moments of the global batch."""
        return moments.redundancy(self.eps)


@LOSSES.register("log_det")
class LogDetLoss(MomentLoss):
    r"""The full volume term, :math:`-\log\det(\mathrm{Cov}(d) + \epsilon I)`, or that of the correlation.

    With R the correlation, :math:`-\log\det\mathrm{Cov} = -\sum_j \log\mathrm{Var}_j - \log\det R`. The last term is at
    least 0 (Hadamard), and :math:`\frac12 \sum_{i \ne j} R_{ij}^2` to second order. So this loss bounds the variance
    term from above, holds variance and decorrelation in one, and half of it bounds the negative entropy of the energies
    from below up to a constant, as no distribution of that covariance has more entropy than the Gaussian.

    Args:
        of: "covariance", which like the variance term falls without limit under scaling; or "correlation", which is
            at least 0, ignores scale, and leaves out constant units.
        eps: added to the diagonal. With fewer items than units the matrix is singular and eps decides the value.
        dim: the axis of the units.

    Raises:
        ValueError: ``of`` is neither, or ``eps`` is not positive.

    Example:
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> LogDetLoss(of="correlation")(corners).abs() < 1e-6
        tensor(True)
    """

    products = True

    def __init__(self, of: str = "covariance", eps: float = 1e-6, dim: int = -1) -> None:
        super().__init__(dim)
        if of not in ("covariance", "correlation"):
            raise ValueError(f"of={of!r} is unknown; give 'covariance' or 'correlation'")
        self.of = of
        self.eps = _positive("eps", eps)

    def from_moments(self, moments: Moments) -> Tensor:
        """Return the loss, given the moments of the global batch."""
        if self.of == "covariance":
            matrix, scale = moments.covariance(), 1.0
        else:
            matrix = moments.correlation()
            matrix, scale = matrix - torch.diag(matrix.diagonal() - 1.0), 1.0 + self.eps
        # Eigenvalues, as rounding may leave a singular matrix indefinite and a Cholesky factor would not exist.
        # In float64 where the device has it: near a loss of 0 the logarithms cancel to the last digits of float32.
        wide = matrix if matrix.device.type == "mps" else matrix.double()
        spectrum = torch.linalg.eigvalsh(wide).clamp_min(0.0)
        return -((spectrum + self.eps) / scale).log().sum().to(matrix.dtype)

    def _shown(self) -> list[str]:
        return [f"of={self.of!r}"]


@LOSSES.register("balance")
class BalanceLoss(EnergyLoss):
    r"""The term against unused units, :math:`\mathrm{KL}(\bar r \,\|\, \mathrm{uniform}) = \log D - H(\bar r)`.

    :math:`\bar r` is the mean responsibility over the global batch. From 0 (all units carry equal shares) to log D.

    Args:
        temperature: of the softmin that gives the responsibilities.
        dim: the axis of the units.

    Raises:
        ValueError: ``temperature`` is not positive.

    Example:
        >>> BalanceLoss()(torch.tensor([[0.0, 50.0], [50.0, 0.0]])).abs() < 1e-6
        tensor(True)
    """

    def __init__(self, temperature: float = 1.0, dim: int = -1) -> None:
        super().__init__(dim)
        self.temperature = _positive("temperature", temperature)

    def forward(self, energies: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return the divergence for the global batch: a scalar."""
        items, counts = flatten_units(energies, self.dim, mask, weights)
        mean = batch_mean(torch.softmax(-items / self.temperature, dim=-1), counts)
        # The entropy's slope is infinite at a share of 0, where that of the share itself is 0.
        return math.log(items.shape[1]) - torch.special.entr(mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum()

    def _shown(self) -> list[str]:
        return [f"temperature={self.temperature}"]


@LOSSES.register("weight_redundancy")
class WeightRedundancyLoss(nn.Module):
    r"""The term against units of the same weights, :math:`\sum_{i \ne j} \cos^2(w_i, w_j)` over the rows of a matrix.

    Example:
        >>> WeightRedundancyLoss()(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        tensor(2.)
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum over ordered pairs of different rows of ``weight`` (D, ...): a scalar."""
        return weight_redundancy(weight)


def weight_redundancy(weight: Tensor) -> Tensor:
    r"""Return the sum of squared cosines between different rows, :math:`\sum_{i \ne j} \cos^2(w_i, w_j)`.

    Args:
        weight: a matrix (D, ...) whose rows belong to the units; further axes are flattened. A row of zeros is at a
            right angle to every other.

    Raises:
        ValueError: ``weight`` has no rows and columns.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; give a matrix with one row for each unit")
    with torch.autocast(weight.device.type, enabled=False):
        rows = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        if rows.numel():  # in units of the largest, whose square may lie outside the range of the dtype
            largest = rows.detach().abs().amax(1, keepdim=True)
            rows = F.normalize(rows / torch.where(largest > 0, largest, 1.0), dim=1)
        return 2 * (rows @ rows.T).triu(1).square().sum()
