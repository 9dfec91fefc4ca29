"""Kernels of a distance: Gaussian, Student-t and Mahalanobis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.checks import check_at_least
from em_lightning.kernels.base import KERNELS, EllipticalKernel, Kernel
from em_lightning.kernels.distance import squared_distance


@KERNELS.register("gaussian")
class GaussianKernel(EllipticalKernel):
    r"""Squared distance, the energy of an isotropic Gaussian.

    .. math:: d(x, \mu) = \frac{\lVert x - \mu \rVert^2}{2 s^2}

    with ``scale`` :math:`s`, the standard deviation of each feature. Not robust: the gradient is unbounded. exp(-d) is
    a density with normalizer :math:`(2 \pi s^2)^{D/2}`.

    Example:
        >>> GaussianKernel(scale=2.0)(torch.tensor([[3.0]]), torch.tensor([[1.0], [3.0]]))
        tensor([[0.5000, 0.0000]])

    Source: Bishop, *Pattern Recognition and Machine Learning* (2006), section 9.2.
    """

    def __init__(self, scale: float = 1.0, learnable: bool = False) -> None:
        super().__init__(learnable, scale=scale)

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        return squared_distance(x, centers) / (2 * self.positive("scale", x.dtype) ** 2)

    def log_normalizer(self, num_features: int) -> Tensor:
        return num_features * (0.5 * math.log(2 * math.pi) + self.scale.log())

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:
        return 0.5 * squared_distance  # without the scale, which an estimated covariance replaces, see EllipticalKernel

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:
        return torch.ones_like(squared_distance)

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:
        return torch.tensor(0.5 * num_features * math.log(2 * math.pi), dtype=torch.float64)


@KERNELS.register("student_t")
class StudentTKernel(EllipticalKernel):
    r"""Logarithm of the squared distance, heavy-tailed.

    .. math:: d(x, \mu) = p \, \log\Bigl(1 + \frac{\lVert x - \mu \rVert^2}{\nu s^2}\Bigr)

    with exponent :math:`p = 1`, or with ``density=True`` :math:`p = (\nu + D) / 2`, that of the multivariate Student-t
    distribution. Very robust: the gradient decreases as 1 / distance.

    exp(-d) is integrable if :math:`2 p > D`, with normalizer
    :math:`(\pi \nu s^2)^{D/2} \, \Gamma(p - D/2) / \Gamma(p)`. This always holds with ``density=True``, and for
    :math:`p = 1` only if D = 1, a Cauchy distribution of scale :math:`s \sqrt{\nu}`.

    Args:
        df: degrees of freedom :math:`\nu`; the smaller, the heavier the tails of the density.
        scale: length scale :math:`s` of the distance.
        density: use the exponent of the Student-t density in any number of features.

    Example:
        >>> StudentTKernel(df=4.0)(torch.tensor([[2.0]]), torch.tensor([[0.0], [2.0]]))
        tensor([[0.6931, 0.0000]])

    Source: Peel and McLachlan, "Robust mixture modelling using the t distribution", Statistics and Computing 10 (2000).
    """

    no_density = "exp(-d) decreases as distance^-2, so its integral is infinite for D > 1; use density=True"

    def __init__(self, df: float = 1.0, scale: float = 1.0, learnable: bool = False, density: bool = False) -> None:
        super().__init__(learnable, df=df, scale=scale)
        self.density = density

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        return self.rho(squared_distance(x, centers), x.shape[-1])

    def log_normalizer(self, num_features: int) -> Tensor:
        if not self.density and num_features >= 2:
            return Kernel.log_normalizer(self, num_features)  # raises NoDensityError
        df, half = self.df, num_features / 2
        exponent = torch.as_tensor(self._exponent(df, num_features), dtype=df.dtype)
        log_power = half * (math.pi * df).log() + num_features * self.scale.log()  # of pi nu s^2
        return log_power + torch.lgamma(exponent - half) - torch.lgamma(exponent)

    elliptical_log_normalizer = log_normalizer

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:
        df, scale = (self.positive(name, squared_distance.dtype) for name in ("df", "scale"))
        return self._exponent(df, num_features) * (squared_distance / (df * scale**2)).log1p()

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:
        df, scale = (self.positive(name, squared_distance.dtype) for name in ("df", "scale"))
        return 2 * self._exponent(df, num_features) / (df * scale**2 + squared_distance)

    def _exponent(self, df: Tensor | float, num_features: int) -> Tensor | float:
        return (df + num_features) / 2 if self.density else 1.0


@KERNELS.register("mahalanobis")
class MahalanobisKernel(Kernel):
    r"""Squared Mahalanobis distance of a covariance that is learned through its Cholesky factor.

    .. math:: d(x, \mu) = (x - \mu)^\top \Sigma^{-1} (x - \mu), \qquad \Sigma = L L^\top

    without the 1/2 of a Gaussian exponent; :math:`L` is lower triangular with positive diagonal. Not robust. exp(-d) is
    a Gaussian density of covariance :math:`\Sigma / 2` with normalizer :math:`\det(\pi \Sigma)^{1/2}`.

    Args:
        num_features: number of features D.
        covariance: initial or fixed :math:`\Sigma` (D, D), positive definite, by default the identity; keeps its dtype.
        learnable: learn :math:`\Sigma`; ``True`` by default, unlike in other kernels.

    Example:
        >>> kernel = MahalanobisKernel(2, covariance=torch.tensor([[4.0, 0.0], [0.0, 1.0]]), learnable=False)
        >>> kernel(torch.tensor([[2.0, 1.0]]), torch.zeros(1, 2))
        tensor([[2.]])

    Source: Mahalanobis, "On the generalised distance in statistics" (1936).
    """

    def __init__(self, num_features: int, covariance: Any = None, learnable: bool = True) -> None:
        super().__init__()
        check_at_least(1, num_features=num_features)
        covariance = torch.eye(num_features) if covariance is None else torch.as_tensor(covariance)
        if covariance.shape != (num_features, num_features):
            raise ValueError(f"covariance {tuple(covariance.shape)} must have shape ({num_features}, {num_features})")
        if not covariance.is_floating_point():
            covariance = covariance.to(torch.get_default_dtype())
        factor, failed = torch.linalg.cholesky_ex(covariance.detach())
        if failed or not torch.allclose(covariance, covariance.mT):
            raise ValueError(f"covariance={covariance.tolist()} must be symmetric and positive definite")
        self.num_features = num_features
        self.register_buffer("initial_factor", factor)
        # The factor C of L = initial_factor C: its entries below the diagonal, and the logarithms of those on it.
        self.log_factor = nn.Parameter(torch.zeros_like(factor)) if learnable else None

    @property
    def factor(self) -> Tensor:
        """The lower triangular factor L (D, D) with positive diagonal."""
        if self.log_factor is None:
            return self.initial_factor
        return self.initial_factor @ (self.log_factor.tril(-1) + self.log_factor.diagonal().exp().diag_embed())

    @property
    def covariance(self) -> Tensor:
        return self.factor @ self.factor.mT

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        if x.shape[-1] != self.num_features:
            raise ValueError(f"x {tuple(x.shape)} must have num_features={self.num_features} on its last axis")
        return squared_distance(x, centers, self.factor.to(x.dtype))

    def log_normalizer(self, num_features: int) -> Tensor:
        if num_features != self.num_features:
            raise ValueError(f"num_features={num_features} must be that of the kernel, {self.num_features}")
        return 0.5 * num_features * math.log(math.pi) + self.factor.diagonal().log().sum()

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, learnable={self.log_factor is not None}"
