r"""Elliptical densities: kernels of the Mahalanobis distance, and how strongly each pulls a point.

A kernel's energy of one feature, taken at the Mahalanobis distance :math:`\sqrt y`,
:math:`y = (x - \mu)^\top S^{-1} (x - \mu)`, makes the density :math:`e^{-\rho(y)} / (Z_D |S|^{1/2})`. Where
:math:`\rho` is concave in :math:`y`, its tangent lies above it, so a Gaussian M-step whose points count
:math:`u(y) = 2 \rho'(y)` times never lowers the likelihood (majorize, minimize).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_lightning.kernels import (
    GaussianKernel,
    HuberKernel,
    Kernel,
    LaplaceKernel,
    PseudoHuberKernel,
    StudentTKernel,
)
from em_lightning.kernels.special import scaled_bessel_k

# Below this distance the Laplace energy is a parabola: its pull is infinite at a point that is the center itself.
_LAPLACE_CORE = 1e-4


class Radial(NamedTuple):
    """An elliptical density in D dimensions.

    energy: from y (...) to the energy and the pull u = 2 d energy / dy.
    log_normalizer: the logarithm of the integral of exp(-energy) over space, for S the identity.
    """

    energy: Callable[[Tensor], tuple[Tensor, Tensor]]
    log_normalizer: Tensor | float


def radial_of(kernel: Kernel, num_features: int) -> Radial | None:
    r"""Return the elliptical density of a kernel, or ``None`` for the Gaussian, whose pull is 1 everywhere.

    =============  ======================================================  ===========================================
    kernel         energy of y                                             pull u
    =============  ======================================================  ===========================================
    student_t      :math:`p \log(1 + y / \nu)`, p = (df + D) / 2           :math:`2 p / (\nu + y)`
    laplace        :math:`\sqrt y`                                         :math:`1 / \sqrt y`
    huber          :math:`y / 2`, beyond delta                             :math:`\min(1, \delta / \sqrt y)`
                   :math:`\delta (\sqrt y - \delta / 2)`
    pseudo_huber   :math:`\delta^2 (\sqrt{1 + y / \delta^2} - 1)`          :math:`1 / \sqrt{1 + y / \delta^2}`
    =============  ======================================================  ===========================================

    A kernel's scale s divides the distance. In one dimension these are the kernels' own densities; in more, the
    elliptical ones: multivariate t, multivariate exponential power of exponent 1/2 (Laplace), hyperbolic
    (pseudo-Huber). Laplace is a parabola below a distance of 1e-4, which changes its integral by less than 1e-8.

    Raises:
        ValueError: the kernel has no M-step, or no density in D dimensions.

    Source: Kent and Tyler, Redescending M-estimates of multivariate location and scatter, 1991; t: Peel and McLachlan,
    Robust mixture modelling using the t distribution, 2000; exponential power: Gomez, Gomez-Villegas and Marin, 1998;
    hyperbolic: Barndorff-Nielsen, 1977.
    """
    if isinstance(kernel, GaussianKernel):
        return None
    if isinstance(kernel, StudentTKernel):
        return _student_t(kernel, num_features)
    if isinstance(kernel, LaplaceKernel):
        return _laplace(kernel, num_features)
    if isinstance(kernel, HuberKernel):
        return _huber(kernel, num_features)
    if isinstance(kernel, PseudoHuberKernel):
        return _pseudo_huber(kernel, num_features)
    raise ValueError(
        f"kernel={kernel!r} has no M-step here; use 'gaussian', 'student_t', 'laplace', 'huber' or 'pseudo_huber', "
        f"for the cosine em_lightning.operators.DirectionalEM, or for any kernel em_lightning.operators.GeneralizedEM"
    )


def _student_t(kernel: StudentTKernel, features: int) -> Radial:
    df, scale = kernel.positive("df", torch.float64), kernel.positive("scale", torch.float64)
    exponent = 0.5 * (df + features) if kernel.density else 1.0

    def energy(square: Tensor) -> tuple[Tensor, Tensor]:
        square = square / scale**2
        return exponent * (square / df).log1p(), 2 * exponent / ((df + square) * scale**2)

    return Radial(energy, kernel.log_normalizer(features))


def _laplace(kernel: LaplaceKernel, features: int) -> Radial:
    scale = kernel.positive("scale", torch.float64)

    def energy(square: Tensor) -> tuple[Tensor, Tensor]:
        energies, pull = _bent(square / scale**2, _LAPLACE_CORE)
        return energies / _LAPLACE_CORE + 0.5 * _LAPLACE_CORE, pull / (_LAPLACE_CORE * scale**2)

    # The area of the sphere times the integral of r^(D-1) exp(-r).
    return Radial(energy, _log_sphere(features) + math.lgamma(features) + features * _log(scale))


def _huber(kernel: HuberKernel, features: int) -> Radial:
    delta = kernel.positive("delta", torch.float64)
    half, square = 0.5 * features, torch.as_tensor(delta, dtype=torch.float64).reshape(()) ** 2
    # The integral of r^(D-1) exp(-r^2 / 2) to delta, and beyond it that of r^(D-1) exp(delta^2 / 2 - delta r), which
    # for whole D is a finite sum of terms of one sign.
    middle = torch.special.gammainc(torch.full_like(square, half), 0.5 * square).log()
    middle = middle + (half - 1.0) * math.log(2.0) + math.lgamma(half)
    order = torch.arange(features, dtype=torch.float64, device=square.device)
    terms = order * square.log() - torch.lgamma(order + 1.0)
    tail = terms.logsumexp(0) + math.lgamma(features) - 0.5 * square - half * square.log()
    return Radial(lambda y: _bent(y, delta), _log_sphere(features) + torch.logaddexp(middle, tail))


def _pseudo_huber(kernel: PseudoHuberKernel, features: int) -> Radial:
    delta = kernel.positive("delta", torch.float64)

    def energy(square: Tensor) -> tuple[Tensor, Tensor]:
        root = (1.0 + square / delta**2).sqrt()
        return square / (1.0 + root), root.reciprocal()

    # (2 pi)^((D-1)/2) 2 delta exp(delta^2) K_((D+1)/2)(delta^2), the Bessel function by its stable upward recurrence
    # K_(v+1) / K_v = K_(v-1) / K_v + 2 v / x, from orders 0 and 1 or from 1/2, where it is sqrt(pi / 2x) exp(-x).
    x = torch.as_tensor(delta, dtype=torch.float64).reshape(()) ** 2
    if features % 2:
        zeroth, first = scaled_bessel_k(x, 0), scaled_bessel_k(x, 1)
        order, log_bessel, ratio = 1.0, first.log(), first / zeroth
    else:
        order, log_bessel, ratio = 0.5, 0.5 * (0.5 * math.pi / x).log(), torch.ones_like(x)
    while order < 0.5 * (features + 1):
        ratio = ratio.reciprocal() + 2.0 * order / x
        log_bessel, order = log_bessel + ratio.log(), order + 1.0
    return Radial(energy, 0.5 * (features - 1) * math.log(2.0 * math.pi) + 0.5 * (4.0 * x).log() + log_bessel)


def _bent(square: Tensor, delta: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return Huber's energy and pull of a squared distance."""
    bound = torch.as_tensor(delta, dtype=square.dtype, device=square.device) ** 2
    # Not sqrt(square): its slope at a point that is the center would be infinite times zero.
    distance = torch.maximum(square, bound).sqrt()
    return torch.where(square <= bound, 0.5 * square, delta * distance - 0.5 * bound), delta / distance


def _log_sphere(features: int) -> float:
    """Return the logarithm of the area of the unit sphere in D dimensions."""
    return math.log(2.0) + 0.5 * features * math.log(math.pi) - math.lgamma(0.5 * features)


def _log(value: Any) -> Any:
    return value.log() if isinstance(value, Tensor) else math.log(value)
