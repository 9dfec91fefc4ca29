"""Kernels that add one energy per feature: Laplace, logistic, Huber, pseudo-Huber and exponential."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from em_lightning.kernels.base import KERNELS, Kernel, NoDensityError
from em_lightning.kernels.distance import pairwise
from em_lightning.kernels.elliptical import EllipticalKernel, float64, huber_irls_weight, huber_rho, log_sphere_area
from em_lightning.kernels.special import scaled_bessel_k

# exp(40) = 2.4e17: its square still fits float32, so that norms of gradients do.
_LARGEST_EXPONENT = 40.0
# Below this distance, in scales, the elliptical Laplace energy is a parabola: its IRLS weight is infinite at 0.
_LAPLACE_CORE = 1e-4
# The exponential integral E_1(1), the integral of exp(-exp(u)) over u > 0 (Abramowitz and Stegun, table 5.1).
_EXPONENTIAL_INTEGRAL = 0.21938393439552027


@KERNELS.register("laplace")
class LaplaceKernel(EllipticalKernel):
    r"""Absolute distance, the energy of Laplace noise.

    .. math:: d(x, \mu) = \sum_{i=1}^{D} \frac{|x_i - \mu_i|}{b}

    with ``scale`` :math:`b`. The pull of an item is the same at every distance: robust, with the median where the
    Gaussian has the mean. At :math:`x_i = \mu_i` the gradient is taken as 0. A density, with normalizer
    :math:`(2 b)^D`.

    Args:
        scale: mean absolute deviation of each feature.
        learnable: make the scale a positive parameter.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> LaplaceKernel(scale=2.0)(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2))
        tensor([[2.]])

    Source: Laplace, "Mémoire sur la probabilité des causes par les événements" (1774).
    """

    def __init__(self, scale: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        self.add_positive("scale", scale, learnable)

    @property
    def scale(self) -> Tensor:
        """The mean absolute deviation."""
        return self.positive_tensor("scale")

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        return pairwise(x, centers).abs().sum(-1) / self.positive("scale", x.dtype)

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        return num_features * (math.log(2) + self.scale.log()).reshape(())

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        scaled = squared_distance / self.positive("scale", torch.float64) ** 2
        return huber_rho(scaled, _LAPLACE_CORE) / _LAPLACE_CORE + 0.5 * _LAPLACE_CORE

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        variance = self.positive("scale", torch.float64) ** 2
        return huber_irls_weight(squared_distance / variance, _LAPLACE_CORE) / (_LAPLACE_CORE * variance)

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        # The area of the sphere times the integral of r^(D-1) exp(-r); the parabola changes it by less than 1e-8.
        log_scale = float64(self.positive("scale", torch.float64)).log()
        return log_sphere_area(num_features) + math.lgamma(num_features) + num_features * log_scale


@KERNELS.register("logistic")
class LogisticKernel(Kernel):
    r"""Softplus of a signed distance: being above the center costs nothing.

    .. math:: d(x, \mu) = \sum_{i=1}^{D} \log\bigl(1 + e^{-\alpha (x_i - \mu_i)}\bigr)

    with ``slope`` :math:`\alpha`. Linear below the center and zero far above it, so exp(-d) is a product of logistic
    sigmoids, the probability of a binary latent, and **no density**: it tends to 1 on one side. The pull on an item
    is at most the slope.

    Args:
        slope: steepness below the center.
        learnable: make the slope a positive parameter.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> LogisticKernel()(torch.tensor([[0.0]]), torch.tensor([[0.0], [100.0]]))
        tensor([[  0.6931, 100.0000]])

    Source: Cox, "The regression analysis of binary sequences", JRSS B 20 (1958).
    """

    def __init__(self, slope: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        self.add_positive("slope", slope, learnable)

    @property
    def slope(self) -> Tensor:
        """The steepness."""
        return self.positive_tensor("slope")

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        # Not softplus: it turns linear beyond its threshold, an error of 2e-9.
        return -functional.logsigmoid(self.positive("slope", x.dtype) * pairwise(x, centers)).sum(-1)

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        raise NoDensityError(
            "LogisticKernel has no density: exp(-d) is a sigmoid, which tends to 1 far above the center, so its "
            "integral is infinite; for a density take another kernel, such as 'laplace' or 'pseudo_huber'"
        )


@KERNELS.register("huber")
class HuberKernel(EllipticalKernel):
    r"""Quadratic near the center, linear in the tails.

    .. math::
        d(x, \mu) = \sum_{i=1}^{D} \begin{cases}
            z_i^2 / 2 & |z_i| \le \delta \\ \delta (|z_i| - \delta / 2) & |z_i| > \delta
        \end{cases}, \qquad z = x - \mu

    with threshold :math:`\delta` (``delta``). The pull of an item grows with its distance up to :math:`\delta` and no
    further: efficient under Gaussian noise and robust to outliers. A density, with normalizer
    :math:`\bigl(\sqrt{2 \pi} \operatorname{erf}(\delta / \sqrt 2) + \tfrac{2}{\delta} e^{-\delta^2 / 2}\bigr)^D`.

    Args:
        delta: distance at which the energy turns linear.
        learnable: make delta a positive parameter.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> HuberKernel(delta=1.0)(torch.tensor([[0.5], [3.0]]), torch.zeros(1, 1))
        tensor([[0.1250],
                [2.5000]])

    Source: Huber, "Robust estimation of a location parameter", Annals of Mathematical Statistics 35 (1964).
    """

    def __init__(self, delta: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        self.add_positive("delta", delta, learnable)

    @property
    def delta(self) -> Tensor:
        """The distance at which the energy turns linear."""
        return self.positive_tensor("delta")

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        delta = self.positive("delta", x.dtype)
        z = pairwise(x, centers)
        size = z.abs()
        return torch.where(size <= delta, 0.5 * z.square(), delta * (size - 0.5 * delta)).sum(-1)

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        delta = self.delta.reshape(())
        middle = math.sqrt(2 * math.pi) * torch.erf(delta / math.sqrt(2))
        tails = 2 / delta * (-0.5 * delta**2).exp()
        return num_features * (middle + tails).log()

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        return huber_rho(squared_distance, self.positive("delta", torch.float64))

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        return huber_irls_weight(squared_distance, self.positive("delta", torch.float64))

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        # The integral of r^(D-1) exp(-r^2 / 2) to delta, and beyond it that of r^(D-1) exp(delta^2 / 2 - delta r),
        # which is a finite sum of positive terms.
        half, square = 0.5 * num_features, float64(self.positive("delta", torch.float64)) ** 2
        middle = torch.special.gammainc(torch.full_like(square, half), 0.5 * square).log()
        middle = middle + (half - 1.0) * math.log(2.0) + math.lgamma(half)
        order = torch.arange(num_features, dtype=torch.float64, device=square.device)
        terms = order * square.log() - torch.lgamma(order + 1.0)
        tail = terms.logsumexp(0) + math.lgamma(num_features) - 0.5 * square - half * square.log()
        return log_sphere_area(num_features) + torch.logaddexp(middle, tail)


@KERNELS.register("pseudo_huber")
class PseudoHuberKernel(EllipticalKernel):
    r"""Smooth Huber: quadratic near the center, linear in the tails, differentiable at every order.

    .. math:: d(x, \mu) = \sum_{i=1}^{D} \delta^2 \left(\sqrt{1 + (z_i / \delta)^2} - 1\right), \qquad z = x - \mu

    with ``delta`` :math:`\delta`, the slope of the tails. Robust as Huber's, without its corner. A density, that of a
    symmetric hyperbolic distribution, with normalizer :math:`\bigl(2 \delta e^{\delta^2} K_1(\delta^2)\bigr)^D`,
    :math:`K_1` the modified Bessel function of the second kind.

    Args:
        delta: distance about which the energy turns linear.
        learnable: make delta a positive parameter.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> PseudoHuberKernel(delta=4.0)(torch.tensor([[3.0]]), torch.zeros(1, 1))
        tensor([[4.]])

    Source: Charbonnier et al., "Deterministic edge-preserving regularization in computed imaging", IEEE TIP 6 (1997);
    the distribution: Barndorff-Nielsen, Proceedings of the Royal Society A 353 (1977).
    """

    def __init__(self, delta: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        self.add_positive("delta", delta, learnable)

    @property
    def delta(self) -> Tensor:
        """The distance about which the energy turns linear."""
        return self.positive_tensor("delta")

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        # The same formula without its difference, which would cancel near the center, and without an overflow far away.
        z = pairwise(x, centers)
        ratio = z / self.positive("delta", x.dtype)
        return (z * (z / (1 + torch.hypot(ratio, torch.ones_like(ratio))))).sum(-1)

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        delta = self.delta.reshape(())
        return num_features * (math.log(2) + delta.log() + scaled_bessel_k(delta**2, order=1).log())

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        return squared_distance / (1.0 + self._root(squared_distance))

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:  # noqa: D102
        return self._root(squared_distance).reciprocal()

    def _root(self, squared_distance: Tensor) -> Tensor:
        return (1.0 + squared_distance / self.positive("delta", torch.float64) ** 2).sqrt()

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        # (2 pi)^((D-1)/2) 2 delta exp(delta^2) K_((D+1)/2)(delta^2) by the stable upward recurrence of ratios
        # K_(v+1) / K_v = K_(v-1) / K_v + 2 v / x, from orders 0 and 1, or from 1/2, where K is sqrt(pi / 2x) exp(-x).
        x = float64(self.positive("delta", torch.float64)) ** 2
        if num_features % 2:
            zeroth, first = scaled_bessel_k(x, 0), scaled_bessel_k(x, 1)
            order, log_bessel, ratio = 1.0, first.log(), first / zeroth
        else:
            order, log_bessel, ratio = 0.5, 0.5 * (0.5 * math.pi / x).log(), torch.ones_like(x)
        while order < 0.5 * (num_features + 1):
            ratio = ratio.reciprocal() + 2.0 * order / x
            log_bessel, order = log_bessel + ratio.log(), order + 1.0
        return 0.5 * (num_features - 1) * math.log(2.0 * math.pi) + 0.5 * (4.0 * x).log() + log_bessel


@KERNELS.register("exponential")
class ExponentialKernel(Kernel):
    r"""Exponential of the distance: the sharpest penalty of all.

    .. math:: d(x, \mu) = \sum_{i=1}^{D} e^{\alpha |x_i - \mu_i|}

    with ``rate`` :math:`\alpha`. The lightest tails and no robustness: far items dominate every gradient, and without
    a high temperature assignments are all but hard. The least energy is D, not 0, and at :math:`x_i = \mu_i` the
    gradient is taken as 0.

    **Saturates**: beyond :math:`\alpha |x_i - \mu_i| = 40` the energy goes on along its tangent, so that in float32
    and wider energies stay ordered and finite, and the gradient stays at :math:`\alpha e^{40}`, about
    :math:`2.4 \cdot 10^{17} \alpha`.

    A density (the part beyond saturation weighs less than any float), with normalizer
    :math:`(2 E_1(1) / \alpha)^D`, where :math:`E_1(1) = 0.2194` is the exponential integral.

    Args:
        rate: how fast the energy grows.
        learnable: make the rate a positive parameter.

    Shape:
        x (..., N, D) and centers (..., K, D) give (..., N, K).

    Example:
        >>> ExponentialKernel()(torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([[2.7183, 1.0000]])

    Source: the catalogue of kernels for implicit EM; E_1: Abramowitz and Stegun, section 5.1.
    """

    def __init__(self, rate: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        self.add_positive("rate", rate, learnable)

    @property
    def rate(self) -> Tensor:
        """How fast the energy grows."""
        return self.positive_tensor("rate")

    def energy(self, x: Tensor, centers: Tensor) -> Tensor:  # noqa: D102
        exponent = self.positive("rate", x.dtype) * pairwise(x, centers).abs()
        within = exponent.clamp(max=_LARGEST_EXPONENT)
        tangent = math.exp(_LARGEST_EXPONENT) * (exponent - (_LARGEST_EXPONENT - 1))
        return torch.where(exponent > _LARGEST_EXPONENT, tangent, within.exp()).sum(-1)

    def log_normalizer(self, num_features: int) -> Tensor:  # noqa: D102
        return num_features * (math.log(2 * _EXPONENTIAL_INTEGRAL) - self.rate.log()).reshape(())
