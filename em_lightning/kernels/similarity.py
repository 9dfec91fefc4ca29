"""Kernels that are not functions of a difference: cosine, dot product and learned energies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from em_lightning.kernels.base import KERNELS, Kernel
from em_lightning.kernels.distance import unit_vectors


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
        # Power series of I (Abramowitz and Stegun 9.6.10). Its terms are at most 2^-k / k!: 19 suffice in float64.
        order = num_features / 2 - 1
        term, total = 1.0, 0.0
        for k in range(1, 20):
            total += term
            term *= 0.25 / (k * (order + k))
        log_bessel = -order * math.log(2) - math.lgamma(order + 1) + math.log(total)
        return torch.tensor(0.5 * num_features * math.log(2 * math.pi) + log_bessel - 1, dtype=torch.float64)


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
