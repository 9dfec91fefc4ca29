"""Elliptical densities of robust kernels, as the E-step takes them. The kernels own the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from em_lightning.kernels import EllipticalKernel, GaussianKernel, Kernel


class Radial(NamedTuple):
    """The energy and IRLS weight of a squared Mahalanobis distance, and the log-normalizer."""

    energy: Callable[[Tensor], tuple[Tensor, Tensor]]
    log_normalizer: Tensor | float


def radial_of(kernel: Kernel, num_features: int) -> Radial | None:
    """Return the elliptical density of a kernel, or ``None`` for the Gaussian, whose IRLS weight is 1.

    Raises:
        ValueError: the kernel has no M-step, or no density in D dimensions.
    """
    if isinstance(kernel, GaussianKernel):
        return None
    if not isinstance(kernel, EllipticalKernel):
        raise ValueError(
            f"kernel={kernel!r} has no M-step here; use 'gaussian', 'student_t', 'laplace', 'huber' or 'pseudo_huber', "
            f"for the cosine em_lightning.operators.DirectionalEM, or for any kernel "
            f"em_lightning.operators.GeneralizedEM"
        )

    def energy(square: Tensor) -> tuple[Tensor, Tensor]:
        return kernel.rho(square, num_features), kernel.irls_weight(square, num_features)

    return Radial(energy, kernel.elliptical_log_normalizer(num_features))
