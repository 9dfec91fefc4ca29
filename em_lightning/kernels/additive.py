"""Kernels that add one energy per feature: Laplace, logistic, Huber, pseudo-Huber and exponential.

In mixtures, Laplace, Huber and pseudo-Huber apply one feature's energy to a Mahalanobis distance, see EllipticalKernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from em_lightning.kernels.base import KERNELS, EllipticalKernel, Kernel
from em_lightning.kernels.distance import pairwise

_LARGEST_EXPONENT = 40.0  # exp(40) = 2.4e17; float32 can sum 6,000 squares of it, as in the norm of a gradient
_EXPONENTIAL_INTEGRAL = 0.21938393439552027  # E_1(1), the integral of exp(-exp(u)) over u > 0
_LAPLACE_CORE = 1e-4  # distance, in scales, below which Laplace's rho is a parabola: IRLS weights are at most 1e4


@KERNELS.register("laplace")
class LaplaceKernel(EllipticalKernel):
    r"""Absolute distance, the energy of Laplace noise.

    .. math:: d(x, \mu) = \sum_{i=1}^{D} \frac{|x_i - \mu_i|}{b}

    with ``scale`` :math:`b`, the mean absolute deviation of each feature. Robust: the best center is the median. At
    :math:`x_i = \mu_i` the gradient is 0. exp(-d) is a density with normalizer :math:`(2 b)^D`.

    Example:
        >>> LaplaceKernel(scale=2.0)(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2))
        tensor([[2.]])

    Source: Laplace, "Mémoire sur la probabilité des causes par les événements" (1774).
    """

    def __init__(self, scale: float = 1.0, learnable: bool = False) -> None:
        super().__init__(learnable, scale=scale)

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        return pairwise(x, centers).abs().sum(-1) / self.positive("scale", x.dtype)

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:
        scaled = squared_distance / self.positive("scale", squared_distance.dtype) ** 2
        return _huber_rho(scaled, _LAPLACE_CORE) / _LAPLACE_CORE + 0.5 * _LAPLACE_CORE  # the distance, outside the core

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:
        variance = self.positive("scale", squared_distance.dtype) ** 2
        return _huber_irls_weight(squared_distance / variance, _LAPLACE_CORE) / (_LAPLACE_CORE * variance)

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:
        # The area of the sphere times the integral of r^(D-1) exp(-r); the parabola changes it by less than 1e-8.
        return _log_unit_sphere_area(num_features) + math.lgamma(num_features) + num_features * self.scale.log()


@KERNELS.register("logistic")
class LogisticKernel(Kernel):
    r"""Softplus of a signed distance: linear below the center, zero far above it.

    .. math:: d(x, \mu) = \sum_{i=1}^{D} \log\bigl(1 + e^{-\alpha (x_i - \mu_i)}\bigr)

    with ``slope`` :math:`\alpha`, the largest gradient. exp(-d), a product of sigmoids, is **not a density**.

    Example:
        >>> LogisticKernel()(torch.tensor([[0.0]]), torch.tensor([[0.0], [100.0]]))
        tensor([[  0.6931, 100.0000]])

    Source: Cox, "The regression analysis of binary sequences", JRSS B 20 (1958).
    """

    no_density = "exp(-d) tends to 1 above the center, so its integral is infinite"

    def __init__(self, slope: float = 1.0, learnable: bool = False) -> None:
        super().__init__(learnable, slope=slope)

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        # Not functional.softplus, which is linear above a threshold, with an error of 2e-9.
        return -functional.logsigmoid(self.positive("slope", x.dtype) * pairwise(x, centers)).sum(-1)


@KERNELS.register("huber")
class HuberKernel(EllipticalKernel):
    r"""Quadratic near the center, linear in the tails.

    .. math::
        d(x, \mu) = \sum_{i=1}^{D} \begin{cases}
            z_i^2 / 2 & |z_i| \le \delta \\ \delta (|z_i| - \delta / 2) & |z_i| > \delta
        \end{cases}, \qquad z = x - \mu

    with ``delta`` :math:`\delta`, the largest gradient. Robust. exp(-d) is a density with normalizer
    :math:`\bigl(\sqrt{2 \pi} \operatorname{erf}(\delta / \sqrt 2) + \tfrac{2}{\delta} e^{-\delta^2 / 2}\bigr)^D`.

    Example:
        >>> HuberKernel(delta=1.0)(torch.tensor([[0.5], [3.0]]), torch.zeros(1, 1))
        tensor([[0.1250],
                [2.5000]])

    Source: Huber, "Robust estimation of a location parameter", Annals of Mathematical Statistics 35 (1964).
    """

    def __init__(self, delta: float = 1.0, learnable: bool = False) -> None:
        super().__init__(learnable, delta=delta)

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        delta = self.positive("delta", x.dtype)
        z = pairwise(x, centers)
        size = z.abs()
        return torch.where(size <= delta, 0.5 * z.square(), delta * (size - 0.5 * delta)).sum(-1)

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:
        return _huber_rho(squared_distance, self.positive("delta", squared_distance.dtype))

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:
        return _huber_irls_weight(squared_distance, self.positive("delta", squared_distance.dtype))

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:
        # The integral of r^(D-1) exp(-r^2 / 2) up to delta, an incomplete gamma function, plus that of
        # r^(D-1) exp(s / 2 - delta r) above delta, (D-1)! exp(-s / 2) s^(-D/2) sum_{j<D} s^j / j!, with s = delta^2.
        half, s = 0.5 * num_features, self.delta**2
        log_middle = torch.special.gammainc(torch.full_like(s, half), 0.5 * s).log()
        log_middle = log_middle + (half - 1.0) * math.log(2.0) + math.lgamma(half)
        j = torch.arange(num_features, dtype=s.dtype, device=s.device)
        log_sum = (j * s.log() - torch.lgamma(j + 1.0)).logsumexp(0)
        log_tail = log_sum + math.lgamma(num_features) - 0.5 * s - half * s.log()
        return _log_unit_sphere_area(num_features) + torch.logaddexp(log_middle, log_tail)


@KERNELS.register("pseudo_huber")
class PseudoHuberKernel(EllipticalKernel):
    r"""Smooth Huber: quadratic near the center, linear in the tails, infinitely differentiable.

    .. math:: d(x, \mu) = \sum_{i=1}^{D} \delta^2 \left(\sqrt{1 + (z_i / \delta)^2} - 1\right), \qquad z = x - \mu

    with ``delta`` :math:`\delta`, the slope of the tails. Robust, like Huber. exp(-d) is the density of a symmetric
    hyperbolic distribution with normalizer :math:`\bigl(2 \delta e^{\delta^2} K_1(\delta^2)\bigr)^D`, where :math:`K_1`
    is the modified Bessel function of the second kind.

    Example:
        >>> PseudoHuberKernel(delta=4.0)(torch.tensor([[3.0]]), torch.zeros(1, 1))
        tensor([[4.]])

    Source: Charbonnier et al., "Deterministic edge-preserving regularization in computed imaging", IEEE TIP 6 (1997);
    the distribution: Barndorff-Nielsen, Proceedings of the Royal Society A 353 (1977).
    """

    def __init__(self, delta: float = 1.0, learnable: bool = False) -> None:
        super().__init__(learnable, delta=delta)

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        # This form avoids cancellation near the center and overflow far from it.
        z = pairwise(x, centers)
        ratio = z / self.positive("delta", x.dtype)
        return (z * (z / (1 + torch.hypot(ratio, torch.ones_like(ratio))))).sum(-1)

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:
        return squared_distance / (1.0 + self._root(squared_distance))

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:
        return self._root(squared_distance).reciprocal()

    def _root(self, squared_distance: Tensor) -> Tensor:
        return (1.0 + squared_distance / self.positive("delta", squared_distance.dtype) ** 2).sqrt()

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:
        # The integral of r^D exp(-rho(r^2)) over log r, by the trapezoidal rule from 40 D^-1/2 below the maximum to
        # 10 D^-1/2 above it, in steps of .02 D^-1/2. Error below 1e-12 for D = 1 to 300 and delta = .01 to 100.
        ratio = (num_features / self.delta.detach()).square()  # the grid is a constant in the derivative
        log_mode = 0.5 * ((0.25 * ratio.square() + num_features**2).sqrt() + 0.5 * ratio).log()  # r d(rho) / dr = D
        step = 0.02 / math.sqrt(num_features)
        log_radius = log_mode + step * torch.arange(-2000, 500, dtype=ratio.dtype, device=ratio.device)
        log_shells = num_features * log_radius - self.rho((2 * log_radius).exp(), num_features)
        return _log_unit_sphere_area(num_features) + log_shells.logsumexp(0) + math.log(step)


@KERNELS.register("exponential")
class ExponentialKernel(Kernel):
    r"""Exponential of the distance, the steepest energy.

    .. math:: d(x, \mu) = \sum_{i=1}^{D} e^{\alpha |x_i - \mu_i|}

    with ``rate`` :math:`\alpha`. Not robust. The minimum is D, with gradient 0. Beyond
    :math:`\alpha |x_i - \mu_i| = 40` the energy continues as its tangent, finite and increasing in float32. exp(-d) is
    a density with normalizer :math:`(2 E_1(1) / \alpha)^D`, where :math:`E_1(1) = 0.2194` is the exponential integral.

    Example:
        >>> ExponentialKernel()(torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([[2.7183, 1.0000]])

    Source: E_1: Abramowitz and Stegun, *Handbook of Mathematical Functions* (1964), section 5.1.
    """

    def __init__(self, rate: float = 1.0, learnable: bool = False) -> None:
        super().__init__(learnable, rate=rate)

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:
        exponent = self.positive("rate", x.dtype) * pairwise(x, centers).abs()
        above = exponent > _LARGEST_EXPONENT
        tangent = math.exp(_LARGEST_EXPONENT) * (exponent - (_LARGEST_EXPONENT - 1))
        return torch.where(above, tangent, torch.where(above, 0.0, exponent).exp()).sum(-1)

    def log_normalizer(self, num_features: int) -> Tensor:
        return num_features * (math.log(2 * _EXPONENTIAL_INTEGRAL) - self.rate.log())


def _huber_rho(squared_distance: Tensor, delta: Tensor | float) -> Tensor:
    inside = squared_distance <= delta**2
    # Take the root only where it is used: its derivative at distance 0 is infinite.
    distance = torch.where(inside, delta**2, squared_distance).sqrt()
    return torch.where(inside, 0.5 * squared_distance, delta * (distance - 0.5 * delta))


def _huber_irls_weight(squared_distance: Tensor, delta: Tensor | float) -> Tensor:
    return delta / torch.where(squared_distance <= delta**2, delta**2, squared_distance).sqrt()


def _log_unit_sphere_area(num_features: int) -> float:
    return math.log(2.0) + 0.5 * num_features * math.log(math.pi) - math.lgamma(0.5 * num_features)
