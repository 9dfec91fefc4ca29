"""Base class of kernels that define an elliptical density: energy, IRLS weight and normalizer."""

from __future__ import annotations

from torch import Tensor

from em_lightning.kernels.base import Kernel


class EllipticalKernel(Kernel):
    r"""A kernel that can be a mixture component with an estimated covariance.

    With the squared Mahalanobis distance :math:`y = (x - \mu)^\top \Sigma^{-1} (x - \mu)` the component is

    .. math:: p(x) = \frac{e^{-\rho(y)}}{Z_D \, |\Sigma|^{1/2}}, \qquad Z_D = \int_{\mathbb{R}^D} e^{-\rho(|x|^2)} dx

    The M-step is iteratively reweighted least squares (IRLS): each point has the weight :math:`u(y) = 2 \rho'(y)`. It
    never decreases the likelihood where :math:`\rho` is concave (majorize-minimize).

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

    For the Student-t :math:`p = (\nu + D) / 2` with ``density=True``. A ``scale`` :math:`s` divides the distance,
    :math:`\rho(y / s^2)`; the Gaussian ignores it, since the covariance makes it redundant. With D = 1 the densities
    are those of the kernels; with D > 1 the multivariate t, an exponential power (Laplace) and a hyperbolic one
    (pseudo-Huber). Laplace is a parabola below the distance 1e-4 s, where its IRLS weight would tend to infinity.

    Source: Kent and Tyler, "Redescending M-estimates of multivariate location and scatter", Annals of Statistics 19
    (1991); t: Peel and McLachlan, Statistics and Computing 10 (2000); exponential power: Gómez, Gómez-Villegas and
    Marín, Communications in Statistics 27 (1998); hyperbolic: Barndorff-Nielsen, Proc. Royal Society A 353 (1977).
    """

    def rho(self, squared_distance: Tensor, num_features: int) -> Tensor:
        """Return the energy as a function of the squared Mahalanobis distance, of the same shape and dtype."""
        raise NotImplementedError

    def irls_weight(self, squared_distance: Tensor, num_features: int) -> Tensor:
        """Return the IRLS weight, twice the derivative of rho, with finite derivatives also at distance 0."""
        raise NotImplementedError

    def log_normalizer(self, num_features: int) -> Tensor:
        return num_features * self.elliptical_log_normalizer(1)  # of an energy that adds over features

    def elliptical_log_normalizer(self, num_features: int) -> Tensor:
        """Return the log of the integral of exp(-rho(|x|^2)) over R^D, a float64 tensor of shape ().

        Raises:
            NoDensityError: the integral is infinite.
        """
        raise NotImplementedError
