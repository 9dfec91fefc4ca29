"""Kernels that are no function of a difference: cosine, dot product and learned energies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from em_lightning.kernels.base import KERNELS, Kernel, NoDensityError
from em_lightning.kernels.special import log_sphere_integral


@KERNELS.register("cosine")
class CosineKernel(Kernel):
    r"""Angular distance: only directions count.

    .. math:: d(x, \mu) = 1 - \frac{x^\top \mu}{\lVert x \rVert \, \lVert \mu \rVert}

    Energies lie in [0, 2], so no item pulls far, and assignments stay soft unless a temperature below 1 divides them
    (1 / temperature is the concentration of the distribution below). A zero vector has no direction: its cosine with
    anything is taken as 0.

    A density on the unit sphere, von Mises-Fisher's of concentration 1; over the whole space there is none.
    :meth:`log_normalizer` is the sphere's: :math:`(2 \pi)^{D/2} I_{D/2 - 1}(1) / e`, with :math:`I` the modified
    Bessel function of the first kind; for D = 1 the sum over the two points +-1.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> CosineKernel()(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))
        tensor([[0., 1., 2.]])

    Source: Banerjee et al., "Clustering on the unit hypersphere using von Mises-Fisher distributions", JMLR 6 (2005).
    """

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        return 1 - _direction(x) @ _direction(centers).mT

    def log_normalizer(self, num_features: int) -> Tensor:
        """Return the log of the integral of exp(-d) over the unit sphere, a tensor of shape ()."""
        return torch.tensor(log_sphere_integral(num_features), dtype=torch.float64)


def _direction(x: Tensor) -> Tensor:
    # A direction has no size: without its own, neither the squares nor their sum leave the range of the dtype.
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    square = x.square().sum(-1, keepdim=True)
    return x / torch.where(square > 0, square, 1).sqrt()


@KERNELS.register("dot_product")
class DotProductKernel(Kernel):
    r"""Minus the scaled inner product, the energy of attention.

    .. math:: d(x, \mu) = -a \, x^\top \mu

    with ``scale`` :math:`a`. With queries as items and keys as centers, :math:`a = D^{-1/2}` and the posterior mean of
    the values, this is scaled dot-product attention. Energies have no lower bound: long centers win wherever they
    point, and exp(-d) is **no density**.

    Args:
        scale: factor on the inner product.
        learnable: make the scale a positive parameter.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> DotProductKernel(scale=0.5)(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[-5.5000]])

    Source: Vaswani et al., "Attention is all you need", NeurIPS (2017).
    """

    def __init__(self, scale: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        self.add_positive("scale", scale, learnable)

    @property
    def scale(self) -> Tensor:
        """The factor on the inner product."""
        return self.positive_tensor("scale")

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        return (-self.positive("scale", x.dtype) * x) @ centers.mT

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        raise NoDensityError(
            "DotProductKernel has no density: exp(scale x.mu) grows without bound along the center, so its integral "
            "is infinite; on the unit sphere take 'cosine', in space 'gaussian'"
        )


@KERNELS.register("learned")
class LearnedEnergyKernel(Kernel):
    r"""Energies that a network gives, without centers.

    .. math:: d_k(x) = f_\theta(x)_k

    The hypotheses live in the network, and so does everything about tails and robustness. **No density** is claimed:
    the integral of exp(-f) is unknown, and need not be finite. Dtypes and autocast are the network's own business.

    Args:
        network: module from items (..., N, D) to energies (..., N, K).

    Shape:
        x (..., N, D) gives (..., N, K).

    Example:
        >>> kernel = LearnedEnergyKernel(nn.Linear(2, 5))
        >>> kernel(torch.zeros(3, 2)).shape
        torch.Size([3, 5])

    Source: LeCun et al., "A tutorial on energy-based learning" (2006).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network={network!r} must be a torch.nn.Module from (..., N, D) to (..., N, K)")
        self.network = network

    def forward(self, x: Tensor, centers: Tensor | None = None) -> Tensor:
        """Return the network's energies (..., N, K) of x (..., N, D).

        Raises:
            TypeError: x is no floating-point tensor.
            ValueError: centers were given, or the network's output does not have one row per item.
        """
        if centers is not None:
            raise ValueError(
                "LearnedEnergyKernel takes no centers: its hypotheses live in the network; call it with centers=None"
            )
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, not {x.dtype}; convert it with .float()")
        energies = self.network(x)
        if energies.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"the network made {tuple(energies.shape)} of x {tuple(x.shape)}; it must return (..., N, K) = "
                f"{(*x.shape[:-1], 'K')}"
            )
        return energies

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        raise NoDensityError(
            "LearnedEnergyKernel has no known density: nothing makes the integral of exp(-f(x)) finite or computable; "
            "control volume with a loss instead (VarianceLoss, DecorrelationLoss)"
        )
