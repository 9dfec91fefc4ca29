"""Base class of kernels that are functions of the Mahalanobis distance: energy, IRLS weight and normalizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from em_lightning.kernels.base import Kernel


class EllipticalKernel(Kernel):
    r"""A kernel that also defines an elliptical density, the component of a mixture with estimated covariances.

    With the squared Mahalanobis distance :math:`y = (x - \mu)^\top \Sigma^{-1} (x - \mu)` the density is

    .. math:: p(x) = \frac{e^{-\rho(y)}}{Z_D \, |\Sigma|^{1/2}}, \qquad Z_D = \int_{\mathbb{R}^D} e^{-\rho(|x|^2)} dx

    An M-step of iteratively reweighted least squares (IRLS) gives each point the weight :math:`u(y) = 2 \rho'(y)`. It
    never decreases the likelihood where :math:`\rho` is concave in :math:`y` (majorize-minimize).

    =============  ==============================================  ===================================
    kernel         :math:`\rho(y)`                                 :math:`u(y)`
    =============  ==============================================  ===================================
    gaussian       :math:`y / 2`                                   1
    student_t      :math:`p \log(1 + y / \nu)`                     :math:`2 p / (\nu + y)`
    laplace        :math:`\sqrt y`                                 :math:`1 / \sqrt y`
    huber          :math:`y / 2`, beyond :math:`\delta`            :math:`\min(1, \delta / \sqrt y)`
                   :math:`\delta (\sqrt y - \delta / 2)`
    pseudo_huber   :math:`\delta^2 (\sqrt{1 + y / \delta^2} - 1)`  :math:`1 / \sqrt{1 + y / \delta^2}`
    =============  ==============================================  ===================================

    For the Student-t :math:`p = (\nu + D) / 2` with ``density=True``. A ``scale`` :math:`s` divides the distance:
    :math:`\rho(y / s^2)`; the Gaussian ignores it, since the covariance contains it. With D = 1 these are the kernels'
    own densities.

    Shape:
        The squared distance has any shape, which is also that of the result. Learnable shape parameters enter in
        float64 and promote the result to it.

    Source: Kent and Tyler, "Redescending M-estimates of multivariate location and scatter", Annals of Statistics 19
    (1991); t: Peel and McLachlan, "Robust mixture modelling using the t distribution", Statistics and Computing 10
    (2000); exponential power: Gómez, Gómez-Villegas and Marín, Communications in Statistics 27 (1998); hyperbolic:
    Barndorff-Nielsen, Proceedings of the Royal Society A 353 (1977).
    """

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:
        """Return the energy as a function of the squared Mahalanobis distance."""
        raise NotImplementedError(f"{type(self).__name__} must define rho(squared_distance, num_features)")

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:
        """Return the IRLS weight of a point: twice the derivative of rho by the squared distance."""
        raise NotImplementedError(f"{type(self).__name__} must define irls_weight(squared_distance, num_features)")

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:
        """Return the log of the integral of exp(-rho(|x|^2)) over R^D, a float64 tensor of shape ().

        Raises:
            NoDensityError: the integral is infinite.
        """
        raise NotImplementedError(f"{type(self).__name__} must define elliptical_log_normalizer(num_features)")


def huber_rho(squared_distance: Tensor, delta: Tensor | float) -> Tensor:
    """Return y / 2 up to the distance delta, and delta (sqrt(y) - delta / 2) beyond it."""
    bound = _square(delta, squared_distance)
    linear = delta * torch.maximum(squared_distance, bound).sqrt() - 0.5 * bound
    return torch.where(squared_distance <= bound, 0.5 * squared_distance, linear)


def huber_irls_weight(squared_distance: Tensor, delta: Tensor | float) -> Tensor:
    """Return min(1, delta / sqrt(y))."""
    # The maximum keeps the derivative of the square root finite at distance 0.
    return delta / torch.maximum(squared_distance, _square(delta, squared_distance)).sqrt()


def _square(delta: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(delta, dtype=like.dtype, device=like.device) ** 2


def log_sphere_area(num_features: int) -> float:
    """Return the log of the area of the unit sphere in D dimensions."""
    return math.log(2.0) + 0.5 * num_features * math.log(math.pi) - math.lgamma(0.5 * num_features)


def float64(value: Tensor | float) -> Tensor:
    """Return a shape parameter as a float64 tensor of shape ()."""
    return torch.as_tensor(value, dtype=torch.float64).reshape(())
