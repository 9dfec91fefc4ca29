"""Kernels of a distance: Gaussian, Student-t and Mahalanobis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from em_lightning.kernels.base import KERNELS, Kernel, NoDensityError
from em_lightning.kernels.distance import few_differences, pairwise, squared_distance
from em_lightning.kernels.elliptical import EllipticalKernel, float64


@KERNELS.register("gaussian")
class GaussianKernel(EllipticalKernel):
    r"""Squared distance, the energy of an isotropic Gaussian.

    .. math:: d(x, \mu) = \frac{\lVert x - \mu \rVert^2}{2 s^2}

    where :math:`x` is an item, :math:`\mu` a center and :math:`s` the ``scale``. The penalty's pull grows without
    bound, so a single far item moves a center arbitrarily: light tails, no robustness. A density, with normalizer
    :math:`(2 \pi s^2)^{D/2}`.

    Args:
        scale: standard deviation of each feature.
        learnable: make the scale a positive parameter.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> GaussianKernel(scale=2.0)(torch.tensor([[3.0]]), torch.tensor([[1.0], [3.0]]))
        tensor([[0.5000, 0.0000]])

    Source: Bishop, *Pattern Recognition and Machine Learning* (2006), section 9.2.
    """

    def __init__(self, scale: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        self.add_positive("scale", scale, learnable)

    @property
    def scale(self) -> Tensor:
        """The standard deviation."""
        return self.positive_tensor("scale")

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        return squared_distance(x, centers) / (2 * self.positive("scale", x.dtype) ** 2)

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        return num_features * (0.5 * math.log(2 * math.pi) + self.scale.log()).reshape(())

    # The scale is redundant where the covariance is estimated, and left out there.

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        return 0.5 * squared_distance

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        return torch.ones_like(squared_distance)

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        return torch.tensor(0.5 * num_features * math.log(2 * math.pi), dtype=torch.float64)


@KERNELS.register("student_t")
class StudentTKernel(EllipticalKernel):
    r"""Logarithm of the squared distance, heavy-tailed.

    .. math:: d(x, \mu) = p \, \log\Bigl(1 + \frac{\lVert x - \mu \rVert^2}{\nu s^2}\Bigr)

    with degrees of freedom :math:`\nu` (``df``), ``scale`` :math:`s` and exponent :math:`p = 1`, or with
    ``density=True`` the exponent :math:`p = (\nu + D) / 2` of the multivariate Student-t distribution. The pull of
    an item falls as one over its distance: very robust, and far items are shared among all centers.

    exp(-d) is integrable if and only if :math:`2 p > D`, with normalizer
    :math:`(\pi \nu s^2)^{D/2} \, \Gamma(p - D/2) / \Gamma(p)`. With ``density=True`` that is always so; with
    :math:`p = 1` only for D = 1, where it is a Cauchy distribution of scale :math:`s \sqrt{\nu}`.

    Args:
        df: degrees of freedom; the smaller, the heavier the tails of the density.
        scale: length at which the logarithm sets in, over :math:`\sqrt{\nu}`.
        learnable: make both positive parameters.
        density: take the exponent that makes exp(-d) the Student-t density in any number of features.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> StudentTKernel(df=4.0)(torch.tensor([[2.0]]), torch.tensor([[0.0], [2.0]]))
        tensor([[0.6931, 0.0000]])

    Source: Peel and McLachlan, "Robust mixture modelling using the t distribution", Statistics and Computing 10 (2000).
    """

    def __init__(self, df: float = 1.0, scale: float = 1.0, learnable: bool = False, density: bool = False) -> None:
        super().__init__()
        self.density = density
        self.add_positive("df", df, learnable)
        self.add_positive("scale", scale, learnable)

    @property
    def df(self) -> Tensor:
        """The degrees of freedom."""
        return self.positive_tensor("df")

    @property
    def scale(self) -> Tensor:
        """The scale."""
        return self.positive_tensor("scale")

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        df, scale = self.positive("df", x.dtype), self.positive("scale", x.dtype)
        return self._exponent(x.shape[-1], df) * (squared_distance(x, centers) / (df * scale**2)).log1p()

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        return self._log_normalizer(num_features, self.df.reshape(()), self.scale.reshape(()))

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        df, scale = self.positive("df", torch.float64), self.positive("scale", torch.float64)
        return self._exponent(num_features, df) * (squared_distance / (df * scale**2)).log1p()

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        df, scale = self.positive("df", torch.float64), self.positive("scale", torch.float64)
        return 2 * self._exponent(num_features, df) / (df * scale**2 + squared_distance)

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        df, scale = float64(self.positive("df", torch.float64)), float64(self.positive("scale", torch.float64))
        return self._log_normalizer(num_features, df, scale)

    def _exponent(self, num_features: int, df: Tensor | float) -> Tensor | float:
        return (df + num_features) / 2 if self.density else 1.0

    def _log_normalizer(self, num_features: int, df: Tensor, scale: Tensor) -> Tensor:
        half = num_features / 2
        if not self.density and num_features >= 2:
            raise NoDensityError(
                f"StudentTKernel has no density over num_features={num_features}: exp(-d) falls as distance^-2, which "
                f"is integrable for one feature only; build it with density=True for the exponent (df + D) / 2"
            )
        exponent = torch.as_tensor(self._exponent(num_features, df), dtype=df.dtype)
        volume = half * (math.pi * df).log() + num_features * scale.log()
        return volume + torch.lgamma(exponent - half) - torch.lgamma(exponent)

    def extra_repr(self) -> str:  # noqa: D102
        return super().extra_repr() + (", density=True" if self.density else "")


@KERNELS.register("mahalanobis")
class MahalanobisKernel(Kernel):
    r"""Quadratic form of a covariance that is learned through its triangular factor.

    .. math:: d(x, \mu) = (x - \mu)^\top \Sigma^{-1} (x - \mu), \qquad \Sigma = L L^\top

    without the 1/2 of a Gaussian exponent. :math:`L` is lower triangular with a positive diagonal whatever the
    parameters are, so :math:`\Sigma` is positive definite by construction. Tails and robustness are the Gaussian's.
    A density, with normalizer :math:`\det(\pi \Sigma)^{1/2}`: that of a Gaussian of covariance :math:`\Sigma / 2`.

    Args:
        num_features: number of features D.
        covariance: initial or fixed :math:`\Sigma` (D, D), symmetric and positive definite; the identity by default.
            It is kept in the dtype it is given in.
        learnable: learn :math:`\Sigma`; ``False`` keeps it as it is given.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> kernel = MahalanobisKernel(2, covariance=torch.tensor([[4.0, 0.0], [0.0, 1.0]]), learnable=False)
        >>> kernel(torch.tensor([[2.0, 1.0]]), torch.zeros(1, 2))
        tensor([[2.]])

    Source: Mahalanobis, "On the generalised distance in statistics" (1936).
    """

    def __init__(self, num_features: int, covariance: Any = None, learnable: bool = True) -> None:
        super().__init__()
        if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
            raise ValueError(f"num_features={num_features!r} must be a positive integer")
        self.num_features = num_features
        self.register_buffer("initial_factor", _factor(num_features, covariance))
        if learnable:
            self.log_factor = nn.Parameter(torch.zeros(num_features, num_features, dtype=self.initial_factor.dtype))
        else:
            self.register_parameter("log_factor", None)

    initial_factor: Tensor
    log_factor: Tensor | None

    @property
    def factor(self) -> Tensor:
        """The lower triangular factor L (D, D), its diagonal positive."""
        if self.log_factor is None:
            return self.initial_factor
        change = self.log_factor.tril(-1) + torch.diag_embed(self.log_factor.diagonal().exp())
        return self.initial_factor @ change

    @property
    def covariance(self) -> Tensor:
        """The covariance L L^T (D, D)."""
        return self.factor @ self.factor.mT

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        if x.shape[-1] != self.num_features:
            raise ValueError(
                f"x {tuple(x.shape)} has {x.shape[-1]} features and MahalanobisKernel num_features={self.num_features}"
            )
        factor = self.factor.to(x.dtype)
        if few_differences(x, centers):
            apart = pairwise(x, centers)
            return _whiten(factor, apart.flatten(0, -2)).square().sum(-1).view(apart.shape[:-1])
        # Once per item and center, since whitening is linear. It mixes features, so the digits of what lies far from
        # zero would go: they are seen from a place among the centers.
        origin = centers.detach().median(-2, keepdim=True).values
        return squared_distance(_whiten(factor, x - origin), _whiten(factor, centers - origin))

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        if num_features != self.num_features:
            raise ValueError(f"num_features={num_features}, but the covariance has {self.num_features} features")
        return 0.5 * num_features * math.log(math.pi) + self.factor.diagonal().log().sum()

    def extra_repr(self) -> str:  # noqa: D102
        return f"num_features={self.num_features}, learnable={self.log_factor is not None}"


def _whiten(factor: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT


def _factor(num_features: int, covariance: Any) -> Tensor:
    if covariance is None:
        return torch.eye(num_features)
    covariance = torch.as_tensor(covariance)
    if covariance.shape != (num_features, num_features):
        raise ValueError(
            f"covariance has shape {tuple(covariance.shape)}; num_features={num_features} needs "
            f"({num_features}, {num_features})"
        )
    if not covariance.is_floating_point():
        covariance = covariance.to(torch.get_default_dtype())
    factor, failed = torch.linalg.cholesky_ex(covariance.detach())
    if failed or not torch.allclose(covariance, covariance.mT):
        raise ValueError(f"covariance={covariance.tolist()} must be symmetric and positive definite")
    return factor
