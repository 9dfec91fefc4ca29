"""Kernels that are not functions of a difference: cosine, dot product and learned energies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from em_lightning.kernels.base import KERNELS, Kernel
from em_lightning.kernels.distance import unit_vectors

# The recurrence of Bessel ratios starts this many orders above the result, for a relative error below 1e-12.
_ORDERS = 20


@KERNELS.register("cosine")
class CosineKernel(Kernel):
    r"""Cosine distance, which ignores the norms of items and centers.

    .. math:: d(x, \mu) = 1 - \frac{x^\top \mu}{\lVert x \rVert \, \lVert \mu \rVert}

    Energies are in [0, 2], and 1 for a zero vector. 1 / temperature is a concentration of von Mises-Fisher components.

    exp(-d) is a density on the unit sphere only: von Mises-Fisher with concentration 1 and normalizer
    :math:`(2 \pi)^{D/2} I_{D/2 - 1}(1) / e`, where :math:`I` is the modified Bessel function of the first kind. For
    D = 1, the normalizer is the sum over the points -1 and 1.

    Example:
        >>> CosineKernel()(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))
        tensor([[0., 1., 2.]])

    Source: Banerjee et al., "Clustering on the unit hypersphere using von Mises-Fisher distributions", JMLR 6 (2005).
    """

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        return 1 - unit_vectors(x) @ unit_vectors(centers).mT

    def log_normalizer(self, num_features: int) -> Tensor:
        """Return the log of the integral of exp(-d) over the unit sphere, a tensor of shape ()."""
        concentration = torch.ones((), dtype=torch.float64)
        return von_mises_fisher_normalizer(concentration, num_features)[0] - concentration


@KERNELS.register("dot_product")
class DotProductKernel(Kernel):
    r"""Minus the scaled inner product, the energy of attention.

    .. math:: d(x, \mu) = -a \, x^\top \mu

    with ``scale`` :math:`a`. With queries as items, keys as centers, :math:`a = D^{-1/2}` and the posterior mean of the
    values, this is scaled dot-product attention. Energies are unbounded below, and exp(-d) is **not a density**.

    Example:
        >>> DotProductKernel(scale=0.5)(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[-5.5000]])

    Source: Vaswani et al., "Attention is all you need", NeurIPS (2017).
    """

    no_density = "exp(scale x.mu) is unbounded along the center, so its integral is infinite"

    def __init__(self, scale: float = 1.0, learnable: bool = False) -> None:
        super().__init__(learnable, scale=scale)

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        return (-self.positive("scale", x.dtype) * x) @ centers.mT


@KERNELS.register("learned")
class LearnedEnergyKernel(Kernel):
    r"""Energies computed by a network, without centers.

    .. math:: d_k(x) = f_\theta(x)_k

    with the module ``network`` :math:`f_\theta` from items (..., N, D) to energies (..., N, K). **Not a density**: the
    integral of exp(-f) is unknown and may be infinite.

    Example:
        >>> kernel = LearnedEnergyKernel(nn.Linear(2, 5))
        >>> kernel(torch.zeros(3, 2)).shape
        torch.Size([3, 5])

    Source: LeCun et al., "A tutorial on energy-based learning" (2006).
    """

    no_density = "the integral of exp(-f(x)) is unknown; use a volume-control loss (VarianceLoss, DecorrelationLoss)"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network={network!r} must be a torch.nn.Module from (..., N, D) to (..., N, K)")
        self.network = network

    def forward(self, x: Tensor, centers: Tensor | None = None) -> Tensor:
        """Return the network's energies (..., N, K) of x (..., N, D)."""
        if centers is not None:
            raise ValueError("centers must be None: the hypotheses of LearnedEnergyKernel are outputs of its network")
        energies = self.network(x)
        if energies.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"the network must return (..., N, K) for x {tuple(x.shape)}, not {tuple(energies.shape)}")
        return energies


def von_mises_fisher_normalizer(concentration: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """Return ``-log C_D(kappa)`` and its derivative ``R_{D/2-1}(kappa)``, the mean resultant length.

    At x = kappa, ratios ``R_v = I_{v+1} / I_v`` follow downwards in v (stable): ``1 / R_v = R_{v+1} + 2 (v + 1) / x``.
    The first, at a large v, is ``y - v / x`` with ``y = I_v' / I_v = s / x - c x / s^2`` and ``s^2 = v^2 + x^2``. Equal
    powers of 1/s in ``y' = 1 + v^2 / x^2 - y / x - y^2`` give c, a series in 1/s with polynomials in ``q = x^2 / s^2``.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, 9.6.26 (recurrence), 9.7.7 and 9.7.9.
    """
    order, x = 0.5 * num_features - 1.0, concentration
    if num_features % 2:
        lowest_order = -0.5  # I_(-1/2)(x) = sqrt(2 / (pi x)) cosh(x); for D = 1, R = tanh(x)
        log_bessel = torch.log1p((-2.0 * x).exp()) + x - 0.5 * (2.0 * math.pi * x).log()
    else:
        lowest_order = 0.0
        log_bessel = torch.special.i0e(x).log() + x
    count = round(order - lowest_order)  # of ratios that multiply the lowest Bessel function
    v = order + _ORDERS
    s = (v**2 + x.square()).sqrt()
    q = (x / s).square()
    p2, p3 = (15.0 * q - 18.0) * q + 4.0, ((1105.0 * q - 1768.0) * q + 752.0) * q - 64.0
    c = 0.5 + ((5.0 * q - 4.0) + (p2 + p3 / (16.0 * s)) / s) / (8.0 * s)  # up to 1 / s^3
    ratio = (s - v) / x - c * x / s.square()
    for step in range(count + _ORDERS, 0, -1):
        ratio = (ratio + 2.0 * (lowest_order + step) / x).reciprocal()  # of the order lowest_order + step - 1
        if step == count + 1:
            resultant = ratio
        elif step <= count:
            log_bessel = log_bessel + ratio.log()
    return 0.5 * num_features * math.log(2.0 * math.pi) + log_bessel - order * x.log(), resultant
